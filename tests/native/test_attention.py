"""Attention and RoPE on every level against NumPy in float64, over the keys and values as they are stored."""

import itertools

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import ConfigError, EngineError
from native.reference import cached

ISAS = tuple(level for level, runs in _native.levels().items() if runs)
ROWS = [row for row in _native.kernels() if row["family"] == "attention" and row["isa"] in ISAS]
KVS = ("f32", "bf16", "i8")
NO_WINDOW = 1 << 30
WINDOWS = (1, 2, 15, 16, 17, 63, 64, 100, 255, 256, 257, 300, 512, 513)
TEXTS = (1, 2, 5, 15, 16, 17, 24, 63, 100, 255, 256, 257, 300, 512, 513)
POSITIONS = (1, 2, 3, 5, 15, 16, 17, 31, 63, 100, 255, 256, 257, 511, 700)
cell = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['values']}-{row['isa']}")


def draw(
    tokens: int, heads: int, positions: int, width: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values with some scores far above the rest."""
    rng = np.random.default_rng(seed)
    q_TAE = 3 * rng.standard_normal((tokens, heads, width)).astype(np.float32)
    k_SE, v_SE = rng.standard_normal((2, positions, width)).astype(np.float32)
    return q_TAE, k_SE * rng.uniform(0.1, 2, (positions, 1)).astype(np.float32), v_SE


def attention(
    q_TAE: np.ndarray, k_SE: np.ndarray, v_SE: np.ndarray, window: int = NO_WINDOW, causal: bool = True
) -> np.ndarray:
    """softmax(q k^T / sqrt(E)) v in float64, every token seeing `window` positions up to its own, or all.

    Where it is not causal, it is in the middle of an odd window.
    """
    T, S = len(q_TAE), len(k_SE)
    scores_TAS = q_TAE.astype(np.float64) @ k_SE.T.astype(np.float64) / np.sqrt(q_TAE.shape[2])
    own_T11 = np.arange(S - T, S)[:, None, None]
    behind = 0 if causal else window // 2
    seen_T1S = (np.arange(S) <= own_T11 + behind) & (np.arange(S) > own_T11 + behind - window)
    scores_TAS = np.where(seen_T1S, scores_TAS, -np.inf)
    weights_TAS = np.exp(scores_TAS - scores_TAS.max(axis=2, keepdims=True))
    return (weights_TAS @ v_SE / weights_TAS.sum(axis=2, keepdims=True)).reshape(-1, q_TAE.shape[2])


def bound(q_TAE: np.ndarray, k_SE: np.ndarray, v_SE: np.ndarray) -> float:
    """What rounding queries and weights to 16 bits may change: half a step in every factor."""
    score = np.abs(q_TAE).max() / np.sqrt(len(k_SE[0])) / 65278 * np.abs(k_SE).sum(axis=1).max()
    return 1e-5 + (score + np.sqrt(len(v_SE)) / 65278) * np.abs(v_SE).max()


def check(
    row: dict[str, str],
    q_TAE: np.ndarray,
    k_SE: np.ndarray,
    v_SE: np.ndarray,
    window: int = NO_WINDOW,
    causal: bool = True,
) -> np.ndarray:
    found = _native.attention(row["isa"], row["values"], q_TAE, k_SE, v_SE, window, causal=causal)
    (k, k_scale), (v, v_scale) = cached(k_SE, row["values"]), cached(v_SE, row["values"])
    expected = attention(
        q_TAE, k.astype(np.float64) * k_scale, v.astype(np.float64) * v_scale, window, causal
    )
    unit = 3e-4 if row["isa"] == "amx" else 1e-5  # tiles: see below
    atol = unit if row["values"] != "i8" else bound(q_TAE, k_SE, v_SE)
    np.testing.assert_allclose(found, expected, rtol=unit, atol=atol)
    return found


@cell
@pytest.mark.parametrize("width", [2, 6, 16, 20, 64, 80, 128])
def test_one_token_equals_numpy(row: dict[str, str], width: int) -> None:
    for heads, positions in itertools.product((1, 4, 7), POSITIONS):
        check(row, *draw(1, heads, positions, width))


@cell
@pytest.mark.parametrize("tokens", [2, 3, 5, 24, 300])
def test_new_tokens_see_what_came_before_them(row: dict[str, str], tokens: int) -> None:
    for heads, before, width in ((1, 0, 16), (3, 1, 20), (1, 250, 64), (2, 300, 6)):
        check(row, *draw(tokens, heads, before + tokens, width))


@cell
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_hides_what_lies_before_it(row: dict[str, str], window: int) -> None:
    for tokens, heads, before, width in ((1, 3, 0, 16), (1, 4, 700, 20), (24, 2, 500, 6), (530, 1, 11, 16)):
        q_TAE, k_SE, v_SE = draw(tokens, heads, before + tokens, width)
        found = check(row, q_TAE, k_SE, v_SE, window)
        hidden = max(0, before + 1 - window)  # from all of the tokens
        k_SE[:hidden], v_SE[:hidden] = 1000, -1000
        again = _native.attention(row["isa"], row["values"], q_TAE, k_SE, v_SE, window)
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_window_that_holds_everything_changes_no_bit(isa: str, kv: str) -> None:
    for tokens, positions in ((1, 300), (300, 300), (24, 700)):
        arrays = draw(tokens, 2, positions, 20)
        expected = _native.attention(isa, kv, *arrays)
        for window in (positions, positions + 1, NO_WINDOW):
            np.testing.assert_array_equal(_native.attention(isa, kv, *arrays, window), expected)
        assert not np.array_equal(_native.attention(isa, kv, *arrays, positions - 1), expected)


@cell
@pytest.mark.parametrize("tokens", TEXTS)
def test_tokens_of_a_text_see_all_of_it(row: dict[str, str], tokens: int) -> None:
    for heads, before, width in ((1, 0, 64), (3, 0, 20), (1, 7, 32)):
        arrays = draw(tokens, heads, before + tokens, width)
        found = check(row, *arrays, causal=False)
        differs = tokens > 1  # from what they see of what came before them
        assert differs != np.array_equal(found, _native.attention(row["isa"], row["values"], *arrays))


@cell
@pytest.mark.parametrize("half", [0, 1, 7, 8, 64, 128, 255, 256, 300])
def test_a_token_of_a_text_is_in_the_middle_of_its_window(row: dict[str, str], half: int) -> None:
    for tokens, before, width in ((1, 0, 16), (24, 0, 20), (300, 0, 16), (530, 260, 6)):
        q_TAE, k_SE, v_SE = draw(tokens, 1, before + tokens, width)
        found = check(row, q_TAE, k_SE, v_SE, 2 * half + 1, causal=False)
        hidden = max(0, before - half)  # from all of the tokens
        k_SE[:hidden], v_SE[:hidden] = 1000, -1000
        again = _native.attention(row["isa"], row["values"], q_TAE, k_SE, v_SE, 2 * half + 1, causal=False)
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("isa", ISAS)
def test_a_window_around_every_token_that_holds_everything_changes_no_bit(isa: str) -> None:
    arrays = draw(300, 2, 300, 20)
    expected = _native.attention(isa, "f32", *arrays, causal=False)
    found = _native.attention(isa, "f32", *arrays, 599, causal=False)
    np.testing.assert_array_equal(found, expected)
    narrow = _native.attention(isa, "f32", *arrays, 595, causal=False)
    assert not np.array_equal(narrow, expected)


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("tokens", TEXTS)
def test_a_token_of_a_text_gets_the_bits_of_a_last_token(tokens: int, kv: str) -> None:
    """On every level, by itself or with any others, in one piece or by chunks."""
    q_TAE, k_SE, v_SE = draw(tokens, 2, tokens, 20)
    last = [_native.attention("scalar", kv, q_TAE[t : t + 1], k_SE, v_SE) for t in range(tokens)]
    for isa in ISAS:
        found = _native.attention(isa, kv, q_TAE, k_SE, v_SE, causal=False)
        np.testing.assert_array_equal(found, np.concatenate(last))
        for first, end in ((0, 1), (tokens // 3, tokens // 3 + 24), (tokens - 1, tokens)):
            some = _native.attention(isa, kv, q_TAE[first:end], k_SE, v_SE, causal=False)
            np.testing.assert_array_equal(some, found[2 * first : 2 * end])
        apart = _native.attention(isa, kv, q_TAE[:1], k_SE, v_SE, split=True, causal=False)
        np.testing.assert_array_equal(apart, found[:2])


@pytest.mark.skipif("avx512" not in ISAS, reason="the emulation of tiles packs its rows with AVX-512")
@pytest.mark.parametrize("tokens", TEXTS)
def test_tiles_show_tokens_all_of_a_text(tokens: int) -> None:
    q_TAE, k_SE, v_SE = draw(tokens, 1, tokens, 64)
    found = _native.attention("amx-emulated", "bf16", q_TAE, k_SE, v_SE, causal=False)
    (k, _), (v, _) = cached(k_SE, "bf16"), cached(v_SE, "bf16")
    np.testing.assert_allclose(found, attention(q_TAE, k, v, causal=False), rtol=3e-4, atol=3e-4)
    tiled = tokens >= 16
    assert tiled != np.array_equal(
        found, _native.attention("avx512", "bf16", q_TAE, k_SE, v_SE, causal=False)
    )


@pytest.mark.skipif("avx512" not in ISAS, reason="the emulation of tiles packs its rows with AVX-512")
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_tiles_equal_numpy(width: int) -> None:
    """Queries and weights in two bfloat16 each: 2^-16 of their products. Blocks of every size."""
    cases = ((16, 1, 0), (5, 4, 1), (3, 7, 250), (24, 1, 300), (40, 3, 500))
    for (tokens, heads, before), window in itertools.product(cases, (17, 270, NO_WINDOW)):
        q_TAE, k_SE, v_SE = draw(tokens, heads, before + tokens, width)
        found = _native.attention("amx-emulated", "bf16", q_TAE, k_SE, v_SE, window)
        (k, _), (v, _) = cached(k_SE, "bf16"), cached(v_SE, "bf16")
        np.testing.assert_allclose(found, attention(q_TAE, k, v, window), rtol=3e-4, atol=3e-4)
        assert not np.array_equal(found, _native.attention("avx512", "bf16", q_TAE, k_SE, v_SE, window))


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 15])
def test_every_level_and_every_batch_give_the_same_bits(kv: str, heads: int) -> None:
    """Rows alone, rows together, and chunks apart that are merged."""
    cases = ((1, 6, NO_WINDOW), (77, 20, NO_WINDOW), (256, 64, NO_WINDOW), (1000, 16, NO_WINDOW))
    for positions, width, window in (*cases, (77, 20, 18), (600, 64, 87), (1000, 16, 487)):
        tokens = min(3, positions)
        q_TAE, k_SE, v_SE = draw(tokens, heads, positions, width, seed=heads)
        expected = _native.attention("scalar", kv, q_TAE, k_SE, v_SE, window).reshape(q_TAE.shape)
        for isa in ISAS:
            if isa == "amx" and kv == "bf16" and width == 64 and tokens * heads >= 16:
                continue  # tiles: many rows together are rounded elsewhere than one alone
            found = _native.attention(isa, kv, q_TAE, k_SE, v_SE, window).reshape(q_TAE.shape)
            np.testing.assert_array_equal(found, expected)
            for t, head in itertools.product(range(tokens), range(heads)):
                q_11E, seen = q_TAE[t : t + 1, head : head + 1].copy(), positions - tokens + t + 1
                for split in (False, True):
                    alone = _native.attention(isa, kv, q_11E, k_SE[:seen], v_SE[:seen], window, split)
                    np.testing.assert_array_equal(alone[0], expected[t, head])


@cell
def test_extreme_scores_and_empty_vectors(row: dict[str, str]) -> None:
    """One position with all the weight, scores beyond exp's range, keys and values of zeros."""
    q_TAE, k_SE, v_SE = draw(1, 2, 300, 32)
    k_SE[7:9], v_SE[5:200], q_TAE[:, 1] = 0, 0, 0
    k_SE[260] = 40 * q_TAE[0, 0]
    found = check(row, q_TAE, k_SE, v_SE)
    assert np.abs(found[0] - v_SE[260]).max() < 0.02


@pytest.mark.parametrize("isa", ISAS)
def test_rope_equals_numpy_with_the_same_bits_on_every_level(isa: str) -> None:
    rng = np.random.default_rng(3)
    for heads, width in itertools.product((1, 5), (2, 6, 16, 40, 64, 128)):
        x_HE = rng.standard_normal((heads, width)).astype(np.float32)
        angle_E = rng.uniform(0, 7, width // 2)
        cosine_E, sine_E = np.cos(angle_E).astype(np.float32), np.sin(angle_E).astype(np.float32)
        a_HE, b_HE = np.split(x_HE, 2, axis=1)
        found = _native.rope(isa, x_HE, np.concatenate([cosine_E, sine_E]))
        expected = [a_HE * cosine_E - b_HE * sine_E, b_HE * cosine_E + a_HE * sine_E]
        np.testing.assert_array_equal(found, np.concatenate(expected, axis=1))


def test_what_does_not_fit_is_refused() -> None:
    q_TAE, k_SE, v_SE = draw(2, 1, 4, 8)
    with pytest.raises(ConfigError, match="f16"):
        _native.attention("scalar", "f16", q_TAE, k_SE, v_SE)
    for window in (-1, 0, NO_WINDOW + 1):
        with pytest.raises(EngineError):
            _native.attention("scalar", "f32", q_TAE, k_SE, v_SE, window)
    with pytest.raises(EngineError):
        _native.attention("scalar", "f32", q_TAE, k_SE, v_SE, 2, causal=False)
    for wrong in ((q_TAE, k_SE[:1], v_SE[:1]), (q_TAE, k_SE, v_SE[:, :6].copy()), (q_TAE, k_SE[:3], v_SE)):
        with pytest.raises(EngineError):
            _native.attention("scalar", "f32", *wrong)
    with pytest.raises(EngineError):
        _native.rope("scalar", k_SE, np.ones(6, np.float32))
