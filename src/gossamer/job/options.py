"""Options of a verb: one dataclass is the configuration, the command line's flags and the record.

@dataclass(frozen=True)
class Prune(CalibrationOptions):
    model: str = option(help="checkpoint directory", positional=True)
    sparsity: float = option(0.5, help="fraction of zeros in the decoder's linear weights")

Options that several verbs have are written once, in one of two ways:

- Verbs that do a part of their work alike inherit the options of that part: a small dataclass beside the code
  that reads them (`CalibrationOptions`, `EngineOptions`, `TrainingOptions`). Its fields are given by name
  (`kw_only`), so that a verb's own fields come first. `inherited` gives one of them another default.
- A verb that runs other verbs, such as `compress`, gets theirs from `gossamer.runs.options`: what one verb
  gains, those that run it offer without a line of their own.
"""

import dataclasses
from typing import Any


def option(
    default: Any = dataclasses.MISSING, help: str = "", *, positional: bool = False, short: str | None = None
) -> Any:
    """A dataclass field that is also a command-line flag (`short` is its one-letter name, such as `-o`)."""
    metadata = {"help": help, "positional": positional, "short": short}
    return dataclasses.field(default=default, metadata=metadata)


def inherited(parent: type, name: str, default: Any) -> Any:
    """The option `name` of the dataclass `parent`, with another default."""
    [field] = [field for field in dataclasses.fields(parent) if field.name == name]
    return option(default, **field.metadata)


def record(job: object) -> dict[str, Any]:
    """The job's options as JSON-able values, for `gossamer.json`."""
    assert dataclasses.is_dataclass(job) and not isinstance(job, type)
    return {field.name: _plain(getattr(job, field.name)) for field in dataclasses.fields(job)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
