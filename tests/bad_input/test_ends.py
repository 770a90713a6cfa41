"""Runs that end before their time, by a full disk or Ctrl-C: the right exit code, and nothing left."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bad_input.cases import PRUNE, Tiny, workplace


def start(arguments: list[str], limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, where every file may grow to `limit_bytes`."""

    def limit() -> None:
        if limit_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [sys.executable, "-B", "-m", "gossamer", *arguments],  # no byte code, which would be cut off
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


@pytest.mark.parametrize("verb", ["prune", "pack"])
def test_a_disk_that_takes_no_more_leaves_nothing(verb: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    places = workplace(tiny_llama, "llama2", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = PRUNE if verb == "prune" else ["pack", "{model}", "-o", "{goss}"]
    process = start([argument.format(**places) for argument in arguments], limit_bytes=50_000)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 1, message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_ctrl_c_that_strikes_while_an_object_is_freed_still_ends_the_run(
    tiny_llama: Tiny, tmp_path: Path
) -> None:
    """Python drops what a `__del__` raises: regex' and torch's objects are freed by the thousand."""
    places = workplace(tiny_llama, "llama2", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    program = """
import signal
from gossamer import __main__, cli

class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def parse(*words, original=cli.parse):
    Freed()
    return original(*words)

cli.parse = parse
__main__.main()
"""
    words = [argument.format(**places) for argument in PRUNE]
    command = [sys.executable, "-c", program, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (130, "gossamer: interrupted\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_exits_130_and_leaves_nothing(tiny_llama: Tiny, tmp_path: Path) -> None:
    places = workplace(tiny_llama, "llama2", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    training = ["--num-tokens", "5000000", "--max-length", "64", "--batch-tokens", "256"]
    output = ["-o", str(places["out"]), "--dataset", "python:stdlib"]
    process = start(["pretrain", str(places["model"]), *output, *training])
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # rows are packed for many seconds yet: after a step, the run would be kept to be resumed
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130, message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before
