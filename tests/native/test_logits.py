"""The float engine against transformers: logits to 1e-4 relative, 200 greedy tokens identical."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from gossamer import _native
from gossamer.checkpoint.directory import Checkpoint
from gossamer.packed.from_checkpoint import pack_checkpoint
from gossamer.packed.reader import Packed

PROMPT_AND_TOKEN = """
import sys
import numpy as np
from gossamer import _native
from gossamer.packed.reader import Packed

packed = Packed.open(sys.argv[1])
model = _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), 2)
ids_T = np.arange(37, dtype=np.int32)
found = [model.forward([model.new_sequence(37)], [ids], True) for ids in (ids_T, ids_T[:1])]
np.savez(sys.argv[2], isa=_native.isa(), prompt=found[0], token=found[1])
"""
VARIANTS = ("llama2", "llama3", "linear", "sharded", "bf16", "fp16")
SHARED = ("stories260k", "stories3m")


def compare(directory: Path, path: Path) -> None:
    pack_checkpoint(Checkpoint.open(directory), path)
    packed = Packed.open(path)
    model = _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), 2)
    theirs = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs.eval()
    ids_T = np.random.default_rng(0).integers(0, packed.architecture.vocab_size, 300)
    with torch.inference_mode():
        expected_TV = theirs(torch.from_numpy(ids_T[None])).logits[0].numpy()
    found_TV = model.forward([model.new_sequence(300)], [ids_T.astype(np.int32)], True)
    assert np.abs(found_TV - expected_TV).max() <= 1e-4 * np.abs(expected_TV).max()
    assert greedy(model, 1, 200) == theirs_greedy(theirs, 1, 200)


def greedy(model: _native.Model, first: int, count: int) -> list[int]:
    sequence, ids = model.new_sequence(count), [first]
    for _ in range(count):
        ids.append(int(model.forward([sequence], [np.array(ids[-1:], np.int32)]).argmax()))
    return ids


def theirs_greedy(model: LlamaForCausalLM, first: int, count: int) -> list[int]:
    ids, cache = [first], None
    with torch.inference_mode():
        for _ in range(count):
            output = model(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True)
            ids.append(int(output.logits[0, -1].argmax()))
            cache = output.past_key_values
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_llamas_equal_transformers(
    variant: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    compare(tiny_llama(variant), tmp_path / "model.goss")


@pytest.mark.parametrize("name", SHARED)
def test_trained_models_equal_transformers(name: str, shared_data: Path, tmp_path: Path) -> None:
    compare(shared_data / "models" / name, tmp_path / "model.goss")


@pytest.mark.skipif(not _native.levels()["avx512-bf16"], reason="no avx512-bf16 here")
def test_rounded_inputs_are_asked_for_and_near(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    """Prompts of bfloat16 weights as avx512 has them to 2%, and not to the bit; a single token to the bit."""
    pack_checkpoint(Checkpoint.open(tiny_llama("bf16")), tmp_path / "model.goss")
    found = {}
    for isa in ("avx512", "avx512-bf16"):
        arguments = [str(tmp_path / "model.goss"), str(tmp_path / f"{isa}.npz")]
        environment = os.environ | {"GOSSAMER_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", PROMPT_AND_TOKEN, *arguments], env=environment, check=True)
        found[isa] = np.load(arguments[1])
        assert found[isa]["isa"] == isa
    exact, rounded = found["avx512"], found["avx512-bf16"]
    np.testing.assert_array_equal(rounded["token"], exact["token"])
    difference = np.abs(rounded["prompt"] - exact["prompt"]).max() / np.abs(exact["prompt"]).max()
    assert 1e-4 < difference < 2e-2
