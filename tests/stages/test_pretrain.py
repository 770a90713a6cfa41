"""`pretrain`: directory to directory, zeros kept; nothing is left behind when it fails."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data import packing
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.report import Event, quiet
from gossamer.stages import pretrain as pretrain_module
from gossamer.stages.pretrain import Pretrain, pretrain

Llamas = Callable[[str], Path]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return str(file)


def job(model: Path, output: Path, text: str, **changes: object) -> Pretrain:
    settings = {
        "dataset": (text,),
        "num_tokens": 1500,
        "max_length": 32,
        "batch_tokens": 256,
        "learning_rate": 3e-3,
        "precision": "f32",
    }
    return Pretrain(str(model), str(output), **(settings | changes))  # pyright: ignore


def sparse_copy(model: Path, output: Path, sparsity: float = 0.5) -> Path:
    """The directory with the smallest weights of each decoder linear set to zero."""
    shutil.copytree(model, output)
    tensors = load_file(output / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            threshold = weight.float().abs().flatten().kthvalue(int(sparsity * weight.numel())).values
            tensors[name] = torch.where(weight.float().abs() <= threshold, 0, weight)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


@pytest.mark.parametrize("variant", ["llama3", "bf16"])
def test_sparse_model_learns_and_keeps_its_zeros(
    tiny_llama: Llamas, tmp_path: Path, text: str, variant: str
) -> None:
    parent = sparse_copy(tiny_llama(variant), tmp_path / "sparse")
    events: list[Event] = []
    result = pretrain(job(parent, tmp_path / "out", text), events.append)

    before, after = Checkpoint.open(parent), Checkpoint.open(tmp_path / "out")
    for name in before.linears:
        zeros_NK = before.zeros(f"{name}.weight")
        assert zeros_NK.mean() == pytest.approx(0.5, abs=0.01)
        assert not after.float32(f"{name}.weight")[zeros_NK].any()
        assert not np.array_equal(before.float32(f"{name}.weight"), after.float32(f"{name}.weight"))
    assert [after.dtype(name) for name in after.names] == [before.dtype(name) for name in before.names]
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert (result.num_tokens, result.num_steps) == (47 * 32, 6)
    assert result.loss_last < result.loss_first == pytest.approx(np.mean(result.losses[:3]), abs=1e-4)
    assert events[-1].done == events[-1].total == 6

    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["stage"] == "pretrain"
    assert manifest["metrics"]["num_tokens"] == 47 * 32
    assert manifest["metrics"]["loss_last"] == result.loss_last
    assert manifest["num_threads"] == torch.get_num_threads()
    assert manifest["data"][0]["source"] == text


def test_dense_model_trains_the_same_twice(tiny_llama: Llamas, tmp_path: Path, text: str) -> None:
    parent = tiny_llama("llama2")
    for output in ("first", "second"):
        pretrain(job(parent, tmp_path / output, text, num_tokens=600))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = job(parent, tmp_path / "third", text, num_tokens=600, seed=1)
    assert pretrain(other).losses != pretrain(job(parent, tmp_path / "fourth", text, num_tokens=600)).losses


def test_the_source_that_ends_a_mixture_is_named_with_its_tokens(
    tiny_llama: Llamas, tmp_path: Path, text: str
) -> None:
    (tmp_path / "small.txt").write_text("def f(x):\n    return x\n" * 20)
    sources = (f"{text}@0.9", f"{tmp_path}/small.txt@0.1")
    events: list[Event] = []
    pretrain(
        job(tiny_llama("llama2"), tmp_path / "out", text, dataset=sources, num_tokens=10**6), events.append
    )
    [said] = [event.message for event in events if "used up" in event.message]
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    own, total = manifest["data"][1]["num_tokens"], manifest["metrics"]["num_tokens"]
    assert said.startswith(
        f"{tmp_path}/small.txt is used up after {own:,} tokens and ends the mixture at {total:,}, "
    )
    assert said.endswith(
        "fewer than --num-tokens 1,000,000: training on those (--repeat goes on, and begins sources again)"
    )


def test_teacher_adds_its_loss(tiny_llama: Llamas, tmp_path: Path, text: str) -> None:
    parent = sparse_copy(tiny_llama("llama3"), tmp_path / "sparse")
    alone = pretrain(job(parent, tmp_path / "alone", text, num_tokens=256))
    taught = pretrain(
        job(parent, tmp_path / "taught", text, num_tokens=256, teacher=str(tiny_llama("llama3")))
    )
    assert taught.losses[0] > alone.losses[0] + 0.01


def test_a_loss_that_is_not_finite_leaves_the_rows_alone(
    tiny_llama: Llamas, tmp_path: Path, text: str
) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match="lower --learning-rate"):
        pretrain(job(tiny_llama("llama2"), tmp_path / "work" / "out", text, learning_rate=1e18), quiet)
    left = [str(path.relative_to(tmp_path / "work")) for path in (tmp_path / "work").rglob("*.*")]
    assert sorted(left) == ["out.partial.rows", "out.partial.rows/rows.i32", "out.partial.rows/rows.json"]


@pytest.mark.parametrize(
    ("change", "num_processes", "message"),
    [
        ({"batch_tokens": 8 * 32}, "3", "8 rows of 32 tokens, which 3 processes cannot share"),
        ({"parallel": "fsdp"}, "1", "--parallel fsdp found one process"),
        ({"kernel": "sparse"}, "1", "--kernel sparse: found no zeros"),
        ({"kernel": "sparse", "parallel": "fsdp"}, "2", "kernel sparse: found weights sharded by FSDP"),
        ({"teacher_cache": "text.txt"}, "1", "--teacher-cache is .*text.txt, a file"),
        ({"teacher_cache": "."}, "1", r"--teacher-cache .* holds something else \(text.txt\)"),
    ],
)
def test_what_needs_no_rows_is_refused_before_they_are_packed(
    tiny_llama: Llamas,
    tmp_path: Path,
    text: str,
    change: dict[str, str],
    num_processes: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several processes too, which need not be joined for it."""
    model = tiny_llama("llama2")
    if "teacher_cache" in change:
        change = {"teacher_cache": str(tmp_path / change["teacher_cache"]), "teacher": str(model)}
    monkeypatch.setenv("WORLD_SIZE", num_processes)
    monkeypatch.setattr(pretrain_module, "pack_once", None)
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        inspect.unwrap(pretrain)(job(model, tmp_path / "out", text, **change))
    assert not (tmp_path / "out.partial").exists()


def test_several_gpus_of_one_process_are_refused_before_the_rows_are_packed(
    tiny_llama: Llamas, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pretrain_module, "pack_once", None)
    with pytest.raises(UnsupportedError, match="found 2 GPUs and one process"):
        pretrain(job(tiny_llama("llama2"), tmp_path / "out", text))


@pytest.mark.parametrize(
    ("free", "change", "message"),
    [
        (
            6000,
            {},
            r"packing 1,504 tokens needs 0\.01 MB \(4 bytes a token\), 0\.01 MB are free: .*--num-tokens",
        ),
        (6100, {}, None),
        (
            290_000,
            {"teacher_cache": "cache"},
            r"packing .* and what the teacher makes of 1,504 tokens needs 0\.29 MB \(192 bytes a token\), "
            r"0\.29 MB are free",
        ),
    ],
)
def test_a_disk_without_room_for_rows_or_cache_is_told_before_they_are_packed(
    tiny_llama: Llamas,
    tmp_path: Path,
    text: str,
    free: int,
    change: dict[str, str],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows and cache lie on one disk, and count together."""
    model = tiny_llama("llama2")
    if change:
        change = {"teacher_cache": str(tmp_path / "cache"), "teacher": str(model)}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    if message is None:
        pretrain(job(model, tmp_path / "out", text, **change))
        return
    monkeypatch.setattr(packing, "pack", None)
    with pytest.raises(OSError, match=message):
        pretrain(job(model, tmp_path / "out", text, **change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "--num-tokens 0"),
        ({"batch_tokens": 0}, "--batch-tokens 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"warmup_ratio": 1.5}, r"--warmup-ratio 1\.5"),
    ],
)
def test_bad_options(
    tiny_llama: Llamas, tmp_path: Path, text: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(job(tiny_llama("llama2"), tmp_path / "out", text, **change))
    assert not (tmp_path / "out").exists()
