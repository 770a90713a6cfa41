"""The native AdamW: every level against float64, the optimizer against torch's."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gossamer import _native
from gossamer.errors import EngineError, UnsupportedError
from gossamer.training.adamw import AdamW

LEVELS = tuple(_native.levels())
RUNNABLE = tuple(level for level, runs in _native.levels().items() if runs)
ISAS = [row["isa"] for row in _native.kernels() if row["family"] == "adamw" and row["isa"] in RUNNABLE]
FACTORS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
UNIT = 2.0**-24


def arrays(count: int) -> list[np.ndarray]:
    """Weights, gradient and both moments over many magnitudes; the first third are zeros."""
    generator = np.random.default_rng(count)
    made = generator.standard_normal((4, count)) * np.exp(4 * generator.standard_normal((4, count)))
    made[3] = np.abs(made[3])
    made[:, : count // 3] = 0
    return list(made.astype(np.float32))


def test_the_table_has_every_level() -> None:
    assert [row["isa"] for row in _native.kernels() if row["family"] == "adamw"] == list(LEVELS[:3])


@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("isa", ISAS)
def test_one_step_equals_float64(isa: str, step: int) -> None:
    """Roundings only: three of the first moment, three of the second, of the update a dozen."""
    found = arrays(1003)
    w, g, m, v = (array.astype(np.float64) for array in found)
    _native.adamw(*found, **FACTORS, step=step, num_threads=1, isa=isa)
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    scale = 1e-2 / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
    bound_m = 4 * UNIT * (np.abs(m) + np.abs(g))
    assert (np.abs(found[2] - m) <= bound_m).all()
    assert (np.abs(found[3] - v) <= 4 * UNIT * v + 1e-44).all()
    bound_w = 3 * UNIT * np.abs(w) + (bound_m + 12 * UNIT * np.abs(m)) * scale
    assert (np.abs(found[0] - ((1 - 1e-3) * w - m * scale)) <= bound_w).all()
    assert not any(array[: 1003 // 3].any() for array in found)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 15, 16, 17, 16 * 1024, 16 * 1024 + 1, 100_003])
def test_levels_and_threads_give_the_same_bits(count: int) -> None:
    runs = []
    for isa, num_threads in [*((isa, 1) for isa in ISAS), (None, 2), (None, 3)]:
        found = arrays(count)
        for step in (1, 2, 3):
            _native.adamw(*found, **FACTORS, step=step, num_threads=num_threads, isa=isa)
        runs.append(found)
    for run in runs[1:]:
        for array, expected in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_arrays_that_do_not_fit_are_errors() -> None:
    w, g, m, v = arrays(8)
    with pytest.raises(EngineError, match="as long"):
        _native.adamw(w, g[:7].copy(), m, v, **FACTORS, step=1, num_threads=1)
    with pytest.raises(TypeError):
        _native.adamw(w, g.astype(np.float64), m, v, **FACTORS, step=1, num_threads=1)
    for isa in set(LEVELS) - set(RUNNABLE):
        with pytest.raises(UnsupportedError, match=isa):
            _native.adamw(w, g, m, v, **FACTORS, step=1, num_threads=1, isa=isa)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 50), nn.Tanh(), nn.Linear(50, 5))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, biases do not."""
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Regression on data that differ at every step, under a falling rate."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(64, 37, generator=generator), torch.randn(64, 5, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 400)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def assert_near(model: nn.Module, other: nn.Module) -> None:
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_three_hundred_steps_are_torchs() -> None:
    ours, theirs = net(), net()
    train(ours, AdamW(groups(ours), betas=(0.9, 0.95)), range(300))
    train(theirs, torch.optim.AdamW(groups(theirs), betas=(0.9, 0.95)), range(300))
    assert_near(ours, theirs)


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
def test_state_moves_between_ours_and_torchs(first: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    """A run that changes the optimizer half way, through a file, ends where torch's alone ends."""
    second = torch.optim.AdamW if first is AdamW else AdamW
    model, expected = net(), net()
    before = first(groups(model))
    train(model, before, range(20))
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    after = second(groups(model))
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(model, after, range(20, 40))
    train(expected, torch.optim.AdamW(groups(expected)), range(40))
    assert_near(model, expected)
    state = after.state[next(model.parameters())]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 40


def test_reloaded_state_continues_to_the_bit() -> None:
    model = net()
    optimizer = AdamW(groups(model))
    train(model, optimizer, range(5))
    other = copy.deepcopy(model)
    resumed = AdamW(groups(other))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_what_the_kernel_does_not_know_is_torchs_own() -> None:
    """float64 and amsgrad: the same bits as torch, since it is torch."""
    for dtype, options in [(torch.float64, {}), (torch.float32, {"amsgrad": True})]:
        ours, theirs = net().to(dtype), net().to(dtype)
        for model, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
            optimizer = kind(model.parameters(), **options)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 37, dtype=dtype)).sum().backward()
                optimizer.step()
        for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(found, expected)


def test_unused_weights_stay() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused])
    used.sum().backward()
    optimizer.step()
    assert (used < 1).all() and (unused == 1).all() and unused not in optimizer.state
