"""The child directory that the processes of one training run share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.checkpoint.directory import Checkpoint
from gossamer.stages.pretrain import Pretrain
from gossamer.training.whole_model import derive_in_first


def test_the_first_process_alone_writes_the_child(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the others, what stands in the partial directory stays as it is."""
    source, partial = Checkpoint.open(tiny_llama("llama2")), tmp_path / "child.partial"
    job = Pretrain(model=str(source.path), output_dir=str(tmp_path / "child"), dataset=("text",))
    partial.mkdir()
    (partial / "theirs").touch()
    monkeypatch.setenv("RANK", "1")
    with derive_in_first(source, job, "pretrain") as target:
        target.copy_rest()
    assert [path.name for path in tmp_path.iterdir()] == ["child.partial"] and (partial / "theirs").exists()
    monkeypatch.setenv("RANK", "0")
    with derive_in_first(source, job, "pretrain") as target:
        target.copy_rest()
    assert [path.name for path in tmp_path.iterdir()] == ["child"]
    assert Checkpoint.open(tmp_path / "child").hash == source.hash
