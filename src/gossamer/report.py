"""How a verb tells its caller how far it is: a stream of events that the caller may draw, print or drop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Event:
    """One step of progress: `done` of `total` in `stage` (total 0: unknown), with figures worth showing."""

    stage: str
    message: str = ""
    done: float = 0
    total: float = 0
    metrics: Mapping[str, Value] = field(default_factory=dict)


Progress = Callable[[Event], None]


def quiet(event: Event) -> None:
    """Drop the event: the default of every verb called from Python."""
