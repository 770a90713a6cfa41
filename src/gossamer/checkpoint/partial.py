"""`OUT.partial`: where an output is written until it is whole, and where an interrupted run waits."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from gossamer.errors import ConfigError, Interrupted

CHECKPOINTS = "checkpoints"
_CHECKPOINT_NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise ConfigError if `output` exists and may not be replaced."""
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; give another path, or --overwrite to replace it")


def holds_checkpoint(partial: Path) -> bool:
    """Whether an interrupted run left something to resume from."""
    return bool(checkpoint_steps(partial))


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps that a run left checkpoints of, oldest first; copies that users make do not count."""
    found = [_CHECKPOINT_NAME.fullmatch(path.name) for path in (run_dir / CHECKPOINTS).glob("checkpoint-*")]
    return sorted(int(match[1]) for match in found if match)


def check_interrupted(partial: Path, overwrite: bool, resume: bool) -> None:
    """Raise ConfigError unless what stands in `partial` and what is asked go together."""
    interrupted = holds_checkpoint(partial)
    if resume and not interrupted:
        raise ConfigError(f"--resume: found no interrupted run in {partial}; leave --resume out to start one")
    if interrupted and not (resume or overwrite):
        raise ConfigError(
            f"{partial} holds an interrupted run; --resume goes on with it, --overwrite starts anew"
        )


def interrupted(partial: Path, error: KeyboardInterrupt) -> KeyboardInterrupt:
    """What to raise after Ctrl-C: Interrupted, which names the newest checkpoint, if there is one."""
    if isinstance(error, Interrupted) or not (steps := checkpoint_steps(partial)):
        return error
    return Interrupted(f"interrupted; {partial / CHECKPOINTS / f'checkpoint-{steps[-1]}'} is saved")


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Make `partial`, and keep other runs out of it; raises ConfigError where one is at work."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{partial} is being written by another process; wait for its end, or give another "
                "--output-dir (only pretrain and finetune run under torchrun)"
            ) from error
        yield
    finally:
        os.close(descriptor)


def publish(partial: Path, output: Path) -> None:
    """Rename a finished directory into place, replacing what stood there."""
    if output.exists():
        previous = output.with_name(output.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        output.rename(previous)
        partial.rename(output)
        shutil.rmtree(previous) if previous.is_dir() else previous.unlink()
    else:
        partial.rename(output)
