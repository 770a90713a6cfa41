"""The decoder in one call: int8 against NumPy on every level; batches, passes and threads change nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import EngineError, FormatError
from gossamer.packed.reader import Packed
from native.reference import Reference

KVS = ("f32", "bf16", "i8")
NUM_PROMPT, NUM_GREEDY = 40, 60
GREEDY = """
import sys
import numpy as np
from gossamer import _native
from gossamer.packed.reader import Packed

packed = Packed.open(sys.argv[1])
model = _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), 2, sys.argv[5])
sequence, ids, rows = model.new_sequence(256), np.load(sys.argv[2]).astype(np.int32), []
rows.append(model.forward([sequence], [ids], True))
for _ in range(int(sys.argv[4])):
    rows.append(model.forward([sequence], [rows[-1][-1:].argmax(axis=1).astype(np.int32)]))
np.save(sys.argv[3], np.concatenate(rows))
"""


def open_model(packed: Packed, num_threads: int = 1, kv: str = "f32") -> _native.Model:
    return _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), num_threads, kv)


def prompt(length: int = NUM_PROMPT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 331, length).astype(np.int32)


@pytest.mark.parametrize("kv", KVS)
def test_int8_equals_numpy_and_itself_on_every_level(int8_model: Packed, tmp_path: Path, kv: str) -> None:
    np.save(tmp_path / "ids.npy", prompt())
    found = []
    for isa in ("scalar", "avx512"):
        output = tmp_path / f"{isa}.npy"
        arguments = [str(int8_model.path), str(tmp_path / "ids.npy"), str(output), str(NUM_GREEDY), kv]
        environment = os.environ | {"GOSSAMER_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", GREEDY, *arguments], env=environment, check=True)
        found.append(np.load(output))
    np.testing.assert_array_equal(found[0], found[1])
    greedy = found[0][NUM_PROMPT - 1 : -1].argmax(axis=1)
    expected = Reference(int8_model, kv).logits(np.concatenate([prompt(), greedy]))
    assert np.abs(found[0] - expected).max() <= 1e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(
        expected[NUM_PROMPT - 1 :].argmax(axis=1), found[0][NUM_PROMPT - 1 :].argmax(axis=1)
    )


@pytest.mark.parametrize("kv", KVS)
def test_passes_batches_and_threads_give_the_same_bits(int8_model: Packed, kv: str) -> None:
    """One prompt crosses a chunk of positions; its second half comes as single tokens."""
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 300, 9, 33))]
    model = open_model(int8_model, 1, kv)
    alone = []
    for ids in prompts:
        sequence, rows = model.new_sequence(300), []
        halves = np.array_split(ids, 2)
        for piece in [halves[0], *np.array_split(halves[1], halves[1].size)] if ids.size > 1 else [ids]:
            rows += [model.forward([sequence], [piece], True)] if piece.size else []
        alone.append(np.concatenate(rows))
    for num_threads in (1, 2, 3):
        model = open_model(int8_model, num_threads, kv)
        sequences = [model.new_sequence(301) for _ in prompts]
        last = model.forward(sequences, prompts)
        np.testing.assert_array_equal(last, [rows[-1] for rows in alone])
        for sequence in sequences:
            sequence.truncate(0)
        np.testing.assert_array_equal(model.forward(sequences, prompts, True), np.concatenate(alone))


@pytest.mark.parametrize("kv", KVS)
def test_a_truncated_sequence_goes_on_as_if_never_longer(int8_model: Packed, kv: str) -> None:
    model = open_model(int8_model, 1, kv)
    sequence, other = model.new_sequence(64), model.new_sequence(20)
    model.forward([sequence], [prompt(30)])
    sequence.truncate(11)
    assert (sequence.length, sequence.capacity) == (11, 64)
    model.forward([other], [prompt(30)[:11]])
    np.testing.assert_array_equal(
        model.forward([sequence], [prompt(5, 1)]), model.forward([other], [prompt(5, 1)])
    )


def test_requests_that_do_not_fit_change_nothing(int8_model: Packed) -> None:
    model, other = open_model(int8_model), open_model(int8_model)
    sequence, stranger = model.new_sequence(8), other.new_sequence(8)
    bad = [
        ([sequence], [prompt(9)]),
        ([sequence], [np.array([331], np.int32)]),
        ([sequence], [np.array([-1], np.int32)]),
        ([sequence], [prompt(0)]),
        ([sequence, sequence], [prompt(1), prompt(1)]),
        ([stranger], [prompt(1)]),
        ([sequence], []),
        ([], []),
    ]
    for sequences, ids in bad:
        with pytest.raises(EngineError):
            model.forward(sequences, ids)
    with pytest.raises(EngineError):
        sequence.truncate(1)
    with pytest.raises(EngineError):
        model.new_sequence(0)
    assert sequence.length == 0


def test_a_config_that_contradicts_the_matrices_is_refused(int8_model: Packed) -> None:
    config = int8_model.native_config()
    block = config["blocks"][0]
    linears = {role: name.replace(".0.", ".3.") for role, name in block["linears"].items()}
    for change in (
        {"hidden_size": 80},
        {"num_heads": 5},
        {"vocab_size": 330},
        {"blocks": [*config["blocks"], block | {"linears": linears}]},
        {"head_dim": 0},
    ):
        with pytest.raises(FormatError):
            _native.Model(int8_model.buffer, int8_model.native_tensors(), config | change, 1)


def test_bytes_of_a_step_are_those_of_the_file(int8_model: Packed) -> None:
    """All matrices but the embedding, a row of that, and the norms; less slack and padding."""
    step = open_model(int8_model).bytes_per_step
    matrices = sum(
        int8_model.matrix_bytes(name) for name in int8_model.matrices if name != "model.embed_tokens"
    )
    assert 0.9 * matrices < step <= matrices + 8 * 96 * 4
    assert len(open_model(int8_model, 2).time_linears(3)) == 3


@pytest.mark.parametrize(("kv", "bits"), [("f32", 32), ("bf16", 16), ("i8", 8 + 32 / 20)])
def test_attention_is_timed_over_more_than_caches_hold(int8_model: Packed, kv: str, bits: float) -> None:
    """As many sequences as a pass takes, at most; 3 layers, 2 heads of 20 keys and values."""
    num_bytes, seconds = open_model(int8_model, 2, kv).time_attention(700, 2)
    sequence = 700 * 3 * 2 * 2 * 20 * bits / 8
    assert num_bytes % sequence == 0 and num_bytes == min(num_bytes // sequence, 256) * sequence
    assert num_bytes >= min(256 << 20, 256 * sequence) and len(seconds) == 2 and min(seconds) > 0
