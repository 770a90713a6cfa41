"""Reconstruction of a small block: what it lowers, what it keeps, and what it gives back."""

import pytest
import torch
from torch import Tensor, nn

from gossamer.compress.reconstruct import Rows, Schedule, reconstruct
from gossamer.compress.target import token_error


def block(seed: int) -> nn.Sequential:
    """A norm and two linears, of hidden states of 16 numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))


def half_pruned(dense: nn.Sequential) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """A copy without the smaller half of each matrix, and masks of what is kept."""
    pruned = block(0)
    pruned.load_state_dict(dense.state_dict())
    kept = {}
    for name, weight in pruned.named_parameters():
        if weight.ndim == 2:
            kept[name] = weight.abs() > weight.abs().median()
            weight.data *= kept[name]
    return pruned, kept


@torch.no_grad()
def rows(dense: nn.Sequential, seed: int, num_rows: int) -> Rows:
    x_BTD = torch.randn(num_rows, 20, 16, generator=torch.Generator().manual_seed(seed))
    x_BTD[:, 0] *= 1000
    return Rows(x_BTD, dense(x_BTD))


def train(schedule: Schedule) -> tuple[nn.Sequential, dict[str, Tensor], list[float], Rows]:
    dense = block(3)
    pruned, kept = half_pruned(dense)
    held_out = rows(dense, 1, 8)
    errors = reconstruct(
        pruned, dict(pruned.named_parameters()), kept, rows(dense, 0, 32), held_out, schedule
    )
    return pruned, kept, errors, held_out


def test_lowers_the_error_of_rows_that_it_does_not_see_and_keeps_zeros() -> None:
    pruned, kept, errors, held_out = train(Schedule(4, 5e-3, 0))
    assert len(errors) == 5 and min(errors) < 0.6 * errors[0]
    found = token_error(pruned(held_out.inputs_BTD), held_out.wanted_BTD).item()
    assert found == pytest.approx(min(errors), rel=1e-5)
    for name, weight in pruned.named_parameters():
        assert not weight.requires_grad and (name not in kept or torch.equal(weight != 0, kept[name]))


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    first, again, other = (train(Schedule(1, 5e-3, seed))[0].state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("learning_rate", [30.0, 1e30])
def test_training_that_fails_leaves_the_block_as_it_was(learning_rate: float) -> None:
    before, _ = half_pruned(block(3))
    after, _, errors, _ = train(Schedule(2, learning_rate, 0))
    assert errors[0] == min(errors)
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight)
