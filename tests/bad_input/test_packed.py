"""Damaged .goss files, what the engine and `publish` refuse, and words that no command line has."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_input.cases import (
    PRUNE,
    Case,
    Tiny,
    by_name,
    check_refused,
    flip,
    make_sparse,
    nothing,
    truncate,
    workplace,
)
from gossamer import cli
from gossamer.engine import LLM
from gossamer.errors import ConfigError
from gossamer.stages.pack import Pack, pack


def packed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        make_sparse(model)
        pack(Pack(str(model), str(model.parent / "model.goss")))
        change(model.parent / "model.goss")

    return make


def newer(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"version":"1"', b'"version":"7"', 1))


TABLE: list[Case] = [
    (".goss truncated", "llama2", packed(truncate), ["run", "{goss}", "hi"], ["model.goss"]),
    (
        ".goss header flipped",
        "llama2",
        packed(lambda f: flip(f, 20)),
        ["run", "{goss}", "hi"],
        ["model.goss"],
    ),
    (".goss of a newer version", "llama2", packed(newer), ["run", "{goss}", "hi"], ["version", "7"]),
    (
        "a batch of none",
        "llama2",
        packed(nothing),
        ["serve", "{goss}", "--max-batch", "0"],
        ["max_batch is 0", "at least 1"],
    ),
    (
        "a repository without its organization",
        "llama2",
        nothing,
        ["publish", "{model}", "name"],
        ["'name' is no repository of the hub", "org/name"],
    ),
    (
        "publishing offline",
        "llama2",
        nothing,
        ["publish", "{model}", "org/name"],
        ["HF_HUB_OFFLINE is set", "--dry-run"],
    ),
    ("no .goss", "llama2", nothing, ["run", "{goss}", "hi"], ["model.goss"]),
    (
        "unknown flag",
        "llama2",
        nothing,
        [*PRUNE, "--sparcity", "0.5"],
        ["--sparcity", "did you mean --sparsity"],
    ),
    ("unknown verb", "llama2", nothing, ["prun", "{model}"], ["did you mean prune"]),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)


@pytest.mark.parametrize("max_batch", [0, -3, 1.5, "many"])
def test_a_batch_that_is_no_number_of_requests_is_refused(
    max_batch: Any, tiny_llama: Tiny, tmp_path: Path
) -> None:
    places = workplace(tiny_llama, "llama2", tmp_path)
    packed(nothing)(places["model"])
    with pytest.raises(ConfigError, match=f"max_batch is {max_batch!r}"):
        LLM(places["goss"], max_batch=max_batch)


@pytest.mark.parametrize("seed", range(2000 if os.environ.get("GOSSAMER_TORTURE") else 40))
def test_a_flipped_packed_file_never_crashes(
    seed: int, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any byte of header, masks, offsets or values: an error of ours, or a file that still runs."""
    places = workplace(tiny_llama, "llama2", tmp_path)
    packed(nothing)(places["model"])
    generator = np.random.default_rng(seed)
    for _ in range(3):
        flip(
            places["goss"],
            int(generator.integers(places["goss"].stat().st_size)),
            int(generator.integers(1, 256)),
        )
    code = cli.call(["run", str(places["goss"]), "hi", "--max-tokens", "2"])
    assert code in (0, 2), capsys.readouterr().err
