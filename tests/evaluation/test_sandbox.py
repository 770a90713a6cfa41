"""Programs that mean harm, or do it by mistake: contained, and counted as failed."""

import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.errors import UnsupportedError
from gossamer.evaluation import confined, sandbox
from gossamer.evaluation.file_tasks import READERS, passes
from gossamer.evaluation.sandbox import Limits, run_python

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the sandbox is for Linux on x86-64"
)
CALL = """import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
LIMITS = Limits(cpu_s=1, wall_s=12.0, folder_bytes=4 << 20)


@pytest.fixture(scope="module", autouse=True)
def landlock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bool]:
    """Whether the kernel has it; where not, what confines all but files is tested without it."""
    try:
        run_python("pass")
    except UnsupportedError as error:
        assert "Landlock" in str(error)
    else:
        yield True
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "LAUNCHER", without_landlock(tmp_path_factory.mktemp("launcher")))
        yield False


def without_landlock(folder: Path) -> Path:
    """The launcher, but for the line that confines files."""
    text, line = (
        Path(confined.__file__).read_text(encoding="utf-8"),
        "    _restrict_files(libc, checked, folder)\n",
    )
    assert line in text
    launcher = folder / "confined.py"
    launcher.write_text(text.replace(line, ""), encoding="utf-8")
    return launcher


@pytest.mark.parametrize(
    "program",
    [
        "import collections, json, math, re, typing; assert math.sqrt(4) == 2",
        "print('x' * 1_000_000)",
        "open('own.txt', 'w').write('x'); assert open('own.txt').read() == 'x'",
        "from os import *\nfor _ in range(300): mkdir('d'); mkdir('d/a'); rmdir('d/a'); rmdir('d')",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "if __name__ == '__main__': answer = sorted([2, 1])\nassert answer == [1, 2]",
    ],
)
def test_what_a_solution_may_need_works(program: str) -> None:
    assert run_python(program, LIMITS).reason == "" and run_python(program, LIMITS).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("print('done'); raise SystemExit", "exit code 0"),
        ("import os; os.fork()", "Operation not permitted"),
        ("import os\nwhile True: os.fork()", "Operation not permitted"),
        ("import subprocess; subprocess.run(['ls'])", "Operation not permitted"),
        ("import os; os.execv('/bin/sh', ['sh'])", "Operation not permitted"),
        ("import multiprocessing; multiprocessing.Pool(2)", "Error"),
        ("import socket; socket.socket()", "Operation not permitted"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1')", "Operation not permitted"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGTERM)", "Operation not permitted"),
        ("x = bytearray(8 << 30)", "MemoryError"),
        ("import time; time.sleep(60)", "not done after 12 s"),
        ("while True: pass", "SIG"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", "too large|wrote more than"),
        (
            "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(b'x' * (1 << 18))",
            "wrote more than 4,194,304",
        ),
        ("def f(): f()\nf()", "RecursionError"),
        ("import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) >= 0", "AssertionError"),
        ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
        (f"{CALL}p = os.getppid()\ncall(234, p, p, 9)", "Operation not permitted"),
        (f"{CALL}import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "Operation not permitted"),
        (f"{CALL}call(133, b'd', 0o60600, 0x800)", "Operation not permitted"),
        (f"{CALL}call(164, None, None)", "Operation not permitted"),
        (f"{CALL}call(161, b'.')", "Operation not permitted"),
        ("import os\nwhile True:\n    os.mkdir('a')\n    os.chdir('a')", "files and folders"),
        ("i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').close()", "files and folders"),
    ],
)
def test_what_does_harm_is_contained_and_fails(program: str, reason: str) -> None:
    outcome = run_python(program, LIMITS)
    assert not outcome.passed and re.search(reason, outcome.reason)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.fork()", "Operation not permitted"),
        ("import socket; socket.socket()", "Operation not permitted"),
        ("x = bytearray(8 << 30)", "MemoryError"),
        ("import time; time.sleep(60)", "not done after 2 s"),
    ],
)
def test_all_but_files_is_confined_without_landlock(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "LAUNCHER", without_landlock(tmp_path))
    outcome = run_python(program, replace(LIMITS, wall_s=2.0))
    assert not outcome.passed and re.search(reason, outcome.reason)


@pytest.mark.parametrize(
    "program",
    [
        "open('/etc/passwd').read()",
        "import os; os.listdir(os.path.dirname(os.getcwd()))",
        "import os; os.symlink('/etc/passwd', 'p'); open('p').read()",
    ],
)
def test_files_outside_its_folder_are_not_read(program: str, landlock: bool) -> None:
    if not landlock:
        pytest.skip("this kernel has no Landlock")
    outcome = run_python(program, LIMITS)
    assert not outcome.passed and re.search("Permission denied", outcome.reason)


@pytest.mark.parametrize("call", ["write_text('x')", "unlink()", "chmod(0o777)", "rename('mine')", "touch()"])
def test_files_outside_its_folder_stay_as_they_are(call: str, tmp_path: Path, landlock: bool) -> None:
    if not landlock:
        pytest.skip("this kernel has no Landlock")
    file = tmp_path / "kept.txt"
    file.write_text("kept")
    before = file.stat()
    outcome = run_python(f"import pathlib; pathlib.Path({str(file)!r}).{call}", LIMITS)
    assert not outcome.passed and ("denied" in outcome.reason or "not permitted" in outcome.reason)
    after = file.stat()
    assert file.read_text() == "kept" and (after.st_mode, after.st_mtime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
    )


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_python("open('a', 'w').write('x'); import os; os.mkdir('b')", LIMITS)
    run_python("import time; time.sleep(9)", Limits(wall_s=0.5))
    run_python("import os\nwhile True:\n    os.mkdir('a')\n    os.chdir('a')", LIMITS)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_confines_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "confined.py"
    text = Path(confined.__file__).read_text(encoding="utf-8")
    broken.write_text(
        text.replace("LANDLOCK_RESTRICT_SELF = 444, 445, 446", "LANDLOCK_RESTRICT_SELF = 444, 445, 9999")
    )
    monkeypatch.setattr(sandbox, "LAUNCHER", broken)
    with pytest.raises(UnsupportedError, match=r"confined here .*Landlock: .*--allow-code-execution"):
        run_python("open('/tmp/evil', 'w')")
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "aarch64")
    with pytest.raises(UnsupportedError, match=r"on Linux on x86-64 only.*found linux on aarch64"):
        run_python("pass")


def test_the_tests_of_humaneval_and_mbpp_judge_solutions(shared_data: Path) -> None:
    """Their own solutions pass, and one that returns nothing fails."""
    import json

    for name, solution, wrong in (
        ("humaneval", "canonical_solution", "    return None\n"),
        ("mbpp", "code", "def f(): pass\n"),
    ):
        lines = (shared_data / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
        for line in lines:
            row = json.loads(line)
            example = READERS["code"](row, "row")
            assert passes(example, [row[solution]]) == {"pass@1": 1.0}, row["task_id"]
            assert passes(example, [wrong]) == {"pass@1": 0.0}, row["task_id"]
