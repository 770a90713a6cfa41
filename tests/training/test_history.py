"""The figures of a run: means that a short last step does not decide."""

import pytest

from gossamer.training.history import History
from gossamer.training.kernel_choice import KernelChoice


def history(losses: list[float], tokens: list[int], **parts: tuple[float, ...]) -> History:
    kernel = KernelChoice("dense", "asked for")
    return History(tuple(losses), parts, tuple(tokens), 2.0, "f32", 1, (), kernel, {}, None)


def test_a_short_last_step_counts_by_its_tokens() -> None:
    run = history([5.0, 4.0, 3.0, 2.0, 13.0], [100, 100, 100, 100, 1])
    metrics = run.metrics()
    assert metrics["loss_first"] == 4.0
    assert metrics["loss_last"] == pytest.approx((300 + 200 + 13) / 201, abs=1e-4)
    assert (metrics["num_tokens"], metrics["tokens_per_s"]) == (401, 200.5)


@pytest.mark.parametrize(("num_steps", "window"), [(1, 1), (2, 1), (3, 2), (19, 10), (100, 10), (400, 20)])
def test_means_are_over_several_steps_and_never_more_than_half(num_steps: int, window: int) -> None:
    metrics = history([float(n) for n in range(num_steps)], [8] * num_steps).metrics()
    assert metrics["loss_first"] == (window - 1) / 2
    assert metrics["loss_last"] == num_steps - 1 - (window - 1) / 2


def test_the_teachers_part_is_given_apart() -> None:
    run = history([3.0, 2.0], [4, 4], cross_entropy=(2.5, 1.75), squarehead=(0.5, 0.25))
    result = run.result("out", 0.5)
    found = (
        result.cross_entropy_first,
        result.cross_entropy_last,
        result.squarehead_first,
        result.squarehead_last,
    )
    assert found == (2.5, 1.75, 0.5, 0.25) and result.kl_first is result.kl_last is None
