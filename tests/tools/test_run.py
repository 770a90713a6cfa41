"""`run`: completions, answers and talks, in real terminals and pipes."""

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams
from gossamer.errors import ConfigError
from gossamer.job.report import Event
from gossamer.packed.from_checkpoint import pack_checkpoint
from gossamer.runs.recovery import SHIPPED
from gossamer.tools.conversation import Conversation

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a: "
GOSSAMER = [sys.executable, "-m", "gossamer"]
INTERRUPTS_ITSELF = """
import os, signal, sys
from gossamer import cli
from gossamer.tools import run

class Interrupting(run.Conversation):
    def answer(self, text):
        for number, piece in enumerate(super().answer(text)):
            yield piece
            if number == 2 and text == "a":
                os.kill(os.getpid(), signal.SIGINT)

run.Conversation = Interrupting
sys.exit(cli.call(["run", *sys.argv[1:]]))
"""

CTRL_C = b"\x03"


@pytest.fixture(scope="session")
def plain(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model without a chat template, whose greedy text goes on to the end of its context."""
    file = tmp_path_factory.mktemp("run") / "plain.goss"
    pack_checkpoint(Checkpoint.open(tiny_llama("llama2")), file)
    return file


@pytest.fixture(scope="session")
def chatty(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template; its context holds 512 tokens."""
    source = tmp_path_factory.mktemp("chatty")
    for file in tiny_llama("llama2").iterdir():
        (source / file.name).symlink_to(file)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    file = source.parent / "chatty.goss"
    pack_checkpoint(Checkpoint.open(source), file)
    return file


def talk(
    arguments: Sequence[str], steps: Sequence[tuple[str, bytes]], command: Sequence[str] = GOSSAMER
) -> tuple[str, int]:
    """Run in a terminal of its own: wait for each text and type the answer; what was shown, and the code."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(sys.executable, [*command, *arguments], os.environ | {"GOSSAMER_THREADS": "1"})
    shown, seen, deadline = "", 0, time.monotonic() + 120
    waiting, typed, silent = [*steps, ("\0never", b"")], b"", 0
    while waiting and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            silent = 0
            with contextlib.suppress(OSError):  # the child has gone
                if piece := os.read(terminal, 4096):
                    shown += piece.decode(errors="replace")
                    while (place := shown.find(waiting[0][0], seen)) >= 0:
                        seen = place + len(waiting[0][0])
                        typed = waiting.pop(0)[1]
                        os.write(terminal, typed)
                    continue
            break
        silent += 1
        if typed == CTRL_C and silent % 50 == 0:
            os.write(terminal, typed)  # again: readline loses one between its prompt and its wait for keys
    os.close(terminal)
    assert time.monotonic() < deadline, shown
    return shown.replace("\r", ""), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_talk_keeps_its_history_and_ends_at_quit(chatty: Path) -> None:
    llm = LLM(chatty, 1)
    params = SamplingParams(max_tokens=8)
    first = llm.chat([{"role": "user", "content": "hello"}], params).text
    history = [{"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    second = llm.chat([{"role": "user", "content": "hello"}, *history], params).text
    alone = llm.chat([{"role": "user", "content": "more"}], params).text
    assert second != alone
    steps = [("> ", b"hello\n"), ("\n> ", b"more\n"), ("\n> ", b"\n"), ("> ", b"/clear\n")]
    steps += [("> ", b"more\n"), ("\n> ", b"/nonsense\n"), ("> ", b"/quit\n")]
    shown, code = talk(["run", str(chatty), "--max-tokens", "8"], steps)
    assert code == 0
    expected = [text.replace("\r", "") for text in (first, second, alone)]
    places = [shown.index(text) for text in expected]
    assert places == sorted(places) and "/nonsense is no command" in shown


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_program(chatty: Path) -> None:
    whole = LLM(chatty, 1).chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=None)).text
    steps = [("> ", CTRL_C), ("> ", b"a\n"), ("\n> ", b"b\n"), ("\n> ", b"\x04")]
    shown, code = talk([str(chatty)], steps, [sys.executable, "-c", INTERRUPTS_ITSELF])
    assert code == 0 and "Traceback" not in shown
    answer = shown.split("> a\n")[1].split("\n> b\n")[0]
    assert (
        answer.strip()
        and whole.replace("\r", "").startswith(answer.rstrip("\n"))
        and len(answer) < len(whole)
    )


def test_there_is_no_talking_to_a_model_without_a_template(plain: Path) -> None:
    shown, code = talk(["run", str(plain)], [])
    assert code == 2 and "no chat template" in shown and "give a PROMPT" in shown
    shown, code = talk(["run", str(SHIPPED), "--json"], [])
    assert code == 2 and "--json" in shown


def gossamer(
    *words: str | bytes, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*GOSSAMER, *words], input=stdin, capture_output=True, env=os.environ | environment, timeout=120
    )


@pytest.mark.parametrize("stdin", [b"def f", b"def f\n", b"def f\r\n"])
def test_a_prompt_may_come_on_stdin(plain: Path, stdin: bytes) -> None:
    [expected] = LLM(plain, 1).generate("def f", SamplingParams(max_tokens=6))
    found = gossamer("run", str(plain), "--max-tokens", "6", stdin=stdin)
    assert (found.returncode, found.stdout.decode()) == (0, expected.text + "\n")


@pytest.mark.parametrize("stdin", [b"", b"\n"])
def test_nothing_on_stdin_is_no_prompt(plain: Path, stdin: bytes) -> None:
    found = gossamer("run", str(plain), stdin=stdin)
    assert found.returncode == 2 and b"nothing came on stdin" in found.stderr


def test_bytes_that_are_no_text_are_replaced(plain: Path) -> None:
    [expected] = LLM(plain, 1).generate("a\ufffd", SamplingParams(max_tokens=6))
    for words, stdin in (([b"a\xff"], b""), ([], b"a\xff")):
        found = gossamer("run", str(plain), *words, "--max-tokens", "6", "--stop", b"\xfeq", stdin=stdin)
        assert (found.returncode, found.stdout.decode()) == (0, expected.text + "\n"), found.stderr
    for words in ([b"run", b"\xff.goss", b"a"], [b"inspect", b"no\xe9"], [b"\xff"], [b"run", b"--\xff"]):
        found = gossamer(*words)
        assert found.returncode == 2 and b"Traceback" not in found.stderr
        found.stderr.decode()


def test_an_output_that_cannot_write_every_letter(plain: Path) -> None:
    [expected] = LLM(plain, 1).generate("a", SamplingParams(max_tokens=40))
    assert not expected.text.isascii()
    for encoding in ("latin-1", "ascii"):
        found = gossamer("run", str(plain), "a", "--max-tokens", "40", PYTHONIOENCODING=encoding)
        assert (found.returncode, found.stderr) == (0, b"")
        assert found.stdout == (expected.text + "\n").encode(encoding, errors="replace")
        assert gossamer("inspect", str(plain), PYTHONIOENCODING=encoding).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["run", "{}", "a", "--max-tokens", "300"],
        ["run", "{}", "a", "--json"],
        ["inspect", "{}"],
        ["run", "-h"],
        [],
    ],
)
def test_a_reader_that_has_gone_ends_us_without_a_word(plain: Path, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*GOSSAMER, *(word.format(plain) for word in words)]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, b"")


def test_a_model_that_says_nothing_is_told_of(chatty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [first] = LLM(chatty, 1).generate("a", SamplingParams(max_tokens=1))
    words = ["run", str(chatty), "a", "--max-tokens", "4"]
    assert cli.call([*words, "--stop-token-ids", str(first.token_ids[0])]) == 0
    shown = capsys.readouterr()
    assert shown.out == "\n" and "ended at once" in shown.err and "--chat" in shown.err
    assert cli.call([*words, "--chat"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() and shown.err == ""
    assert cli.call([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(line["text"] for line in lines if "text" in line) and "event" in lines[0]


def test_the_models_own_options_are_used_and_named(
    tiny_llama: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in tiny_llama("llama2").iterdir():
        if file.name != "generation_config.json":
            (source / file.name).symlink_to(file)
    (source / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 9}')
    goss = tmp_path / "m.goss"
    pack_checkpoint(Checkpoint.open(source), goss)
    llm = LLM(goss, 1)
    words = ["run", str(goss), "a", "--max-tokens", "12", "--seed", "4"]
    ways: list[tuple[list[str], dict[str, Any]]] = [
        ([], {"temperature": 0.7, "top_k": 9}),
        (["--temperature", "0"], {}),
        (["--top-k", "0"], {"temperature": 0.7}),
        (["--generation-config", "none"], {}),
    ]
    for more, options in ways:
        assert cli.call([*words, *more]) == 0
        shown = capsys.readouterr()
        [expected] = llm.generate("a", SamplingParams(max_tokens=12, seed=4, **options))
        assert shown.out == expected.text + "\n"
        assert ("temperature 0.7, top_k 9" in shown.err) == ("none" not in more)


def test_the_oldest_turns_make_room(chatty: Path) -> None:
    said: list[Event] = []
    talked = Conversation(LLM(chatty, 1), SamplingParams(max_tokens=20), said.append)
    for turn in range(8):
        assert "".join(piece.text for piece in talked.answer(f"{turn} " * 30))
    assert said and all("oldest turn" in event.message and event.lasting for event in said)
    assert [message["role"] for message in talked.messages[:2]] == ["user", "assistant"]
    assert talked.messages[-2]["content"].startswith("7 ") and len(talked.messages) < 16
    before = [*talked.messages]
    with pytest.raises(ConfigError, match="context holds 512"):
        list(talked.answer("long " * 500))
    assert "".join(piece.text for piece in talked.answer("b"))
    assert talked.messages[-2]["content"] == "b" and len(talked.messages) <= len(before) + 2
    talked.clear()
    assert talked.messages == []


def test_what_was_said_of_a_stopped_answer_is_remembered(chatty: Path) -> None:
    talked = Conversation(LLM(chatty, 1), SamplingParams(max_tokens=None))
    answer = talked.answer("a")
    said = next(answer).text + next(answer).text
    answer.close()
    assert talked.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    assert next(talked.answer("b")).text
