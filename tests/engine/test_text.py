"""Streams of ids against their whole text, and stop strings against the plain definition of one."""

import random
import re
from collections.abc import Callable

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alphabets import byte_level, sentencepiece
from gossamer.engine.text import StopText, TextStream
from gossamer.tokens.tokenizer import Tokenizer

BYTE_LETTERS = bytes_to_unicode()


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    text = StopText(stops)
    shown = []
    for piece in pieces:
        shown.append(text.push(piece))
        if text.stopped:
            return shown, True
    return [*shown, text.flush()], False


def test_every_cut_shows_exactly_the_text_before_the_first_stop() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        pieces = ["".join(draw.choices("ab\n", k=draw.randint(0, 3))) for _ in range(12)]
        shown, stopped = run(stops, pieces)
        # The first stop is the one completed by the earliest piece; in that piece, the one that begins first.
        expected, found = "".join(pieces), False
        for count in range(1, len(pieces) + 1):
            starts = [at for stop in stops if (at := "".join(pieces[:count]).find(stop)) >= 0]
            if starts:
                expected, found = "".join(pieces)[: min(starts)], True
                break
        assert ("".join(shown), stopped) == (expected, found)


def test_text_is_shown_as_soon_as_it_cannot_begin_a_stop() -> None:
    assert run(["###"], ["a#", "#b", "c##", "#d"]) == (["a", "##b", "c", ""], True)
    assert run([], ["a", "b"]) == (["a", "b", ""], False)


def by_single_bytes(tokenizer: Tokenizer, ids: list[int]) -> str:
    """`decode`, but where byte tokens follow each other a broken one does not break those around it."""
    kept: list[int] = []
    run = bytearray()
    for index in [*(index for index in ids if not tokenizer.is_special(index)), -1]:
        byte = None if index < 0 else tokenizer.byte_value(index)
        if byte is not None:
            run.append(byte)
            continue
        text = re.sub("[\udc80-\udcff]", "\ufffd", run.decode(errors="surrogateescape"))
        kept += [tokenizer.byte_id(byte) or 0 for byte in text.encode()]
        run.clear()
        if index >= 0:
            kept.append(index)
    return tokenizer.decode(kept)


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_each_character_is_shown_with_its_last_byte(make: Callable[[str], Tokenizer]) -> None:
    tokenizer = make("abcdefgh")
    text = "a สวัสดี 🦙🦙 b\n東é"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    given = ""
    for index, token in enumerate(ids):
        given += stream.push(token)
        assert given == tokenizer.decode(ids[: index + 1]).rstrip("\ufffd") or given == text[: len(given)]
        left = tokenizer.decode(ids[index + 1 :])
        assert len(given) >= len(text) - len(left) - 1
    assert given == text == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_random_ids_stream_to_their_text(make: Callable[[str], Tokenizer]) -> None:
    tokenizer, draw = make("abcdefgh"), random.Random(0)
    valid = tokenizer.encode("é🦙ก\ufffd", bos=False)
    for _ in range(400):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 40))]
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(ids))
            ids[at:at] = valid[: draw.randrange(len(valid) + 1)]
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        expected = by_single_bytes(tokenizer, ids) if make is sentencepiece else tokenizer.decode(ids)
        assert "".join(pieces) + stream.flush() == expected


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
@pytest.mark.parametrize("text", [b"\x80", b"\xe0\xb8\x81", b"\xf0", b"\xef\xbf\xbd", b"a\xff"])
def test_the_work_for_an_id_does_not_grow_with_the_text(
    make: Callable[[str], Tokenizer], text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the bytes go on, valid or not, few ids are decoded again, and text is not held back."""
    tokenizer = make("abc")
    names = [f"<0x{byte:02X}>" if make is sentencepiece else BYTE_LETTERS[byte] for byte in text]
    ids = [tokenizer._tokenizer.token_to_id(name) or 0 for name in names] * 300
    decoded: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stream, given = TextStream(tokenizer), ""
    for count, index in enumerate(ids, 1):
        given += stream.push(index)
        assert len(given) >= len(decode(ids[:count])) - 2 or make is sentencepiece
    assert max(decoded) <= 20
    assert len(given + stream.flush()) >= 300
    assert sum(decoded) <= 60 * len(ids)


def test_a_stop_string_may_hold_special_tokens() -> None:
    tokenizer = sentencepiece("abcdefgh")
    stop = StopText(["</s>", "a</s>b", "b<s>"], tokenizer.special_ids)
    assert set(stop.marks) == {1, 2}
    assert stop.push("xa") == "x"
    assert stop.push(stop.marks[2]) == "a" and stop.stopped
    stop = StopText(["a</s>b", "</s>c"], tokenizer.special_ids)
    assert [stop.push(text) for text in ("xa", stop.marks[2], "d", "a", stop.marks[2], "b")] == [
        "x",
        "",
        "ad",
        "",
        "",
        "",
    ]
    assert stop.stopped
    stop = StopText(["</s>"], tokenizer.special_ids)
    assert stop.push("in </s> letters") == "in " and stop.stopped
    assert not StopText(["a"], tokenizer.special_ids).marks
