"""The encoder in one call: transformers' numbers at every level; company and threads change no bit."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import round_to_int8, save_encoder
from gossamer import _native
from gossamer.compress.int8 import fake_quantize_tokens
from gossamer.errors import ConfigError, EngineError, FormatError
from gossamer.packed.reader import Packed
from gossamer.stages.pack import Pack, pack
from packed.make_files import FILES

LEVELS = [level for level, runs in _native.levels().items() if runs]
LENGTHS = (1, 2, 14, 255, 256, 257, 300, 512, 7, 1)
SIZES = {"max_position_embeddings": 514, "hidden_size": 72, "intermediate_size": 200}
MODERN_SIZES = SIZES | {"max_position_embeddings": 800}
MODERN_LENGTHS = (1, 2, 14, 255, 257, 300, 700, 7, 1)
# Of the largest hidden state; AMX multiplies float32 as two bfloat16 (native/kernels/x86/floats.cpp).
TOLERANCE = 1e-5
STATES = """
import sys
import numpy as np
from gossamer import _native
from gossamer.packed.reader import Packed

packed, texts = Packed.open(sys.argv[1]), np.load(sys.argv[2])
arguments = packed.buffer, packed.native_tensors(), packed.native_encoder_config()
encoders = [_native.Encoder(*arguments, threads) for threads in (1, 2)]
ids, types, lengths = (texts[name] for name in ("ids", "types", "lengths"))
one, two = (encoder.hidden_states(ids, types, lengths) for encoder in encoders)
np.testing.assert_array_equal(one, two)
for begin, length in zip(np.cumsum(lengths) - lengths, lengths):
    own = slice(begin, begin + length)
    for encoder in encoders:
        alone = encoder.hidden_states(ids[own], types[own], np.array([length], np.int32))
        np.testing.assert_array_equal(alone, one[own])
np.save(sys.argv[3], one)
"""


def make_texts(path: Path, lengths: tuple[int, ...] = LENGTHS, num_types: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 40, sum(lengths)).astype(np.int32)
    texts = {"ids": ids, "types": ids % num_types, "lengths": np.array(lengths, np.int32)}
    np.savez(path, **texts)
    return texts


def states(packed: Packed, texts: Path, level: str) -> np.ndarray:
    """Hidden states at a level; the program compares those of one and two threads, and of texts alone."""
    output = texts.with_name(f"{level}.npy")
    environment = os.environ | {"GOSSAMER_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [str(packed.path), str(texts), str(output)]
    subprocess.run([sys.executable, "-c", STATES, *arguments], env=environment, check=True)
    return np.load(output)


def packed_as(directory: Path, storage: str = "auto") -> Packed:
    pack(Pack(str(directory), f"{directory}.goss", storage=storage))  # pyright: ignore[reportArgumentType]
    return Packed.open(f"{directory}.goss")


def expected(model: Any, texts: Mapping[str, np.ndarray]) -> np.ndarray:
    """transformers' hidden states [tokens, D], text by text."""
    found, begin = [], 0
    for length in texts["lengths"]:
        ids, types = (torch.tensor(texts[name][begin : begin + length])[None] for name in ("ids", "types"))
        more = {"token_type_ids": types} if hasattr(model.config, "type_vocab_size") else {}
        with torch.no_grad():
            found.append(model(input_ids=ids, **more).last_hidden_state[0].numpy())
        begin += length
    return np.concatenate(found)


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
@pytest.mark.parametrize("level", LEVELS)
def test_floats_are_those_of_transformers(name: str, level: str, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", name, **SIZES)
    texts = make_texts(tmp_path / "texts.npz")
    found_TD, expected_TD = (
        states(packed_as(tmp_path / "model"), tmp_path / "texts.npz", level),
        expected(model, texts),
    )
    assert np.abs(found_TD - expected_TD).max() <= TOLERANCE * np.abs(expected_TD).max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {f"{name}_bias": True for name in ("norm", "attention", "mlp")},
        {"local_attention": 513, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
    ],
)
def test_modernberts_floats_are_those_of_transformers(
    switches: dict[str, Any], level: str, tmp_path: Path
) -> None:
    """Windows of 11 tokens, and of 513 that reach into a third chunk of positions; ropes of two bases."""
    model = save_encoder(tmp_path / "model", "ModernBertModel", **MODERN_SIZES, **switches)
    texts = make_texts(tmp_path / "texts.npz", MODERN_LENGTHS, 1)
    found_TD = states(packed_as(tmp_path / "model"), tmp_path / "texts.npz", level)
    expected_TD = expected(model, texts)
    assert np.abs(found_TD - expected_TD).max() <= TOLERANCE * np.abs(expected_TD).max()


def test_modernberts_int8_has_the_same_bits_at_every_level_and_is_near_torch(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "ModernBertModel", **MODERN_SIZES)
    make_texts(tmp_path / "texts.npz", MODERN_LENGTHS[:6], 1)
    packed = packed_as(round_to_int8(tmp_path / "model"), "smallest")
    first, *others = (states(packed, tmp_path / "texts.npz", level) for level in LEVELS)
    for other in others:
        np.testing.assert_array_equal(first, other)
    expected_TD = expected(model, np.load(tmp_path / "texts.npz"))
    cosine_T = (first * expected_TD).sum(1) / (
        np.linalg.norm(first, axis=1) * np.linalg.norm(expected_TD, axis=1)
    )
    assert cosine_T.min() > 0.99


@pytest.mark.parametrize(("sparsity", "together"), [(0.0, 1), (0.7, 1), (0.7, 4)])
def test_int8_has_the_same_bits_at_every_level_and_torch_s_numbers(
    sparsity: float, together: int, tmp_path: Path
) -> None:
    """Where floats differ in their last bit, inputs round otherwise; in texts of few tokens none does."""
    model = save_encoder(
        tmp_path / "model", hidden_size=72 * 4, intermediate_size=400, max_position_embeddings=514
    )
    packed = packed_as(round_to_int8(tmp_path / "model", sparsity, together), "smallest")
    assert len({matrix.storage for name, matrix in packed.matrices.items() if "encoder" in name}) == 1
    texts = make_texts(tmp_path / "texts.npz", LENGTHS[:6])
    found = [states(packed, tmp_path / "texts.npz", level) for level in LEVELS]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    for name, module in model.named_modules():
        if name in packed.matrices:
            module.weight.data = torch.tensor(packed.linear(name))
            if "encoder" in name:
                module.register_forward_pre_hook(lambda _, inputs: fake_quantize_tokens(inputs[0]))
    expected_TD = expected(model, texts)
    error_T = np.linalg.norm(found[0] - expected_TD, axis=1) / np.linalg.norm(expected_TD, axis=1)
    assert error_T[: sum(LENGTHS[:2])].max() <= 1e-6 and np.median(error_T) <= 0.03


@pytest.fixture(scope="module")
def bert() -> Packed:
    return Packed.open(FILES / "v6-bert-floats.goss")


def native(packed: Packed, **config: Any) -> _native.Encoder:
    found = packed.native_encoder_config() | config
    return _native.Encoder(packed.buffer, packed.native_tensors(), found, 2)


def test_vectors_of_texts_are_those_of_their_hidden_states(bert: Packed) -> None:
    lengths = np.array([3, 1, 32, 32, 7] * 9, np.int32)  # more than one pass
    ids = np.random.default_rng(0).integers(0, 101, lengths.sum()).astype(np.int32)
    encoder, types = native(bert), ids % 2
    texts = np.split(encoder.hidden_states(ids, types, lengths), np.cumsum(lengths)[:-1])
    for pooling, expected_ND in (
        ("mean", [h_TD.mean(axis=0, dtype=np.float64) for h_TD in texts]),
        ("max", [h_TD.max(axis=0) for h_TD in texts]),
        ("cls", [h_TD[0] for h_TD in texts]),
    ):
        found_ND = encoder.encode(ids, types, lengths, pooling)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(found_ND, expected_ND, rtol=0, atol=1e-6)
    assert encoder.encode(ids[:0], types[:0], lengths[:0], "mean").shape == (0, 24)


@pytest.mark.parametrize(
    ("ids", "types", "lengths", "message"),
    [
        ([101], [0], [1], "token id 101; expected 0 .. 100"),
        ([-1], [0], [1], "token id -1"),
        ([5], [2], [1], "token type 2; expected 0 .. 1"),
        ([5], [0], [0], "a text's length 0; expected 1 .. 32"),
        ([5] * 33, [0] * 33, [33], "a text's length 33; expected 1 .. 32"),
        ([5, 6], [0, 0], [1], "found 2 ids and 2 types; the texts' lengths make 1"),
        ([5, 6], [0], [2], "found 2 ids and 1 types"),
        ([5], [0], [-1, 2], "a text's length -1"),
    ],
)
def test_texts_that_do_not_fit_are_errors(
    ids: list[int], types: list[int], lengths: list[int], message: str, bert: Packed
) -> None:
    arrays = [np.array(numbers, np.int32) for numbers in (ids, types, lengths)]
    with pytest.raises(EngineError, match=message):
        native(bert).hidden_states(*arrays)
    with pytest.raises(EngineError, match=message):
        native(bert).encode(*arrays, "mean")


def test_an_unknown_pooling_is_an_error(bert: Packed) -> None:
    one = np.array([1], np.int32)
    with pytest.raises(ConfigError, match="found the pooling 'last'; expected mean, max or cls"):
        native(bert).encode(one, one * 0, one, "last")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 0}, "the size 0"),
        ({"head_dim": 1 << 23}, "more than 2"),
        ({"head_dim": 4}, "query: found 24 x 24; expected 12 x 24"),
        ({"num_positions": 33}, "embeddings.position_embeddings.weight: found F32"),
        ({"num_types": 3}, "embeddings.token_type_embeddings.weight: found F32"),
        ({"first_position": 32}, "the first position has row 32; expected 0 .. 31"),
        ({"first_position": -1}, "row -1"),
        ({"norm_eps": float("nan")}, "norm_eps must be finite"),
        ({"norm": "embeddings"}, "no tensor embeddings.weight"),
        ({"embedding": "encoder.layer.0.attention.self.value"}, "found 24 x 24; expected 101 x 24"),
        ({"blocks": []}, "has no blocks"),
        ({"blocks": 1}, "blocks is not a list"),
        ({"positions": 1}, "positions is not text"),
    ],
)
def test_a_config_that_does_not_fit_the_file_is_an_error(
    config: dict[str, Any], message: str, bert: Packed
) -> None:
    with pytest.raises(FormatError, match=message):
        native(bert, **config)


def test_a_block_without_a_role_or_with_another_is_an_error(bert: Packed) -> None:
    [first, *others] = bert.native_encoder_config()["blocks"]
    linears = first["linears"]
    for changed, message in (
        ({role: name for role, name in linears.items() if role != "down"}, "block 0: a linear is missing"),
        (linears | {"gate": linears["up"]}, "block 0: found role gate; expected q, k, v, o, up and down"),
    ):
        with pytest.raises(FormatError, match=message):
            native(bert, blocks=[first | {"linears": changed}, *others])


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    directory = tmp_path_factory.mktemp("modern") / "model"
    save_encoder(directory, "ModernBertModel")
    return packed_as(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ropes": []}, "block 0: found a window or a rope that is none"),
        ({"ropes": 1}, "ropes is not a list"),
        ({"ropes": [{"inverse_frequencies": np.ones(2, np.float32), "scale": 1.0}] * 2}, "for each pair"),
        ({"ropes": [{"inverse_frequencies": np.full(3, np.nan, np.float32), "scale": 1.0}] * 2}, "for each"),
        ({"ropes": [{"inverse_frequencies": np.ones(3, np.float32), "scale": float("inf")}] * 2}, "for each"),
        ({"ropes": [{"scale": 1.0}] * 2}, "a rope of the model's config lacks inverse_frequencies"),
        ({"norm_bias": True}, "no tensor embeddings.norm.bias"),
        ({"norm_first": 1}, "norm_first is not True or False"),
        ({"gated": False}, "block 0: found role gate; expected q, k, v, o, up and down"),
        ({"final_norm": "layers.0.mlp.Wo"}, "layers.0.mlp.Wo.weight: found F32"),
    ],
)
def test_a_config_that_does_not_fit_a_modernbert_is_an_error(
    config: dict[str, Any], message: str, modern: Packed
) -> None:
    with pytest.raises(FormatError, match=message):
        native(modern, **config)


@pytest.mark.parametrize("change", [{"window": -1}, {"window": 4}, {"rope": 2}, {"rope": -2}])
def test_a_window_or_a_rope_that_is_none_is_an_error(change: dict[str, int], modern: Packed) -> None:
    first, second, *others = modern.native_encoder_config()["blocks"]
    with pytest.raises(FormatError, match="block 1: found a window or a rope that is none"):
        native(modern, blocks=[first, second | change, *others])


def test_memory_grows_with_the_longest_text(tmp_path: Path) -> None:
    """A configuration may promise texts longer than any memory holds."""
    save_encoder(tmp_path / "model", "ModernBertModel", max_position_embeddings=1 << 23)
    encoder, texts = native(packed_as(tmp_path / "model")), make_texts(tmp_path / "texts.npz", (3, 600, 3), 1)
    found_TD = encoder.hidden_states(texts["ids"], texts["types"], texts["lengths"])
    assert found_TD.shape == (606, 24) and np.isfinite(found_TD).all()


def test_words_that_are_not_dense_are_an_error(bert: Packed) -> None:
    """A square matrix stored by its zeros in place of the words, which are looked up row by row."""
    name = next(name for name, matrix in bert.matrices.items() if matrix.storage == "sparse")
    matrix = bert.matrices[name]
    config = {"embedding": name, "vocab_size": matrix.rows, "hidden_size": matrix.columns}
    with pytest.raises(FormatError, match=f"{name}: expected dense storage"):
        native(bert, **config)
