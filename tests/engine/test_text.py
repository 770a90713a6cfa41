"""Stop strings against the plain definition: the text before the first one, however it is cut into pieces."""

import random

from gossamer.engine.text import StopText


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


def test_a_stop_in_text_that_is_not_certain_yet_ends_generation() -> None:
    text = StopText(["\n\n"])
    assert text.push("a\n", pending="") == "a"
    assert text.push("", pending="\n") == ""
    assert text.stopped
