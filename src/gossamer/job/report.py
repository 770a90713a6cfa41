"""What a verb tells its caller: events while it runs, tables when it is done. Drawing them is `cli`'s."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """Rows of text under column heads; `to_paste`: printed as Markdown, instead of drawn with lines."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    to_paste: bool = False


class Result:
    """What a verb returns: a dataclass that knows how it is shown.

    `closing`: lines below the tables, such as the command to go on with.
    """

    closing: Sequence[str] = ()

    def tables(self) -> list[Table]:
        """What a person sees; without any, the plain fields are shown."""
        return []

    def objects(self) -> Sequence[Any]:
        """What a program sees: the dataclasses that --json prints, one a line."""
        return (self,)
