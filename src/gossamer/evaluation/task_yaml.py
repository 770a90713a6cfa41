"""A task of lm-evaluation-harness as files: its settings in YAML, and beside it its examples in Parquet.

`evaluate` runs a local file from these, and so does `lm_eval --include_path FOLDER --tasks NAME`. Examples
are in Parquet because a reader of JSON guesses types: of texts such as "2020-01-01" it would make times.
"""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_HEAD = """\
# Written by `gossamer evaluate --write-tasks`. Paths are absolute: in another folder, mend them.
"""


@dataclass(frozen=True)
class FileTask:
    """A task that a YAML file has; `decides` says what its figures depend on beside the model."""

    name: str
    file: Path
    decides: Mapping[str, Any]


class Function(str):
    """The name of a function, `package.module.function`, where a setting of a task is one."""


class _Dumper(yaml.SafeDumper):
    """Writes `!function NAME`, which the harness resolves, and no references to what came before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def yaml_file(folder: Path, name: str) -> Path:
    """Where the task of this name is written."""
    return folder / f"{name}.yaml"


def write_task(
    folder: Path, name: str, settings: Mapping[str, Any], splits: Mapping[str, Sequence[Mapping[str, Any]]]
) -> FileTask:
    """Write a task with the examples of each split, the first of which is asked."""
    import pyarrow
    import pyarrow.parquet

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{name}.{split}.parquet" for split in splits}
    for split, rows in splits.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files[split])
    decides = {**settings, "rows": hashlib.sha256(json.dumps(splits).encode()).hexdigest()}
    content = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {
            "data_files": {split: glob.escape(str(file)) for split, file in files.items()},
            "cache_dir": str(folder / ".datasets"),
        },
        "test_split": next(iter(splits)),
        **settings,
    }
    file = yaml_file(folder, name)
    written = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    file.write_text(_HEAD + written, encoding="utf-8")
    return FileTask(name, file, decides)
