"""`--device`: layers pruned and rounded elsewhere come out as they do on the CPU, and memory is checked."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import another_device
from encoders import save_encoder
from gossamer import cli
from gossamer.compress import gptq, int4, pattern, sparsegpt, target
from gossamer.compress.plain_sweep import plain_sweep
from gossamer.errors import ConfigError
from gossamer.job.report import Event
from gossamer.layerwise import gpu, reconstruction
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tools import inspect as inspection

WAYS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "admm, trained": {"method": "admm"},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "magnitude": {"method": "magnitude", "sparsity": 0.7},
    "1x4": {"method": "sparsegpt", "pattern": "1x4", "sparsity": 0.6},
    "auto": {"method": "sparsegpt", "sparsity_profile": "auto"},
    "owl": {"method": "wanda", "sparsity_profile": "owl"},
    "rounded": {"method": "sparsegpt", "scheme": "W8A8"},
    "rounded, trained": {"method": "sparsegpt", "scheme": "W4A8", "rounded_epochs": 1},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A8, trained": {"scheme": "W4A8", "reconstruct_epochs": 1},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
}


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with another_device.another_device() as there:
        yield there


def few(text: Path, **options: Any) -> dict[str, Any]:
    rows = {"num_calibration_samples": 8, "max_seq_length": 48, "save_seconds": float("inf"), "threads": 1}
    return {"dataset": (str(text),)} | rows | options


@contextlib.contextmanager
def computing_as_elsewhere() -> Iterator[None]:
    """The CPU with the operations that another device has: torch's for the sweep, attention and training."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        for module in (gptq, int4, pattern, sparsegpt):
            patch.setattr(module, "fix_rows", _fix_rows)
        patch.setattr(reconstruction, "SPARSE_FROM", 2.0)
        yield


def _fix_rows(w_BN: Any, u_BB: Any, kept_BN: Any, scale_N: Any = None, largest: int = 127) -> Any:
    return plain_sweep(w_BN, u_BB, kept_BN, scale_N, largest)


def same(one: str, other: str) -> None:
    """Both directories hold the same bits."""
    ours, theirs = (load_file(Path(path) / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    different = [name for name, found in ours.items() if not torch.equal(found, theirs[name])]
    assert not different


def finds_the_same(stage: Any, here: Any, elsewhere: str) -> None:
    """Its result, and its directory."""
    there = replace(here, output_dir=f"{here.output_dir}-elsewhere", device=elsewhere)
    with computing_as_elsewhere():
        expected = stage(here)
    found = stage(there)
    assert replace(found, output_dir="", seconds=0.0) == replace(expected, output_dir="", seconds=0.0)
    same(here.output_dir, there.output_dir)


@pytest.mark.parametrize("way", WAYS)
def test_prune_finds_elsewhere_what_it_finds_here(
    way: str, elsewhere: str, tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    here = Prune(str(tiny_llama("bf16")), str(tmp_path / "here"), **few(text_file, **WAYS[way]))
    finds_the_same(prune, here, elsewhere)


@pytest.mark.parametrize("way", SCHEMES)
def test_quantize_finds_elsewhere_what_it_finds_here(
    way: str, elsewhere: str, tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    here = Quantize(str(tiny_llama("bf16")), str(tmp_path / "here"), **few(text_file, **SCHEMES[way]))
    finds_the_same(quantize, here, elsewhere)


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_encoders_too(name: str, elsewhere: str, tmp_path: Path) -> None:
    save_encoder(tmp_path / "model", name)
    text = tmp_path / "text.txt"
    text.write_text(" ".join([*"abcdefghijklmnopqrstuvwxyz"] * 40), encoding="utf-8")
    options = few(text, max_seq_length=24)
    here = Prune(str(tmp_path / "model"), str(tmp_path / "here"), **options)
    finds_the_same(prune, here, elsewhere)


def test_a_run_that_was_interrupted_goes_on_elsewhere(
    elsewhere: str, tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    options = few(text_file, save_seconds=0.0, device=elsewhere, method="sparsegpt")
    job = Prune(str(tiny_llama("bf16")), str(tmp_path / "out"), **options)
    whole = prune(replace(job, output_dir=str(tmp_path / "whole")))

    def interrupt(event: Event) -> None:
        if "layers.1." in event.message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(job, interrupt)
    with pytest.raises(ConfigError, match="device"):
        prune(replace(job, resume=True, device="cpu"))
    assert prune(replace(job, resume=True)).errors == whole.errors
    same(whole.output_dir, job.output_dir)


@pytest.mark.parametrize("stage", [prune, quantize])
def test_a_gpu_that_is_not_there_or_too_small_is_refused(
    stage: Any, tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = (Prune if stage is prune else Quantize)(
        str(tiny_llama("bf16")), str(tmp_path / "out"), **few(text_file, device="cuda:7")
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"--device cuda:7 is not there; found cpu, cuda:0, cuda:1 .*: give one of"
    ):
        stage(job)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 10**9))
    with pytest.raises(ConfigError, match=r"of its memory are needed \(hidden states .*, 0.10 MB are free"):
        stage(replace(job, device="cuda:1"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["prune", "quantize", "inspect"])
def test_no_memory_is_the_environments_failure(
    verb: str, tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(target, "moments", no_memory)
    monkeypatch.setattr(inspection, "_directory", no_memory)
    words = [verb, str(tiny_llama("bf16"))]
    if verb != "inspect":
        words += ["-o", str(tmp_path / "out"), "--dataset", str(text_file), "--max-seq-length", "32"]
    assert cli.call(words) == 1
    message = capsys.readouterr().err
    assert "the environment failed: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"num_calibration_samples": 256},
        {"num_calibration_samples": 256, "method": "sparsegpt"},
        {"num_calibration_samples": 8, "scheme": "W4A8", "rounded_epochs": 1},
        {"num_calibration_samples": 2, "max_seq_length": 4, "scheme": "W4A8", "rounded_epochs": 1},
        {"num_calibration_samples": 2, "max_seq_length": 4},
    ],
)
def test_memory_that_is_taken_is_what_was_said(
    options: dict[str, Any], elsewhere: str, tiny_llama: Callable[[str], Path], text_file: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said: list[int] = []

    def needed(*given: Any, **named: Any) -> dict[str, int]:
        parts = needed_bytes(*given, **named)
        said.append(sum(parts.values()))
        return parts

    needed_bytes = gpu.needed_bytes
    monkeypatch.setattr(gpu, "needed_bytes", needed)
    with another_device.most_bytes() as most:
        job = Prune(
            str(tiny_llama("bf16")), str(tmp_path / "out"), **few(text_file, device=elsewhere, **options)
        )
        prune(job)
    assert most() <= said[0] <= 2 * most()
