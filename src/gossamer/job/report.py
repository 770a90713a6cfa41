"""What a verb tells its caller: events while it runs, tables when it is done. Drawing them is `cli`'s."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Event:
    """One step of progress: `done` of `total` in `stage` (total 0: unknown), with figures worth showing.

    `lasting`: `message` is a sentence that the user must be able to read afterwards.
    """

    stage: str
    message: str = ""
    done: float = 0
    total: float = 0
    metrics: Mapping[str, Value] = field(default_factory=dict)
    lasting: bool = False


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
        """The table as GitHub shows it, numbers aligned right, and readable as plain text."""
        lines = [self.columns, *self.rows]
        widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(self.columns))]
        rule = [f"{'-' * (width - 1)}{':' if index else '-'}" for index, width in enumerate(widths)]
        return "".join(
            f"| {' | '.join(_justified(line, widths))} |\n" for line in (lines[0], rule, *lines[1:])
        )


def _justified(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words of one line, the first to the left and the others to the right."""
    pairs = list(zip(line, widths, strict=True))
    return [pairs[0][0].ljust(pairs[0][1]), *(cell.rjust(width) for cell, width in pairs[1:])]
