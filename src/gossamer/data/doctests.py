"""Generated doctests: small Python expressions and what the real interpreter prints for them.

A `Doctest` is one line such as `>>> sorted("bca")` with its answer. Every instance belongs to the train or
the test split by a hash of its text, so the two are disjoint however they are drawn. `KINDS` are trained on;
`UNSEEN_KINDS`, their relatives, never are.
"""

from __future__ import annotations

import doctest
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gossamer.errors import ConfigError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEST_SHARE = 0.2
DOCTESTS_A_DOCUMENT = 16
MAX_DRAWS_A_DOCTEST = 1000
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Doctest:
    """An expression of a kind and the line that the interpreter prints for it."""

    kind: str
    source: str
    want: str


def _word(chance: random.Random, shortest: int, longest: int, letters: str = LETTERS) -> str:
    return "".join(chance.choices(letters, k=chance.randint(shortest, longest)))


def _numbers(chance: random.Random, shortest: int, longest: int, limit: int) -> list[int]:
    return [chance.randrange(limit) for _ in range(chance.randint(shortest, longest))]


def _few_letters(chance: random.Random) -> str:
    """Two letters, so that words made of them repeat letters."""
    return "".join(chance.sample(LETTERS, 2))


def _index(chance: random.Random) -> str:
    word = _word(chance, 3, 6)
    return f'"{word}"[{chance.choice([*range(len(word)), -1])}]'


def _slice(chance: random.Random) -> str:
    word = _word(chance, 3, 6)
    start = chance.randrange(len(word) - 1)
    return f'"{word}"[{start}:{chance.randint(start + 1, len(word))}]'


def _sorted(chance: random.Random) -> str:
    return f'sorted("{_word(chance, 2, 4)}")'


def _case(chance: random.Random) -> str:
    method = chance.choice(["upper", "lower", "title"])
    word = _word(chance, 2, 6)
    return f'"{word.upper() if method == "lower" else word}".{method}()'


def _len(chance: random.Random) -> str:
    if chance.random() < 0.5:
        return f'len("{_word(chance, 1, 8)}")'
    return f"len({_numbers(chance, 1, 6, 10)})"


def _extreme(chance: random.Random) -> str:
    return f"{chance.choice(['max', 'min'])}({_numbers(chance, 2, 3, 100)})"


def _add(chance: random.Random) -> str:
    return f"{chance.randrange(100)} + {chance.randrange(10)}"


def _contains(chance: random.Random) -> str:
    word = _word(chance, 2, 6)
    letter = chance.choice(word) if chance.random() < 0.5 else chance.choice(LETTERS)
    return f'"{letter}" in "{word}"'


def _replace(chance: random.Random) -> str:
    letters = _few_letters(chance)
    word = _word(chance, 2, 5, letters + chance.choice(LETTERS))
    return f'"{word}".replace("{letters[0]}", "{chance.choice(LETTERS)}")'


def _count(chance: random.Random) -> str:
    letters = _few_letters(chance)
    return f'"{_word(chance, 2, 6, letters)}".count("{letters[0]}")'


def _reverse(chance: random.Random) -> str:
    return f"{_numbers(chance, 2, 5, 10)}[::-1]"


def _range(chance: random.Random) -> str:
    start = chance.randrange(95)
    return f"list(range({start}, {start + chance.randint(1, 5)}))"


def _compare(chance: random.Random) -> str:
    return f"{chance.randrange(100)} {chance.choice(['<', '>'])} {chance.randrange(100)}"


def _lookup(chance: random.Random) -> str:
    keys = chance.sample(LETTERS, chance.randint(2, 4))
    table = ", ".join(f'"{key}": {chance.randrange(10)}' for key in keys)
    return f'{{{table}}}["{chance.choice(keys)}"]'


def _join(chance: random.Random) -> str:
    words = ", ".join(f'"{_word(chance, 1, 2)}"' for _ in range(chance.randint(2, 3)))
    return f'"{chance.choice("-+.")}".join([{words}])'


def _reverse_text(chance: random.Random) -> str:
    return f'"{_word(chance, 3, 5)}"[::-1]'


def _largest_letter(chance: random.Random) -> str:
    return f'max("{_word(chance, 3, 5)}")'


EXPRESSIONS: dict[str, Callable[[random.Random], str]] = {
    "index": _index,
    "slice": _slice,
    "sorted": _sorted,
    "case": _case,
    "len": _len,
    "extreme": _extreme,
    "add": _add,
    "contains": _contains,
    "replace": _replace,
    "count": _count,
    "reverse": _reverse,
    "range": _range,
    "compare": _compare,
    "lookup": _lookup,
    "join": _join,
    "reverse-text": _reverse_text,
    "largest-letter": _largest_letter,
}
UNSEEN_KINDS = ("reverse-text", "largest-letter")
KINDS = tuple(kind for kind in EXPRESSIONS if kind not in UNSEEN_KINDS)


def generate(kinds: Sequence[str], num: int, seed: int, split: Split = "train") -> list[Doctest]:
    """`num` examples, the kinds in turn; no example twice in the test split.

    Raises ConfigError on an unknown kind, or when a kind has too few different examples.
    """
    unknown = sorted(set(kinds) - set(EXPRESSIONS))
    if unknown or not kinds:
        raise ConfigError(f"doctest kinds {unknown or 'none given'}; known are {', '.join(EXPRESSIONS)}")
    chance = random.Random(f"{seed} {split}")
    used: set[str] | None = set() if split == "test" else None
    return [_draw(kinds[number % len(kinds)], chance, split, used) for number in range(num)]


def _draw(kind: str, chance: random.Random, split: Split, used: set[str] | None) -> Doctest:
    for _ in range(MAX_DRAWS_A_DOCTEST):
        source = EXPRESSIONS[kind](chance)
        if split_of(source) != split or (used is not None and source in used):
            continue
        if used is not None:
            used.add(source)
        return Doctest(kind, source, repr(eval(source, {})))  # the text is ours: see EXPRESSIONS
    raise ConfigError(f"doctest kind {kind!r} has no more examples in the {split} split; ask for fewer")


def number_and_seed(source: str) -> tuple[int | None, int]:
    """(number or None, seed) of the source python:doctests[:NUM[:SEED]]; ConfigError for another form."""
    fields = source.split(":")[2:]
    if len(fields) > 2 or not all(field.isdecimal() for field in fields) or source.count("doctests:") > 1:
        raise ConfigError(f"dataset {source!r}: expected python:doctests[:NUM[:SEED]]")
    numbers = [int(field) for field in fields]
    if numbers and numbers[0] < 1:
        raise ConfigError(f"dataset {source!r}: expected at least 1 doctest; leave the number out for many")
    return (numbers[0] if numbers else None), (numbers[1] if len(numbers) > 1 else 0)


def split_of(source: str) -> Split:
    """The split that an expression belongs to, by the hash of its text."""
    digest = hashlib.sha256(source.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def documents(seed: int) -> Iterator[str]:
    """Sessions of `DOCTESTS_A_DOCUMENT` examples of the trained kinds in random order, without end."""
    chance = random.Random(f"{seed} documents")
    while True:
        kinds = chance.choices(KINDS, k=DOCTESTS_A_DOCUMENT)
        session = (_draw(kind, chance, "train", None) for kind in kinds)
        yield "".join(prompt(item) + answer(item) for item in session)


def prompt(item: Doctest) -> str:
    """What the model is given."""
    return f">>> {item.source}\n"


def answer(item: Doctest) -> str:
    """What the model should go on with."""
    return f"{item.want}\n"


def check(item: Doctest, got: str) -> bool:
    """Whether the doctest module accepts a model's line (with or without its newline) as the answer."""
    flags = doctest.DONT_ACCEPT_TRUE_FOR_1 | doctest.DONT_ACCEPT_BLANKLINE
    return doctest.OutputChecker().check_output(answer(item), got.removesuffix("\n") + "\n", flags)
