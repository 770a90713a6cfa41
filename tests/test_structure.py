"""The shape of the project: public names, light imports, a README that tells the truth about the tree."""

import re
import subprocess
import sys
from collections.abc import Callable
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
    program += "import gossamer.tools.publish; "
    program += "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


PRUNE_AND_LIST_WHAT_IS_LOADED = """
import sys
from gossamer.stages.prune import Prune, prune
rows = {"num_calibration_samples": 4, "max_seq_length": 32, "save_seconds": float("inf")}
prune(Prune(*sys.argv[1:3], dataset=(sys.argv[3],), method="sparsegpt", **rows))
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "gossamer" and (module.__file__ or "").endswith(".py"):
        print(name, module.__file__)
"""


def test_prune_loads_at_most_2700_lines_all_for_its_own_work(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a reader has to know to follow one stage, measured in a process of its own that prunes a model.

    What writes the report and draws its picture is not of that.
    """
    (tmp_path / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    paths = [str(tiny_llama("llama2")), str(tmp_path / "out"), str(tmp_path / "text.txt")]
    command = [sys.executable, "-c", PRUNE_AND_LIST_WHAT_IS_LOADED, *paths]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    files = dict(line.split(" ", 1) for line in completed.stdout.splitlines())
    lines = {name: len(Path(file).read_text(encoding="utf-8").splitlines()) for name, file in files.items()}
    assert (tmp_path / "out" / "model.safetensors").exists()
    beside = {"gossamer.layerwise.report", "gossamer.plots"}
    assert sum(lines[name] for name in lines.keys() - beside) <= 2700, lines
    foreign = (
        "cli",
        "engine",
        "evaluation",
        "measure",
        "packed",
        "runs",
        "server",
        "tools",
        "training",
    )
    others = (
        "architecture.frequencies",
        "checkpoint.fused",
        "compress.admm",
        "compress.budget",
        "compress.magnitude",
        "compress.pattern",
        "compress.reconstruct",
        "compress.wanda",
        "data.doctests",
        "data.mixture",
        "data.rows",
        "data.supervised",
        "data.tables",
        "data.trees",
        "layerwise.budget",
        "layerwise.scores",
        "tokens.chat",
        "tokens.llama",
        "tokens.tokenizer",
        "modules.unfused",
    )
    loaded = {name.removeprefix("gossamer.") for name in files}
    assert not loaded & {*foreign, *others}
    assert {name for name in loaded if name.startswith("stages.")} == {"stages.prune"}


def rooms_of_the_readme() -> dict[str, set[str]]:
    """Folder -> the files (without suffix) and folders that the README's map names in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    layout = re.search(r"```\n(src/gossamer/.*?)```", text, re.DOTALL)
    assert layout
    rooms: dict[str, set[str]] = {}
    top = ""
    for line in layout[1].splitlines():
        room, names = re.match(r"( *\S+/) +(.*?)(?:   .*)?$", line).groups()  # type: ignore[union-attr]
        if room.endswith("families/"):  # a family is one file, which nothing else has to name
            continue
        top = top if room.startswith(" ") else room
        folder = f"{top}{room.strip()}" if room.startswith(" ") else room
        if names:
            rooms[folder] = set(names.split())
    return rooms


@pytest.mark.parametrize("suffixes", [("src/gossamer/", (".py",)), ("native/", (".cpp", ".hpp"))])
def test_the_map_in_the_readme_names_every_module_and_nothing_else(
    suffixes: tuple[str, tuple[str, ...]],
) -> None:
    top, kinds = suffixes
    named = {folder: names for folder, names in rooms_of_the_readme().items() if folder.startswith(top)}
    found: dict[str, set[str]] = {}
    for file in (ROOT / top).rglob("*"):
        if file.parent.name == "families":  # a family is one file, which nothing else has to name
            continue
        if file.suffix in kinds and (file.stem != "__init__" or file.parent == ROOT / top):
            found.setdefault(f"{file.parent.relative_to(ROOT)}/", set()).add(file.stem)
    assert named == found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_few_modules_lie_loose() -> None:
    assert len(list((ROOT / "src" / "gossamer").glob("*.py"))) <= 9


def test_every_verb_of_the_readme_is_one() -> None:
    from gossamer.cli import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"(?<!from )\bgossamer ([a-z]+)", text)) | set(
        re.findall(r"^\| `([a-z]+)", text, re.MULTILINE)
    )
    assert verbs
    assert verbs <= set(VERBS)
