"""The walk through a layer that `prune` and `quantize` share, and the tokens they calibrate on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gossamer.modules.decoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.calibration import calibration_ids
from gossamer.errors import CalibrationError
from gossamer.modules.decoder import blocks, embed
from gossamer.stages.prune import Prune
from gossamer.tokens.tokenizer import Tokenizer
from llamas import walk_through

TinyLlama = Callable[[str], Path]
IDS_BT = torch.arange(2, 302).view(6, 50)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("variant", ["llama2", "llama3", "linear"])
def test_walk_sees_the_inputs_and_makes_the_outputs_of_transformers(
    variant: str, kept_bytes: int, tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossamer.modules.decoder, "PIECE_TOKENS", 100)
    monkeypatch.setattr(gossamer.modules.decoder, "KEPT_BYTES", kept_bytes)
    source = Checkpoint.open(tiny_llama(variant))
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    given: dict[str, Tensor] = {}
    for name in source.linears:
        keep_input(model.get_submodule(name), name, given)
    with torch.no_grad():
        states = model(IDS_BT, output_hidden_states=True).hidden_states
    hidden_BTD = embed(source, IDS_BT)
    for block in blocks(source):
        for group, inputs in block.walk(hidden_BTD):
            found = torch.cat(list(inputs))
            for name in group:
                torch.testing.assert_close(found, given[name], rtol=1e-4, atol=1e-5)
        if block.index == 0:
            torch.testing.assert_close(hidden_BTD, states[1], rtol=1e-4, atol=1e-5)


def keep_input(linear: nn.Module, name: str, given: dict[str, Tensor]) -> None:
    linear.register_forward_pre_hook(lambda _, inputs: given.__setitem__(name, inputs[0]))


def test_a_changed_group_counts_for_the_later_ones(tiny_llama: TinyLlama) -> None:
    """With v_proj zeroed on the way, o_proj sees zeros and the layer does what it does without attention."""
    source = Checkpoint.open(tiny_llama("llama2"))
    block, other = next(blocks(source)), next(blocks(source))
    other.layer.self_attn.v_proj.weight.data.zero_()
    hidden_BTD = embed(source, IDS_BT)
    expected = walk_through(other, hidden_BTD.clone())
    for index, (_, inputs) in enumerate(block.walk(hidden_BTD)):
        if index == 0:
            block.layer.self_attn.v_proj.weight.data.zero_()
        if index == 1:
            assert not torch.cat(list(inputs)).any()
    torch.testing.assert_close(hidden_BTD, expected, rtol=1e-4, atol=1e-5)


def test_calibration_rows_begin_with_bos_and_fit_the_context(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama("llama2"))
    job = Prune(str(source.path), str(tmp_path), dataset=(str(text_file),), num_calibration_samples=3)
    ids_BT = calibration_ids(source, job)
    assert ids_BT.shape == (3, source.architecture.max_position_embeddings)
    tokenizer = Tokenizer.open(source.path)
    assert (ids_BT[:, 0] == tokenizer.bos_id).all()
    head = tokenizer.encode(text_file.read_text(encoding="utf-8"))[: ids_BT.numel()]
    assert ids_BT[0].tolist() == head[: ids_BT.shape[1]]


def test_calibration_takes_the_head_and_says_how_much_is_missing(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    source, texts = Checkpoint.open(tiny_llama("llama2")), ["def f(x):\n    return x\n", "import os\n" * 9]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    names = (f"{tmp_path / 'a.txt'}@2",)
    job = Prune("in", "out", dataset=names, num_calibration_samples=2, max_seq_length=8)
    tokenizer = Tokenizer.open(source.path)
    head = [tokenizer.bos_id, *tokenizer.encode(texts[0].strip("\n"), bos=False)]
    head += [tokenizer.bos_id, *tokenizer.encode(texts[1].strip("\n"), bos=False)]
    ids_BT = calibration_ids(source, job)
    assert ids_BT.shape == (2, 8) and ids_BT.dtype == torch.int64
    assert ids_BT[0].tolist() == head[:8] and ids_BT[1].tolist() == [tokenizer.bos_id, *head[9:16]]
    more = replace(job, num_calibration_samples=50, max_seq_length=100)
    with pytest.raises(CalibrationError, match=r"holds \d+ tokens, 5000 are needed \(50 samples of 100\)"):
        calibration_ids(source, more)


def test_calibration_from_several_sources_mixes_them(tiny_llama: TinyLlama) -> None:
    source, names = Checkpoint.open(tiny_llama("llama2")), ("python:stdlib@0.5", "python:doctests@0.5")
    job = Prune("in", "out", dataset=names, num_calibration_samples=64, max_seq_length=256)
    text = Tokenizer.open(source.path).decode(calibration_ids(source, job).flatten().tolist())
    assert ">>> " in text and "return " in text
