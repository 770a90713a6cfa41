"""The native losses at the head: every level against torch's own passes, and against scalar's bits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer import _native
from gossamer.errors import EngineError, UnsupportedError
from gossamer.training import head_loss as module
from gossamer.training.head_loss import TeacherLogits, TopTokens, head_loss

LEVELS = tuple(_native.levels())
RUNNABLE = tuple(level for level, runs in _native.levels().items() if runs)
FAMILIES = ("peak", "total", "gradient")
ISAS = [
    row["isa"]
    for row in _native.kernels()
    if row["family"] == "gradient" and row["values"] == "f32" and row["isa"] in RUNNABLE
]
N = 12
INFINITY = float("inf")


def made_up(
    V: int, K: int, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, TopTokens | None]:
    """Logits, targets, and a teacher (K = 0: none) who has every second target among its K likeliest."""
    torch.manual_seed(V + K)
    logits_NV, z_NV = (torch.randn(N, V) * 3).to(dtype), torch.randn(N, V) * 2
    order_NV = z_NV.argsort(-1, descending=True)
    targets_N = order_NV[:, -1].clone()
    targets_N[::2] = order_NV[::2, 0]
    ids_NK = order_NV[:, :K].contiguous()
    log_p_NK = (z_NV / temperature).log_softmax(-1).gather(1, ids_NK)
    return logits_NV, targets_N, TopTokens(ids_NK, log_p_NK, temperature) if K else None


def run(
    logits_NV: Tensor, targets_N: Tensor, teacher: TopTokens | None, isa: str | None, weight: float = 1.0
) -> tuple[float, float, Tensor]:
    d_NV = logits_NV.clone()
    return *module._native_losses(d_NV, targets_N, teacher, weight, 0, isa), d_NV


def assert_is_torchs(
    logits_NV: Tensor, targets_N: Tensor, teacher: TopTokens | None, isa: str | None, weight: float = 1.0
) -> None:
    """Sums within 1e-5; gradients too, but for what 1 - sum p is inexact by, and for one rounding.

    Torch's passes are given float64: of logits near 10,000 float32 knows the logarithm of a sum to .001 only.
    """
    found, whole, d_NV = run(logits_NV, targets_N, teacher, isa, weight)
    expected, expected_whole, expected_NV = module._losses(logits_NV.double(), targets_N, teacher, weight, 0)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert whole == pytest.approx(expected_whole.item(), rel=1e-5)
    rounding = 1e-5 if logits_NV.dtype == torch.float32 else 2.0**-8 + 1e-5
    assert d_NV.dtype == logits_NV.dtype
    torch.testing.assert_close(d_NV.double(), expected_NV, rtol=rounding, atol=1e-6)


def test_the_table_has_every_level_and_type() -> None:
    for family in FAMILIES:
        rows = [(row["isa"], row["values"]) for row in _native.kernels() if row["family"] == family]
        assert rows == [(isa, values) for isa in LEVELS[:3] for values in ("f32", "bf16")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("V", "K"), [(64, 0), (1003, 0), (64, 7), (64, 63), (50, 48), (50, 50), (1003, 128)])
@pytest.mark.parametrize("isa", ISAS)
def test_is_what_torch_computes(isa: str, V: int, K: int, temperature: float, dtype: torch.dtype) -> None:
    assert_is_torchs(*made_up(V, K, temperature, dtype), isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [0, 7])
@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("isa", ISAS)
def test_cross_entropy_has_a_weight(isa: str, weight: float, K: int, dtype: torch.dtype) -> None:
    """In the whole loss and its gradient; cross-entropy alone is told without it."""
    made = made_up(64, K, 2.0, dtype)
    assert_is_torchs(*made, isa, weight)
    assert run(*made, isa, weight)[0] == run(*made, isa)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("K", [0, 7])
@pytest.mark.parametrize("isa", ISAS)
def test_huge_and_hopeless_logits(isa: str, K: int, temperature: float) -> None:
    """Some so high that exp of them is no number, some -inf, rows far from 0, a row of equals."""
    logits_NV, targets_N, teacher = made_up(50, K, temperature, torch.float32)
    rows = torch.arange(N)
    logits_NV[rows[:4], targets_N[:4]] = 1000.0
    logits_NV[4:8] += torch.tensor([1e4, -1e4, 300.0, -300.0])[:, None]
    logits_NV[8] = 5.0
    for n in (9, 10):
        kept = torch.zeros(50).bool()
        kept[targets_N[n]] = True
        if teacher is not None:
            kept[teacher.ids_NK[n]] = True
        logits_NV[n, ~kept] = -INFINITY if n == 9 else -1e30
    assert_is_torchs(logits_NV, targets_N, teacher, isa)
    found_NV = run(logits_NV, targets_N, teacher, isa)[2]
    assert not found_NV[9][logits_NV[9] == -INFINITY].any()


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("place", [0, 20, 49])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_that_is_no_numbers_says_so(isa: str, place: int, bad: float) -> None:
    """It, and the sums; the other rows are as they are without it."""
    for dtype in (torch.float32, torch.bfloat16):
        logits_NV, targets_N, teacher = made_up(50, 7, 2.0, dtype)
        expected_NV = run(logits_NV, targets_N, teacher, isa)[2]
        logits_NV[3, place] = bad
        found, whole, d_NV = run(logits_NV, targets_N, teacher, isa)
        assert np.isnan(found) and np.isnan(whole) and d_NV[3].isnan().all()
        others = torch.arange(N) != 3
        assert torch.equal(d_NV[others], expected_NV[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 7, 8, 15, 16, 17, 31, 1031])
def test_levels_and_threads_give_the_same_bits(V: int, dtype: torch.dtype) -> None:
    for K, temperature in [(0, 1.0), (min(V, 5), 1.0), (min(V, 5), 1.7)]:
        logits_NV, targets_N, teacher = made_up(V, K, temperature, dtype)
        logits_NV[:2] *= 40  # beyond what exp is taken of
        first = run(logits_NV, targets_N, teacher, "scalar")
        for isa in ISAS:
            found = run(logits_NV, targets_N, teacher, isa)
            assert found[:2] == first[:2] and torch.equal(found[2], first[2])
        before = torch.get_num_threads()
        for num_threads in (2, 3, 17):
            try:
                torch.set_num_threads(num_threads)
                found = run(logits_NV, targets_N, teacher, None)
            finally:
                torch.set_num_threads(before)
            assert found[:2] == first[:2] and torch.equal(found[2], first[2])


@pytest.mark.parametrize("isa", ISAS)
def test_no_tokens_and_no_likely_ones(isa: str) -> None:
    """With K = 0 all tokens are the others, whose probability is 1 on both sides."""
    logits_NV, targets_N, _ = made_up(50, 0, 1.0, torch.float32)
    assert run(logits_NV[:0], targets_N[:0], None, isa)[:2] == (0, 0)
    nothing = TopTokens(torch.zeros(N, 0).long(), torch.zeros(N, 0), 2.0)
    assert run(logits_NV[:0], targets_N[:0], nothing, isa)[:2] == (0, 0)
    assert_is_torchs(logits_NV, targets_N, nothing, isa)


def arguments(**changed: Any) -> dict[str, Any]:
    logits_NV, targets_N, teacher = made_up(50, 7, 1.0, torch.float32)
    assert teacher is not None
    arrays = {
        "logits_NV": logits_NV.numpy(),
        "targets_N": targets_N.numpy(),
        "ids_NK": teacher.ids_NK.numpy(),
        "log_p_NK": teacher.log_p_NK.numpy(),
    }
    return {**arrays, "num_threads": 1, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets_N": np.zeros(N - 1, np.int64)}, r"targets \[11\] do not fit logits \[12, 50\]"),
        ({"targets_N": np.full(N, 50)}, "id 50 among the targets; expected ids from 0 to 49"),
        ({"targets_N": np.full(N, -1)}, "id -1 among the targets"),
        ({"ids_NK": np.full((N, 7), 50)}, "id 50 among the teacher's ids"),
        ({"ids_NK": np.full((N, 7), -(2**40))}, "id -1099511627776 among the teacher's ids"),
        ({"ids_NK": np.zeros((N, 6), np.int64)}, r"ids \[12, 6\] and log_p \[12, 7\] do not fit"),
        ({"ids_NK": np.zeros((N - 1, 7), np.int64)}, r"ids \[11, 7\]"),
        ({"log_p_NK": np.zeros((N - 1, 7), np.float32)}, r"log_p \[11, 7\]"),
        ({"ids_NK": np.zeros((N, 51), np.int64), "log_p_NK": np.zeros((N, 51), np.float32)}, "at most V"),
        ({"log_p_NK": None}, "ids and log_p, or neither"),
        ({"temperature": 0.0}, "temperature of 0"),
        ({"temperature": float("nan")}, "temperature of nan"),
        ({"cross_entropy_weight": -1.0}, "weight of -1"),
        ({"cross_entropy_weight": float("inf")}, "weight of inf"),
        ({"logits_NV": np.zeros((N, 50))}, "float32, or the uint16 bits of bfloat16"),
        ({"logits_NV": np.zeros((N, 0), np.float32)}, r"logits \[12, 0\]"),
    ],
)
def test_what_does_not_fit_is_an_error(changed: dict[str, Any], message: str) -> None:
    wrong = arguments(**changed)
    before = wrong["logits_NV"].copy()
    with pytest.raises(EngineError, match=message):
        _native.head_loss(**wrong)
    np.testing.assert_array_equal(wrong["logits_NV"], before)


def test_arrays_that_would_be_copied_are_errors() -> None:
    for changed in (
        {"logits_NV": np.zeros((50, N), np.float32).T},
        {"logits_NV": np.zeros((N, 50, 1), np.float32)},
        {"targets_N": np.zeros(N, np.int32)},
        {"log_p_NK": np.zeros((N, 7))},
    ):
        with pytest.raises(TypeError):
            _native.head_loss(**arguments(**changed))
    for isa in set(LEVELS) - set(RUNNABLE):
        with pytest.raises(UnsupportedError, match=isa):
            _native.head_loss(**arguments(isa=isa))


def test_who_computes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch a teacher whose logits are all there, and float64; native code all else, wherever it begins."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", {"cpu": 5})
    monkeypatch.setattr(module, "PRODUCT_TOKENS", 5)
    logits_NV, targets_N, top = made_up(50, 7, 2.0, torch.float32)
    w_VD = torch.randn(50, 16)
    hidden_ND = torch.linalg.lstsq(w_VD, logits_NV.T).solution.T.contiguous()
    whole = TeacherLogits(lambda begin, end: logits_NV[begin:end].flip(1))
    torchs = module._losses
    calls: list[int] = []
    monkeypatch.setattr(module, "_losses", lambda *given: calls.append(given[4]) or torchs(*given))
    for teacher in (None, top):
        found = head_loss(hidden_ND, w_VD, targets_N, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = head_loss(hidden_ND, w_VD, targets_N, teacher)
        assert not calls
        expected = head_loss(hidden_ND.double(), w_VD.double(), targets_N, teacher)
        assert calls == [0, 5, 10]
        calls.clear()
        for near, rounds, exact in zip(found, rounded, expected, strict=True):
            assert near.item() == pytest.approx(exact.item(), rel=1e-5)
            assert rounds.item() == pytest.approx(exact.item(), rel=1e-2)
    head_loss(hidden_ND, w_VD, targets_N, whole)
    assert calls == [0, 5, 10]
