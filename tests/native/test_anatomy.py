"""What a decoder may be made of: biases, norms of queries and keys, no rope, windows; against NumPy.

Models are written into memory by hand, with names of no family, so that nothing but the config tells the
engine what a tensor is for.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import FormatError
from gossamer.packed import panels, streams
from gossamer.packed.rounding import round_rows
from native.conftest import aligned

Kv = Literal["f32", "bf16", "i8"]
D, F, V, EPS = 40, 56, 67, 1e-5  # hidden size, width of the feed-forward network, vocabulary
A, G, E = 6, 2, 12  # query heads, key/value heads, head width
SHAPES = {
    "q": (A * E, D), "k": (G * E, D), "v": (G * E, D), "o": (D, A * E),
    "gate": (F, D), "up": (F, D), "down": (D, F),
}  # fmt: skip
BLOCKS: list[dict[str, Any]] = [
    {"biases": list(SHAPES), "head_norms": True, "rope": True, "window": 0},
    {"biases": ["q", "k", "v"], "head_norms": False, "rope": False, "window": 7},
    {"biases": [], "head_norms": True, "rope": False, "window": 0},
    {"biases": ["o", "down"], "head_norms": False, "rope": True, "window": 19},
]
IDS = np.random.default_rng(7).integers(0, V, 40).astype(np.int32)
LONG = np.random.default_rng(8).integers(0, V, 700).astype(np.int32)
SCALE = 1.25  # of cosines and sines
INVERSE = (100.0 ** -(np.arange(0, E, 2) / E)).astype(np.float32)


@dataclass(frozen=True)
class Model:
    """The arguments of `_native.Model`, and the float32 weights under the same names."""

    buffer: np.ndarray
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    config: dict[str, Any]
    weights: dict[str, np.ndarray]

    def open(self, num_threads: int = 1, kv: Kv = "f32", **changes: Any) -> _native.Model:
        return _native.Model(self.buffer, self.tensors, self.config | changes, num_threads, kv)


def make_model(values: str, storage: str) -> Model:
    """Four blocks with everything that BLOCKS says; `values` (f32 or i8) and `storage` of their linears."""
    rng = np.random.default_rng(3)
    weights: dict[str, np.ndarray] = {}
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    table: dict[str, dict[str, Any]] = {}

    def vector(name: str, length: int, center: float) -> str:
        weights[name] = (center + 0.3 * rng.standard_normal(length)).astype(np.float32)
        arrays[name] = ("F32", np.pad(weights[name], (0, -length % 16)))
        return name

    def matrix(name: str, shape: tuple[int, int], values: str, storage: str) -> str:
        w_NK = (rng.standard_normal(shape) / np.sqrt(shape[1] / 2)).astype(np.float32)
        w_NK[rng.random(shape) < 0.5] = 0
        weights[name], pad = w_NK, (0, -shape[0] % 16)
        if values == "i8":
            w_NK, scale_N = round_rows(w_NK)
            arrays[f"{name}.weight_scale"] = ("F32", np.pad(scale_N, pad))
            arrays[f"{name}.weight_sum"] = ("I32", np.pad(w_NK.sum(axis=1, dtype=np.int32), pad))
        if storage == "sparse":
            stream, offsets = streams.encode(values, w_NK)
            arrays[f"{name}.weight.stream"] = ("U8", stream)
            arrays[f"{name}.weight.offsets"] = ("U64", offsets)
        else:
            dtype = "I8" if values == "i8" else "F32"
            arrays[f"{name}.weight"] = (dtype, panels.to_panels(values, w_NK))
        table[name] = {"storage": storage, "values": values, "rows": shape[0], "columns": shape[1]}
        return name

    def block(index: int, anatomy: dict[str, Any]) -> dict[str, Any]:
        name, head_norms = f"part.{index}", anatomy["head_norms"]
        return {
            "linears": {
                role: matrix(f"{name}.{role}", shape, values, storage) for role, shape in SHAPES.items()
            },
            "biases": {
                role: vector(f"{name}.{role}.add", SHAPES[role][0], 0.0) for role in anatomy["biases"]
            },
            "attention_norm": vector(f"{name}.first", D, 1.0),
            "feed_forward_norm": vector(f"{name}.second", D, 1.0),
            "query_norm": vector(f"{name}.query", E, 1.0) if head_norms else "",
            "key_norm": vector(f"{name}.key", E, 1.0) if head_norms else "",
            "rope": anatomy["rope"],
            "window": anatomy["window"],
        }

    config = {
        "hidden_size": D, "vocab_size": V, "num_heads": A, "num_kv_heads": G, "head_dim": E,
        "intermediate_size": F, "norm_eps": EPS, "inverse_frequencies": INVERSE,
        "rotary_scale": SCALE,
        "embedding": matrix("words", (V, D), "f32", "dense"), "final_norm": vector("last", D, 1.0),
        "head": "words", "blocks": [block(index, anatomy) for index, anatomy in enumerate(BLOCKS)],
        "linears": table,
    }  # fmt: skip
    tensors, position = {}, 0
    for name, (dtype, array) in arrays.items():
        tensors[name] = (dtype, array.shape, position, array.nbytes)
        position += array.nbytes + -array.nbytes % 64
    buffer = aligned(position)
    for name, (_, array) in arrays.items():
        begin = tensors[name][2]
        buffer[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    return Model(buffer, tensors, config, weights)


def reference(model: Model, ids_T: np.ndarray) -> np.ndarray:
    """Logits [T, V] in float64, straight from the config."""
    weights, config = model.weights, model.config
    x_TD = weights[config["embedding"]][ids_T].astype(np.float64)
    for block in config["blocks"]:
        hidden_TD = rmsnorm(x_TD, weights[block["attention_norm"]])
        q_TAE, k_TGE, v_TGE = (
            linear(model, block, role, hidden_TD).reshape(len(ids_T), -1, E) for role in ("q", "k", "v")
        )
        if block["query_norm"]:
            q_TAE = rmsnorm(q_TAE, weights[block["query_norm"]])
            k_TGE = rmsnorm(k_TGE, weights[block["key_norm"]])
        if block["rope"]:
            q_TAE, k_TGE = rotate(q_TAE), rotate(k_TGE)
        x_TD = x_TD + linear(model, block, "o", attention(q_TAE, k_TGE, v_TGE, block["window"]))
        hidden_TD = rmsnorm(x_TD, weights[block["feed_forward_norm"]])
        gate_TF, up_TF = (linear(model, block, role, hidden_TD) for role in ("gate", "up"))
        x_TD = x_TD + linear(model, block, "down", gate_TF / (1 + np.exp(-gate_TF)) * up_TF)
    return rmsnorm(x_TD, weights[config["final_norm"]]) @ weights[config["head"]].T


def linear(model: Model, block: dict[str, Any], role: str, x_TK: np.ndarray) -> np.ndarray:
    y_TN = x_TK @ model.weights[block["linears"][role]].T
    return y_TN + model.weights[block["biases"][role]] if role in block["biases"] else y_TN


def rmsnorm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Over the last axis: of hidden states, or of each head."""
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPS) * weight


def rotate(x_THE: np.ndarray) -> np.ndarray:
    angles_T1E = np.outer(np.arange(len(x_THE)), INVERSE)[:, None]
    cosine, sine = SCALE * np.cos(angles_T1E), SCALE * np.sin(angles_T1E)
    a, b = np.split(x_THE, 2, axis=2)
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=2)


def attention(q_TAE: np.ndarray, k_TGE: np.ndarray, v_TGE: np.ndarray, window: int) -> np.ndarray:
    """Every token sees itself and all before it, or the last `window` of these."""
    T = len(q_TAE)
    seen_TT = np.tri(T, dtype=bool) & ~np.tri(T, k=-(window or T), dtype=bool)
    k_TAE, v_TAE = (x.repeat(A // G, axis=1) for x in (k_TGE, v_TGE))
    scores_ATT = np.einsum("tae,sae->ats", q_TAE, k_TAE) / np.sqrt(E)
    scores_ATT = np.where(seen_TT, scores_ATT, -np.inf)
    weights_ATT = np.exp(scores_ATT - scores_ATT.max(axis=2, keepdims=True))
    weights_ATT /= weights_ATT.sum(axis=2, keepdims=True)
    return np.einsum("ats,sae->tae", weights_ATT, v_TAE).reshape(T, A * E)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model("f32", "dense")


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_every_ability_equals_numpy(storage: str) -> None:
    model = make_model("f32", storage)
    native = model.open(2)
    found_TV = native.forward([native.new_sequence(IDS.size)], [IDS], True)
    expected_TV = reference(model, IDS)
    assert np.abs(found_TV - expected_TV).max() <= 1e-4 * np.abs(expected_TV).max()


@pytest.mark.parametrize("name", ["biases", "query_norm", "key_norm", "rope", "window"])
def test_every_ability_changes_the_logits(model: Model, name: str) -> None:
    """Without one of them, in all blocks at once, logits are others: the comparison with NumPy sees each."""
    without = {"biases": {}, "query_norm": "", "key_norm": "", "rope": False, "window": 0}[name]
    blocks = [block | {name: without} for block in model.config["blocks"]]
    with_it, without_it = model.open(), model.open(blocks=blocks)
    found = [native.forward([native.new_sequence(40)], [IDS]) for native in (with_it, without_it)]
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize(("values", "storage"), [("f32", "dense"), ("f32", "sparse"), ("i8", "sparse")])
def test_a_prompt_at_once_equals_it_token_by_token(values: str, storage: str) -> None:
    model = make_model(values, storage)
    found = []
    for num_threads in (1, 2, 3):
        native = model.open(num_threads)
        found.append(native.forward([native.new_sequence(IDS.size)], [IDS], True))
        sequence = native.new_sequence(IDS.size)
        found.append(np.concatenate([native.forward([sequence], [IDS[t : t + 1]]) for t in range(IDS.size)]))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_a_step_counts_the_bytes_of_biases_and_head_norms(model: Model) -> None:
    blocks = [block | {"biases": {}, "query_norm": "", "key_norm": ""} for block in model.config["blocks"]]
    num_floats = sum(
        model.weights[name].size + -model.weights[name].size % 16
        for block in model.config["blocks"]
        for name in block["biases"].values()
    )
    difference = model.open().bytes_per_step - model.open(blocks=blocks).bytes_per_step
    assert difference == 4 * (num_floats + 2 * 2 * E)


def with_windows(model: Model, *windows: int) -> list[dict[str, Any]]:
    blocks = zip(model.config["blocks"], windows, strict=True)
    return [block | {"window": window} for block, window in blocks]


def pieces_of(ids: np.ndarray, native: _native.Model, *lengths: int) -> np.ndarray:
    """Logits of all ids, given to the model in pieces of these lengths."""
    sequence = native.new_sequence(ids.size)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    return np.concatenate([native.forward([sequence], [piece], True) for piece in pieces])


def test_windows_over_several_chunks_of_the_cache_equal_numpy(model: Model) -> None:
    """Windows that begin in any chunk of 256 positions; 700 tokens are three passes through the layers."""
    for windows in ((300, 0, 5, 256), (1, 600, 257, 255)):
        blocks = with_windows(model, *windows)
        changed = replace(model, config=model.config | {"blocks": blocks})
        expected_TV = reference(changed, LONG)
        found_TV = pieces_of(LONG, changed.open(2), LONG.size)
        assert np.abs(found_TV - expected_TV).max() <= 1e-4 * np.abs(expected_TV).max()


@pytest.mark.parametrize("kv", ["f32", "bf16", "i8"])
def test_windows_give_the_same_bits_however_the_tokens_come(model: Model, kv: Kv) -> None:
    """At once, in pieces, token by token, beside another sequence; with any number of threads."""
    blocks = with_windows(model, 300, 0, 5, 256)
    expected = pieces_of(LONG, model.open(1, kv, blocks=blocks), LONG.size)
    for num_threads in (1, 2, 3):
        native = model.open(num_threads, kv, blocks=blocks)
        by_token = [250, *[1] * 14, 38, *[1] * 4, 206, *[1] * 8, 160, *[1] * 20]
        for lengths in (by_token, [299, 2, 255, 1, 1, 142]):
            np.testing.assert_array_equal(pieces_of(LONG, native, *lengths), expected)
        one, other = native.new_sequence(700), native.new_sequence(700)
        native.forward([other, one], [LONG[::-1][:390], LONG[:555]])
        together = native.forward([other, one], [LONG[:3], LONG[555:560]], True)
        np.testing.assert_array_equal(together[3:], expected[555:560])
        np.testing.assert_array_equal(
            native.forward([one, other], [LONG[560:561], IDS[:1]])[0], expected[560]
        )


def test_windows_that_hold_the_whole_sequence_change_no_bit(model: Model) -> None:
    expected = pieces_of(LONG, model.open(2, blocks=with_windows(model, 0, 0, 0, 0)), 697, 1, 2)
    native = model.open(2, blocks=with_windows(model, 700, 701, 2**31 - 1, 2**30))
    np.testing.assert_array_equal(pieces_of(LONG, native, 697, 1, 2), expected)


def test_attention_is_timed_over_the_windows(model: Model) -> None:
    """Bytes are those of the positions that a token sees: of 500, in four blocks."""
    sizes = []
    for windows in ((0, 0, 0, 0), (300, 0, 5, 1000)):
        num_bytes, seconds = model.open(2, blocks=with_windows(model, *windows)).time_attention(500, 2)
        sizes.append(num_bytes)
        assert len(seconds) == 2 and min(seconds) > 0
    position = 2 * 4 * G * E
    assert sizes == [256 * position * 2000, 256 * position * 1305]


def changed(model: Model, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    config = copy.deepcopy(model.config)
    change(config)
    return config


@pytest.mark.parametrize("value", [None, "?", -1, 0, 1.5, True, 1 << 40, [], {}, b"x"])
def test_fields_of_a_wrong_type_or_missing_are_refused(model: Model, value: Any) -> None:
    """Every field of the config and of a block, its own type aside."""
    for name, found in model.config.items():
        if type(value) is not type(found) or name == "blocks":
            refused(model, changed(model, lambda config, name=name: config.update({name: value})))
    for name, found in model.config["blocks"][0].items():
        if type(value) is not type(found):
            refused(
                model, changed(model, lambda config, name=name: config["blocks"][0].update({name: value}))
            )
    for name in model.config:
        refused(model, changed(model, lambda config, name=name: config.pop(name)))
    for name in model.config["blocks"][0]:
        refused(model, changed(model, lambda config, name=name: config["blocks"][0].pop(name)))


@pytest.mark.parametrize(
    "change",
    [
        {"linears": {}},
        {"linears": {role: f"part.0.{role}" for role in SHAPES} | {"gate": "nothing"}},
        {"linears": {role: f"part.0.{role}" for role in SHAPES} | {"gate": "part.0.down"}},
        {"linears": {role: f"part.0.{role}" for role in SHAPES} | {"gate": 3}},
        {"linears": {role: f"part.0.{role}" for role in SHAPES} | {"other": "part.0.gate"}},
        {"linears": {role: f"part.0.{role}" for role in SHAPES} | {3: "part.0.gate"}},
        {"biases": {"q": "nothing"}},
        {"biases": {"q": "part.0.k.add"}},
        {"biases": {"q": "part.0.q.weight"}},
        {"biases": {"other": "part.0.q.add"}},
        {"biases": {"q": None}},
        {"attention_norm": ""},
        {"attention_norm": "part.0.query"},
        {"feed_forward_norm": "words.weight"},
        {"query_norm": "part.0.first"},
        {"key_norm": "nothing"},
        {"window": -1},
    ],
    ids=str,
)
def test_a_block_that_contradicts_the_file_is_refused(model: Model, change: dict[str, Any]) -> None:
    refused(model, changed(model, lambda config: config["blocks"][0].update(change)))


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": []},
        {"blocks": [None]},
        {"head": "part.0.q"},
        {"embedding": "nothing"},
        {"embedding": "part.0.gate"},
        {"final_norm": "part.0.query"},
        {"norm_eps": float("nan")},
        {"norm_eps": -1.0},
        {"head_dim": 2**20, "num_heads": 2**20},
        {"num_kv_heads": 4},
        {"inverse_frequencies": INVERSE.astype(np.float64)},
        {"inverse_frequencies": INVERSE[:3]},
        {"inverse_frequencies": np.full(E // 2, np.inf, np.float32)},
        {"rotary_scale": float("inf")},
        {"rotary_scale": 1},
        {"linears": {"words": {"storage": "dense", "values": "f32", "rows": V}}},
        {"linears": {"words": {"storage": 1, "values": "f32", "rows": V, "columns": D}}},
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_file_is_refused(model: Model, change: dict[str, Any]) -> None:
    refused(model, model.config | change)


@pytest.mark.parametrize("name", ["part.0.q.add", "part.0.query", "part.0.key"])
def test_biases_and_head_norms_must_be_finite(model: Model, name: str) -> None:
    buffer = aligned(model.buffer.size)
    buffer[:] = model.buffer
    begin = model.tensors[name][2]
    buffer[begin : begin + 4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    with pytest.raises(FormatError, match=name):
        _native.Model(buffer, model.tensors, model.config, 1)


@pytest.mark.parametrize(
    "entry", [None, (), ("F32", (48,), 0), ("F32", (48,), -64, 192), ("F32", 48, 0, 192)]
)
def test_a_table_of_tensors_of_wrong_types_is_refused(model: Model, entry: Any) -> None:
    with pytest.raises(FormatError, match="last"):
        _native.Model(model.buffer, model.tensors | {"last": entry}, model.config, 1)


def refused(model: Model, config: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        _native.Model(model.buffer, model.tensors, config, 1)
