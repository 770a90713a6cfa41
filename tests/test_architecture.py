"""The shape of the project: public names, light imports, a README that tells the truth about the tree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", gossamer.__all__)
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    assert getattr(gossamer, name).__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        gossamer.__getattr__("nonsense")


def test_the_engine_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, gossamer.engine, gossamer.server, gossamer.stages.pack, gossamer.tools.bench; "
    program += "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


def test_readme_is_short_and_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    layout = re.search(r"```\n(src/gossamer/.*?)```", text, re.DOTALL)
    assert layout
    for line in layout[1].splitlines():
        folder = ROOT / line[:16].strip() if line[0] != " " else ROOT / "src/gossamer"
        assert folder.is_dir(), line
        for word in re.findall(r"[a-z]+/?", line[16:50]) if folder.name == "gossamer" else []:
            assert (folder / word).is_dir() or (folder / f"{word}.py").exists(), word


def test_every_verb_of_the_readme_is_one() -> None:
    from gossamer.cli import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"(?<!from )\bgossamer ([a-z]+)", text)) | set(
        re.findall(r"^\| `([a-z]+)", text, re.MULTILINE)
    )
    assert verbs
    assert verbs <= set(VERBS)
