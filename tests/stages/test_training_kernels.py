"""The verbs that train, with either kernel: same losses, same zeros, and a record of what ran."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.job.report import Event, quiet
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training import kernel_choice, preparation
from gossamer.training.history import TrainingResult
from pruned import copy_with_zeros

Llamas = Callable[[str], Path]


@pytest.fixture
def sparse(tiny_llama: Llamas, tmp_path: Path) -> Path:
    """The tiny Llama with 70% of its decoder's weights zero."""
    return copy_with_zeros(tiny_llama("llama3"), tmp_path / "sparse", 0.3)


@pytest.fixture
def run(sparse: Path, tiny_llama: Llamas, tmp_path: Path) -> Callable[..., TrainingResult]:
    """run(verb, name, ...): a short training beside a dense teacher, into tmp_path / name."""
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    pairs = [{"prompt": f"{a} + 1 = ", "completion": f"{a + 1}"} for a in range(30)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))

    def run(verb: str, name: str, progress: Any = quiet, **options: Any) -> TrainingResult:
        settings: dict[str, Any] = {
            "model": str(sparse),
            "output_dir": str(tmp_path / name),
            "teacher": str(tiny_llama("llama3")),
            "batch_tokens": 256,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "precision": "f32",
            **options,
        }
        if verb == "pretrain":
            text = (str(tmp_path / "text.txt"),)
            return pretrain(Pretrain(dataset=text, num_tokens=2500, max_length=32, **settings), progress)
        return finetune(Finetune(dataset=(str(tmp_path / "pairs.jsonl"),), **settings), progress)

    return run


def metrics(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "gossamer.json").read_text())["metrics"]


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_both_kernels_train_the_same_model(
    verb: str, run: Callable[..., TrainingResult], sparse: Path, tmp_path: Path
) -> None:
    """Losses within 1e-4 and weights within 1e-3 of each other; gradients and moments much smaller."""
    dense = run(verb, "dense", kernel="dense")
    found = run(verb, "found", kernel="sparse")
    assert len(found.losses) >= 3 and found.losses[-1] != found.losses[0]
    np.testing.assert_allclose(found.losses, dense.losses, atol=1e-4)
    before, ours, theirs = map(Checkpoint.open, (sparse, tmp_path / "found", tmp_path / "dense"))
    for name in ours.names:
        np.testing.assert_allclose(ours.float32(name), theirs.float32(name), atol=1e-3)
        if "_proj" in name:
            np.testing.assert_array_equal(ours.zeros(name), before.zeros(name))
    figures = metrics(tmp_path / "found"), metrics(tmp_path / "dense")
    assert [figure["kernel"] for figure in figures] == ["sparse", "dense"]
    live = sum(
        int((~ours.zeros(name)).sum()) if "_proj" in name else ours.raw(name).size for name in ours.names
    )
    assert figures[0]["optimizer_gradient_bytes"] == 12 * live
    assert figures[1]["optimizer_gradient_bytes"] == 12 * sum(ours.raw(name).size for name in ours.names)


def test_auto_measures_says_and_records(
    run: Callable[..., TrainingResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for times, taken, ratio in [((0.3, 0.1), "sparse", 3.0), ((0.1, 0.2), "dense", 0.5)]:
        monkeypatch.setattr(kernel_choice, "_seconds", lambda *args, times=times: times)
        events: list[Event] = []
        run("pretrain", f"out-{taken}", events.append)
        said = [event.message for event in events if event.message.startswith("kernel ")]
        assert len(said) == 1 and said[0].startswith(f"kernel {taken}: ") and "70% sparsity" in said[0]
        figures = metrics(tmp_path / f"out-{taken}")
        assert (figures["kernel"], figures["kernel_ratio"]) == (taken, ratio)


def test_sparse_kernel_of_a_dense_model_is_an_error(
    run: Callable[..., TrainingResult], tiny_llama: Llamas, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--kernel sparse: found no zeros"):
        run("pretrain", "out", model=str(tiny_llama("llama3")), kernel="sparse")
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_found_before_the_first_step(
    run: Callable[..., TrainingResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "available_bytes", lambda device: 500_000)
    events: list[Event] = []
    advice = "--activation-checkpointing keeps .*; --kernel sparse needs .*; free memory"
    with pytest.raises(ConfigError, match=rf"needs about .* found 0\.5 MB available: {advice}"):
        run("pretrain", "out", events.append, kernel="dense")
    assert not any(event.message == "training" for event in events)
    assert not (tmp_path / "out").exists()
