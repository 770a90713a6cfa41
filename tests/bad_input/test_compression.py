"""What `prune` and `quantize` refuse: damaged models, and options that mean nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bad_input.cases import (
    PRUNE,
    Case,
    Tiny,
    by_name,
    check_refused,
    edit_config,
    flip,
    make_sparse,
    nothing,
    rewrite,
    truncate,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def make_output(model: Path) -> None:
    (model.parent / "out").mkdir()
    (model.parent / "out" / "precious.txt").write_text("keep")


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def remove_shard(model: Path) -> None:
    (model / "model-00002-of-00004.safetensors").unlink()


def put(value: float) -> Callable[[Path], None]:
    return lambda model: rewrite(model, lambda tensors: tensors[Q_PROJ].__setitem__((3, 4), value))


def remove_tensor(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.__delitem__(Q_PROJ))


TABLE: list[Case] = [
    ("output exists", "llama2", make_output, PRUNE, ["out exists", "--overwrite"]),
    (
        "not a checkpoint",
        "llama2",
        lambda m: (m / "config.json").unlink(),
        PRUNE,
        ["without config.json", "Hugging Face"],
    ),
    (
        "unknown architecture",
        "llama2",
        lambda m: edit_config(m, architectures=["GPT2LMHeadModel"]),
        PRUNE,
        ["GPT2LMHeadModel", "supported: LlamaForCausalLM"],
    ),
    ("pickle weights", "llama2", remove_weights, PRUNE, ["pytorch_model.bin", "supported: safetensors"]),
    ("truncated", "llama2", lambda m: truncate(m / "model.safetensors"), PRUNE, ["model.safetensors"]),
    ("corrupt header", "llama2", lambda m: flip(m / "model.safetensors", 9), PRUNE, ["model.safetensors"]),
    ("shard missing", "sharded", remove_shard, PRUNE, ["model-00002-of-00004.safetensors", "missing"]),
    (
        "tensor missing",
        "llama2",
        remove_tensor,
        PRUNE,
        [Q_PROJ, "missing"],
    ),
    ("NaN", "llama2", put(float("nan")), PRUNE, ["model.safetensors", Q_PROJ, "NaN"]),
    ("infinite", "llama2", put(float("inf")), PRUNE, ["model.safetensors", Q_PROJ]),
    ("sparsity of 1", "llama2", nothing, [*PRUNE, "--sparsity", "1.0"], ["--sparsity is 1", "below 1"]),
    ("negative sparsity", "llama2", nothing, [*PRUNE, "--sparsity", "-0.1"], ["-0.1", "at least 0"]),
    (
        "a pattern of another sparsity",
        "llama2",
        nothing,
        [*PRUNE, "--sparsity", "0.7", "--pattern", "2:4"],
        ["2:4 fixes the sparsity at 0.5", "--sparsity is 0.7"],
    ),
    (
        "a pattern that widths do not divide by",
        "llama2",
        nothing,
        [*PRUNE, "--pattern", "32:64"],
        ["model.layers.0.self_attn.q_proj has 48 inputs", "--pattern 32:64"],
    ),
    (
        "a profile and a pattern",
        "llama2",
        nothing,
        [*PRUNE, "--pattern", "2:4", "--sparsity-profile", "auto"],
        ["--sparsity-profile auto", "--pattern 2:4", "leave out one"],
    ),
    ("no pattern", "llama2", nothing, [*PRUNE, "--pattern", "2-4"], ["--pattern is 2-4", "N:M"]),
    ("below the parent's", "llama2", make_sparse, [*PRUNE, "--sparsity", "0.3"], ["0.3", "0.5"]),
    (
        "fewer than no epochs of training through the rounding",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--reconstruct-epochs", "-1"],
        ["--reconstruct-epochs is -1", "expected 0 or more"],
    ),
    (
        "training through the rounding at no rate",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--reconstruct-epochs", "1", "--reconstruct-learning-rate", "0"],
        ["--reconstruct-learning-rate is 0", "a number above 0"],
    ),
    (
        "smoothing beyond 1",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--smoothing-strength", "1.5"],
        ["--smoothing-strength is 1.5", "auto or a number from 0 to 1"],
    ),
    (
        "quantizing by one row",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--num-calibration-samples", "1"],
        ["--num-calibration-samples is 1", "at least 2: an eighth of the rows"],
    ),
    (
        "a seed that nothing takes",
        "llama2",
        nothing,
        [*PRUNE, "--seed", f"{1 << 64}"],
        ["--seed is 18446744073709551616", "from 0 to 18446744073709551615"],
    ),
    (
        "a seed below zero",
        "llama2",
        nothing,
        ["quantize", *PRUNE[1:], "--seed", "-1"],
        ["--seed is -1", "from 0 to 18446744073709551615"],
    ),
    (
        "short calibration",
        "llama2",
        nothing,
        [*PRUNE, "--num-calibration-samples", "4000"],
        ["4000 samples", "128000 are needed"],
    ),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)
