"""Checkpoints of a run, whole or not there: staged, hashed, synced to disk and renamed; the newest two stay.

    OUT.partial/checkpoints/checkpoint-120/
        checkpoint.json          the run it belongs to, its mask's hash, sha256 of every file and of this text
        model.safetensors ...    what transformers' Trainer saves, and the tokenizer: a model directory

A kill at any moment leaves the ones before untouched. A damaged one is left out, and that is said.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.directory import companions
from gossamer.checkpoint.partial import CHECKPOINTS, checkpoint_steps
from gossamer.errors import CheckpointError, ConfigError
from gossamer.training.kernel import Kernel

RECORD = "checkpoint.json"
NUM_KEPT = 2


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to.

    `decides`: whatever changes the numbers (options, hashes of model, teacher, data and mask); it must be
    equal to go on. `rounds`: what changes only their last bits (threads, processes, versions).
    """

    decides: Mapping[str, Any]
    rounds: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in `run_dir`."""

    run_dir: Path
    identity: RunIdentity

    @property
    def folder(self) -> Path:
        return self.run_dir / CHECKPOINTS

    @property
    def staging(self) -> Path:
        """Where `checkpoint-N` is written before `publish` gives it its place."""
        return self.folder / "staging"

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return checkpoint_steps(self.run_dir)

    def publish(self, step: int, mask_hash: str, kernel: Kernel) -> None:
        """Hash, sync and rename what lies in `staging`; forget all but the newest two."""
        staged = self.staging / self.path(step).name
        for file in companions(self.run_dir):
            shutil.copyfile(file, staged / file.name)
        files = {str(file.relative_to(staged)): _sha256(file) for file in _files(staged)}
        found = {"step": step, "mask": mask_hash, "kernel": kernel, "files": files}
        _write_record(staged, found | _plain(self.identity))
        for path in [*_files(staged), *_folders(staged)]:
            _sync(path)
        staged.rename(self.path(step))
        _sync(self.folder)
        for old in self.steps()[:-NUM_KEPT]:
            shutil.rmtree(self.path(old))

    def discard_staged(self) -> None:
        """Free the space of a checkpoint that was not finished."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def newest_sound(self) -> tuple[int, list[str]]:
        """The step of the newest checkpoint that is as it was written, and what to tell the user.

        Damaged newer ones are removed. Raises CheckpointError where none is sound, ConfigError where it
        belongs to another run.
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

    def mask_hash(self, step: int) -> str:
        """The hash of the mask that was in force; more weights than it prunes may be zero."""
        return _read_record(self.path(step))["mask"]

    def kernel(self, step: int) -> Kernel:
        """The kernel that the run took when it began."""
        return _read_record(self.path(step))["kernel"]

    def _check_same_run(self, path: Path) -> list[str]:
        """Raise ConfigError naming every difference that changes the numbers; returns notes on the others."""
        theirs, ours = _read_record(path), _plain(self.identity)
        if changed := _differences(ours["decides"], theirs["decides"]):
            raise ConfigError(
                f"{path} belongs to a run of another configuration: {'; '.join(changed)}; give what that run "
                "was started with, or --overwrite to start anew"
            )
        changed = _differences(ours["rounds"], theirs["rounds"])
        return [
            f"resumed under other circumstances ({text}): not bit-identical to an uninterrupted run"
            for text in changed
        ]


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint's bytes, or None."""
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


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    return [f"{name}: found {ours.get(name)}, expected {theirs.get(name)}" for name in names]


def _plain(identity: RunIdentity) -> dict[str, Any]:
    return {"decides": dict(identity.decides), "rounds": dict(identity.rounds)}


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
