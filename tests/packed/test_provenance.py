"""A packed file says which stages made it and under which licence it is, and carries the texts of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.provenance import MAX_TEXT_BYTES, Provenance, Step
from gossamer.errors import CheckpointError
from gossamer.packed.reader import Packed
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune
from gossamer.tools.inspect import Inspect, inspect

CARD = "---\nlicense: llama3.2\nlanguage: [en]\n---\n# A model\n"
NOTICE = "Built with Llama – © 2026\n"


def with_texts(source: Path, path: Path, **texts: str | bytes) -> Path:
    """A copy of a directory with these files."""
    shutil.copytree(source, path)
    for name, text in texts.items():
        content = text.encode() if isinstance(text, str) else text
        (path / name.replace("_md", ".md").replace("_pdf", ".pdf")).write_bytes(content)
    return path


def test_stages_and_texts_reach_the_packed_file(
    tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = with_texts(
        tiny_llama("llama2"), tmp_path / "model", README_md=CARD, LICENSE="Terms\n", NOTICE=NOTICE
    )
    job = Prune(
        str(model),
        str(tmp_path / "pruned"),
        dataset=(str(text_file),),
        num_calibration_samples=2,
        max_seq_length=32,
    )
    prune(job)
    assert pack(Pack(str(tmp_path / "pruned"), str(tmp_path / "m.goss"))).left_out == ()
    packed = Packed.open(tmp_path / "m.goss")
    texts = {"LICENSE": "Terms\n", "NOTICE": NOTICE, "README.md": CARD}
    dense, pruned = (Checkpoint.open(path) for path in (model, tmp_path / "pruned"))
    assert packed.provenance == Provenance((Step("prune", dense.hash),), "llama3.2", texts)
    assert packed.config == pruned.config  # which is as the directory has it
    known = {"format", "version", "config", "parent", "layers", "tokenizer_config", "generation_config"}
    assert packed.metadata.keys() == known  # to a program of before as well, which reads the file therefore
    assert packed.metadata["version"] == "1"
    result = inspect(Inspect(str(tmp_path / "m.goss")))
    assert [(step.stage, step.parent) for step in result.provenance] == [
        ("prune", dense.hash),
        ("pack", pruned.hash),
    ]
    assert (result.license, result.texts) == ("llama3.2", texts)
    shown = "\n".join(cli.markdown(table) for table in result.tables())
    assert "llama3.2" in shown and "LICENSE, NOTICE, README.md" in shown and "step 2: pack" in shown
    assert inspect(Inspect(str(tmp_path / "pruned"))).license == "llama3.2"


def test_a_model_that_nothing_is_known_of_is_packed_as_before(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    pack(Pack(str(tiny_llama("llama2")), str(tmp_path / "m.goss")))
    packed = Packed.open(tmp_path / "m.goss")
    assert packed.provenance == Provenance() and "gossamer" not in json.loads(packed.metadata["config"])
    assert inspect(Inspect(str(tmp_path / "m.goss"))).license is None


@pytest.mark.parametrize(
    ("texts", "license"),
    [
        ({"LICENSE_txt": "\n  MIT License\n\nCopyright"}, "MIT License"),
        ({"README_md": "# A model\n", "LICENCE": "Apache License\n"}, "Apache License"),
        ({"README_md": "---\nlicense: other\nlicense_name: tongyi\n---\n"}, "tongyi (other)"),
        ({"README_md": "---\nlicense: [mit, apache-2.0]\n---\n"}, "mit, apache-2.0"),
        ({"README_md": "---\nlicense: {\n---\n"}, None),
        ({"README_md": "---\n- mit\n---\n"}, None),
        ({"README_md": b"---\nlicense: mit\n---\n caf\xe9"}, None),
        ({"NOTICE": "Something"}, None),
    ],
)
def test_where_the_licence_is_found(
    texts: dict[str, str | bytes], license: str | None, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    model = with_texts(tiny_llama("llama2"), tmp_path / "model", **texts)
    pack(Pack(str(model), str(tmp_path / "m.goss")))
    for path in (model, tmp_path / "m.goss"):
        result = inspect(Inspect(str(path)))
        assert result.license == license and len(result.texts) == len(texts)


def test_what_cannot_be_carried_is_named(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    long = CARD + "x" * MAX_TEXT_BYTES
    model = with_texts(
        tiny_llama("llama2"), tmp_path / "model", LICENSE_pdf=b"%PDF\0", README_md=long, NOTICE=b"caf\xe9"
    )
    result = pack(Pack(str(model), str(tmp_path / "m.goss")))
    assert result.left_out == ("LICENSE.pdf", "README.md")
    assert any("LICENSE.pdf, README.md; keep" in line for line in result.closing)
    found = Packed.open(tmp_path / "m.goss").provenance
    assert (found.license, found.texts) == ("llama3.2", {"NOTICE": "café"})


def test_a_damaged_record_of_stages_is_an_error(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    model = with_texts(tiny_llama("llama2"), tmp_path / "model")
    (model / "gossamer.json").write_text('{"lineage": [{"stage": "prune"}]}')
    for verb in (
        lambda: inspect(Inspect(str(model))),
        lambda: pack(Pack(str(model), str(tmp_path / "m.goss"))),
    ):
        with pytest.raises(CheckpointError, match="expected a stage and a parent for each step"):
            verb()
    assert not (tmp_path / "m.goss").exists()
