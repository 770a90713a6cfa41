"""Options of a verb: one dataclass is the configuration, the command line's flags and the record.

@dataclass(frozen=True)
class Prune(CalibrationOptions):
    model: str = option(help="checkpoint directory", positional=True)
    sparsity: float = option(0.5, help="fraction of zeros in the decoder's linear weights")

Options that several verbs have are written once, in one of two ways:

- Verbs that do a part of their work alike inherit the options of that part: a small dataclass beside the code
  that reads them (`CalibrationOptions`, `EngineOptions`, `TrainingOptions`). Its fields are given by name
  (`kw_only`), so that a verb's own fields come first.
- A verb that runs other verbs, such as `compress`, gets theirs from `gossamer.runs.options`: what one verb
  gains, those that run it offer without a line of their own.
"""

import dataclasses
from typing import Any


def option(
    default: Any = dataclasses.MISSING, help: str = "", *, positional: bool = False, **names: str
) -> Any:
    """A field that is also a flag: `short` is its letter, as `-o`; `flag` its name where Python has that."""
    metadata = {"help": help, "positional": positional, "short": None} | names
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """What all verbs that compute share."""

    threads: int | None = option(None, help="threads that compute (default: the physical cores)", short="-t")


def record(job: object) -> dict[str, Any]:
    """The job's options as JSON-able values, for `gossamer.json`."""
    assert dataclasses.is_dataclass(job) and not isinstance(job, type)
    values = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
