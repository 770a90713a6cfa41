"""Programs that a model wrote, run where they can do no harm: a process of its own, confined by the kernel.

What confines it is in `confined.py`, which the process runs before the program:

    files     read: Python's own and the system's libraries; write: one folder, which is deleted (Landlock);
              names and sizes of others can be asked for
    network   no sockets; no other processes, no signals to them, no `exec` (seccomp); no capabilities
    CPU, memory, size of a file: resource limits; time, bytes and files of the folder: watched from here

All this takes Linux 5.13 or newer on x86-64, and no privileges.
"""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import UnsupportedError
from gossamer.evaluation import confined
from gossamer.evaluation.confined import CANNOT_CONFINE, DONE, PROGRAM

LAUNCHER = Path(confined.__file__)
POLL_S = 0.02


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of CPU and of time, bytes of memory and of its folder."""

    cpu_s: int = 10
    wall_s: float = 15.0
    memory_bytes: int = 1 << 30
    folder_bytes: int = 16 << 20
    folder_files: int = 500


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its last line without an error; else why not, in a few words."""

    passed: bool
    reason: str


def run_python(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a program by this interpreter, confined; UnsupportedError where the system cannot confine it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnsupportedError(
            f"generated code runs on Linux on x86-64 only, where it can be confined; found {sys.platform} on "
            f"{platform.machine()}: leave out --allow-code-execution"
        )
    with _folder() as folder, tempfile.TemporaryFile() as errors:
        (Path(folder) / PROGRAM).write_text(program, encoding="utf-8", errors="replace")
        numbers = (limits.cpu_s, limits.memory_bytes, limits.folder_bytes)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(LAUNCHER), folder, *map(str, numbers)],
            cwd=folder,
            env={"PATH": "", "HOME": folder, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout as written:
            try:
                reason = _watch(process, Path(folder), limits)
            finally:  # it has no children: it may not start any
                process.kill()
                process.wait()
            done = written.read(len(DONE) + 1) == DONE
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
        last_words = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    if process.returncode == CANNOT_CONFINE and not done:
        raise UnsupportedError(
            f"generated code cannot be confined here ({' '.join(last_words)}): it takes Linux 5.13 or newer "
            "with Landlock and seccomp; leave out --allow-code-execution"
        )
    if done and reason is None:
        return Outcome(True, "")
    return Outcome(False, reason or " ".join(last_words) or f"ended by {_ending(process.returncode)}")


def _watch(process: subprocess.Popen[bytes], folder: Path, limits: Limits) -> str | None:
    """Wait for the end of the process; why it has to be ended before, or None."""
    begun = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - begun > limits.wall_s:
            return f"not done after {limits.wall_s:g} s"
        num_files, num_bytes = _size(folder)
        if num_bytes > limits.folder_bytes:
            return f"wrote more than {limits.folder_bytes:,} bytes"
        if num_files > limits.folder_files:
            return f"made more than {limits.folder_files:,} files and folders"
        time.sleep(POLL_S)
    return None


def _size(folder: Path) -> tuple[int, int]:
    """Files and folders in it, and their bytes; what is nested too deep to be walked counts as too many."""
    num_files, num_bytes = 0, 0
    try:
        for place, folders, names in os.walk(folder):
            num_files += len(folders) + len(names)
            for name in names:
                with contextlib.suppress(OSError):  # it may be gone since
                    num_bytes += (Path(place) / name).lstat().st_size
    except (OSError, RecursionError):
        return sys.maxsize, num_bytes
    return num_files, num_bytes


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder for a program, deleted by a tool that no depth of folders stops."""
    folder = tempfile.mkdtemp(prefix="gossamer-code-")
    try:
        yield folder
    finally:
        subprocess.run(["rm", "-rf", "--", folder], check=False, capture_output=True)


def _ending(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
