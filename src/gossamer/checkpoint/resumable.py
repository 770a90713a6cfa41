"""The checkpoints of a run that can be resumed. Each is either complete or not there.

A checkpoint is written into a staging directory, hashed, flushed to disk, and only then renamed into place:

    OUT.partial/checkpoints/checkpoint-120/
        checkpoint.json          the run it belongs to, what it found, sha256 of every file and of itself
        ...                      whatever the run saves: training a model directory and the optimizer's state,
                                 prune and quantize hidden states and tensors (layerwise/saving.py)

If the process is killed at any moment, the earlier checkpoints are untouched. A resumed run skips a damaged
checkpoint and tells the user so.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.partial import CHECKPOINTS, checkpoint_steps
from gossamer.errors import CheckpointError, ConfigError

RECORD = "checkpoint.json"
_IN_WORDS = {
    "model": "the model's files (sha256)",
    "teacher": "the teacher's files (sha256)",
    "data": "the rows of tokens (sha256)",
    "mask": "the model's zeros (sha256)",
}


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to.

    `must_match`: what determines the result (options, hashes of model, teacher, data and mask); a run resumes
    only where all of it is equal. `may_differ`: what changes no more than the rounding (threads, processes,
    versions); a difference is reported. `checkpoint.json` calls them "decides" and "rounds".
    """

    must_match: Mapping[str, Any]
    may_differ: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The newest `num_kept` checkpoints in the folder `run_dir`, which all belong to the run `identity`."""

    run_dir: Path
    identity: RunIdentity
    num_kept: int = 2

    @property
    def folder(self) -> Path:
        return self.run_dir / CHECKPOINTS

    @property
    def staging(self) -> Path:
        """The directory in which `checkpoint-N` is written before `publish` moves it into place."""
        return self.folder / "staging"

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return checkpoint_steps(self.run_dir)

    def staged(self, step: int) -> Path:
        """Where the files of `checkpoint-STEP` are written first."""
        return self.staging / self.path(step).name

    def publish(self, step: int, found: Mapping[str, Any]) -> None:
        """Hash, flush and rename the staged checkpoint, then delete all but the newest `num_kept`.

        `found`: what `recorded` is to give back.
        """
        staged = self.staged(step)
        files = {str(file.relative_to(staged)): _sha256(file) for file in _files(staged)}
        _write_record(staged, {"step": step, **found, "files": files} | _plain(self.identity))
        for path in [*_files(staged), *_folders(staged)]:
            sync(path)
        staged.rename(self.path(step))
        sync(self.folder)
        for old in self.steps()[: -self.num_kept]:
            shutil.rmtree(self.path(old))

    def discard_staged(self) -> None:
        """Delete a checkpoint that was not finished."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def newest_sound(self) -> tuple[int, list[str]]:
        """The step of the newest undamaged checkpoint, and notes for the user.

        Deletes the damaged checkpoints that are newer. Raises CheckpointError if all are damaged or there is
        none, ConfigError if the checkpoint belongs to another run.
        """
        damaged = []
        for step in reversed(self.steps()):
            reason = damage(self.path(step))
            if reason is None:
                notes = [f"{text}; going on from checkpoint-{step}" for text in damaged]
                notes += self._check_same_run(self.path(step))
                for newer in [newer for newer in self.steps() if newer > step]:
                    shutil.rmtree(self.path(newer))
                return step, notes
            damaged.append(f"checkpoint-{step} is damaged ({reason})")
        found = "; ".join(damaged) or "there is none"
        raise CheckpointError(
            f"{self.folder}: no sound checkpoint to resume from: {found}; --overwrite starts anew"
        )

    def recorded(self, step: int) -> dict[str, Any]:
        """What `publish` was given, and the rest of the record."""
        return _read_record(self.path(step))

    def _check_same_run(self, path: Path) -> list[str]:
        """Raise ConfigError naming every difference in `must_match`; returns notes on the others."""
        theirs, ours = _read_record(path), _plain(self.identity)
        if changed := differences(ours["decides"], theirs["decides"], _IN_WORDS):
            raise ConfigError(
                f"{path} belongs to a run of another configuration: {'; '.join(changed)}; give what that run "
                "was started with, or --overwrite to start anew"
            )
        changed = differences(ours["rounds"], theirs["rounds"], _IN_WORDS)
        return [
            f"resumed under other circumstances ({text}): not bit-identical to an uninterrupted run"
            for text in changed
        ]


def damage(path: Path) -> str | None:
    """A description of what is wrong with the checkpoint's files, or None if they are as written."""
    try:
        record = _read_record(path)
        if record.pop("digest") != _text_digest(record):
            return f"{RECORD} was changed"
        for name, expected in record["files"].items():
            if (found := _sha256(path / name)) != expected:
                return f"{name}: found sha256 {found[:12]}, expected {expected[:12]}"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, AttributeError):
        return f"{RECORD} is not readable"
    return None


def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], in_words: Mapping[str, str]
) -> list[str]:
    """What differs between two records, by name or as `in_words` has it; of a sha256 12 digits."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return [
        f"{in_words.get(name, name)}: found {_short(found.get(name))}, expected {_short(expected.get(name))}"
        for name in names
    ]


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def _plain(identity: RunIdentity) -> dict[str, Any]:
    """As `checkpoint.json` stores it."""
    return {"decides": dict(identity.must_match), "rounds": dict(identity.may_differ)}


def _read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record | {"digest": _text_digest(record)}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def _text_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folders(folder: Path) -> list[Path]:
    return [folder, *(path for path in folder.rglob("*") if path.is_dir())]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(partial: Path, needed_bytes: int) -> None:
    """Raise OSError unless so many bytes of weights and checkpoints fit on the disk, with those there are."""
    files = [*partial.glob("model*"), *partial.glob(f"{CHECKPOINTS}/*/*")]
    there = sum(file.stat().st_size for file in files if file.is_file())
    if (free := shutil.disk_usage(partial).free) < (missing := needed_bytes - there):
        raise OSError(
            errno.ENOSPC,
            f"the output and checkpoints for --resume need {missing / 1e6:,.1f} MB, {free / 1e6:,.1f} MB "
            "are free: make room, or do without checkpoints (--save-seconds inf)",
            str(partial),
        )
