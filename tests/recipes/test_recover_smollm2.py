"""The recipe by which a real chat model was pruned and trained, on a tiny one."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from gossamer.checkpoint.directory import Checkpoint
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.whole_model import load_model

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A program of recipes/ as a module."""
    monkeypatch.syspath_prepend(str(RECIPES))
    yield lambda name: __import__(name)
    for name in ("write_text", "recover_smollm2"):
        sys.modules.pop(name, None)


def test_what_writes_computes_as_transformers_does(
    tiny_llama: Callable[[str], Path], recipe: Callable[[str], ModuleType]
) -> None:
    model = load_model(Checkpoint.open(tiny_llama("llama2")))
    ids_BT = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids_BT).logits
    writer = recipe("write_text").Writer(model, 3, 20, "cpu")
    torch.testing.assert_close(writer.logits(ids_BT), expected, rtol=1e-4, atol=1e-4)


def test_rows_begin_as_given_and_go_on_as_the_model_says(
    tiny_llama: Callable[[str], Path], recipe: Callable[[str], ModuleType]
) -> None:
    model = load_model(Checkpoint.open(tiny_llama("llama2")))
    starts, length = [[0], [0, 5, 9, 200]], 140  # beyond one window
    rows_BT = recipe("write_text").Writer(model, 2, length, "cpu", 1e-4).write(starts)
    for row_T, start in zip(rows_BT, starts, strict=True):
        assert row_T[: len(start)].tolist() == start
        with torch.no_grad():
            likeliest_T = model(torch.from_numpy(row_T[None].astype(np.int64))).logits[0].argmax(-1)
        agreeing = likeliest_T[len(start) - 1 : -1].numpy() == row_T[len(start) :]
        assert agreeing.mean() > 0.95  # sampled at next to no temperature; a tie may fall either way


def test_a_pruned_model_is_trained_on_both_kinds_of_text(
    tiny_llama: Callable[[str], Path],
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, dense = recipe("recover_smollm2"), tiny_llama("llama2")
    monkeypatch.setattr(module, "ROW_LENGTH", 16)
    monkeypatch.setattr("gossamer.training.trainer.choose_precision", lambda wanted, device: "f32")
    chance = np.random.default_rng(0)
    for name, lowest, width in (("written", 2, 17), ("natural", 200, 16)):
        rows_ST = chance.integers(lowest, lowest + 100, (5, width)).astype(np.int32)
        rows_ST[:, 0] = ~np.int32(0)
        np.save(tmp_path / f"{name}.npy", rows_ST)
    tokenizer = Tokenizer.open(dense)
    assert tokenizer.adds_bos
    rows = module._mixed(tmp_path, 16 * 16, tokenizer)
    assert len(rows) == 16
    assert (rows.marked_ids_ST[:, 0] == ~tokenizer.required_bos()).all()
    assert (rows.marked_ids_ST[:, 1] < 102).sum() == 12  # three quarters are the model's own
    options = Namespace(output_dir=tmp_path, model=dense, dataset=["text"], batch_tokens=64)
    module._train(options, module._training("dense:256:1e-3:both"))
    trained = Checkpoint.open(tmp_path / "trained-dense-256-1e-3-both")
    assert trained.hash != Checkpoint.open(dense).hash
    log = (tmp_path / "trained-dense-256-1e-3-both" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in log]
    assert len(steps) == 4
    assert steps[0]["kl"] < 1e-6  # at first it says what its teacher says
