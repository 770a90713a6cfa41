"""What a verb tells its caller: events while it runs, tables when it is done. Drawing them is `cli`'s."""

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads; a result that has `tables()` is shown by them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as GitHub shows it, numbers aligned right."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
