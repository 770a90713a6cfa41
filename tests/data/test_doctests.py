"""Generated doctests against Python's own doctest module."""

import doctest
from itertools import islice

import pytest

from gossamer.data import doctests
from gossamer.errors import ConfigError

ALL_KINDS = doctests.KINDS + doctests.UNSEEN_KINDS


def failures(text: str) -> int:
    """How many examples of a session the standard doctest module refutes."""
    test = doctest.DocTestParser().get_doctest(text, {}, "session", None, 0)
    assert test.examples
    return doctest.DocTestRunner(verbose=False).run(test, out=lambda line: None).failed


def test_every_answer_is_what_the_doctest_module_expects() -> None:
    for split in ("train", "test"):
        items = doctests.generate(ALL_KINDS, 20 * len(ALL_KINDS), seed=3, split=split)
        assert {item.kind for item in items} == set(ALL_KINDS)
        assert failures("".join(doctests.prompt(item) + doctests.answer(item) for item in items)) == 0


def test_the_doctest_module_would_notice_a_wrong_answer() -> None:
    assert failures(">>> sorted(\"bca\")\n['a', 'b', 'd']\n") == 1


def test_train_and_test_instances_are_disjoint() -> None:
    train = {item.source for seed in (0, 1) for item in doctests.generate(ALL_KINDS, 20_000, seed)}
    train |= {
        line[4:] for text in islice(doctests.documents(5), 500) for line in text.splitlines() if ">>>" in line
    }
    test = [item.source for item in doctests.generate(ALL_KINDS, 50 * len(ALL_KINDS), 0, "test")]
    assert len(set(test)) == len(test)
    assert not train & set(test)


def test_unseen_kinds_are_in_no_document() -> None:
    text = "".join(islice(doctests.documents(0), 2000))
    assert '"[::-1]' not in text and 'max("' not in text
    assert "][::-1]" in text and "max([" in text


def test_same_seed_same_examples_and_each_kind_its_share() -> None:
    items = doctests.generate(doctests.KINDS, 300, 1, "test")
    assert items == doctests.generate(doctests.KINDS, 300, 1, "test")
    assert items != doctests.generate(doctests.KINDS, 300, 2, "test")
    assert {sum(item.kind == kind for item in items) for kind in doctests.KINDS} == {
        300 // len(doctests.KINDS)
    }


@pytest.mark.parametrize(
    ("want", "got", "right"),
    [
        ("'abc'", "'abc'", True),
        ("'abc'", "'abc'\n", True),
        ("'abc'", '"abc"', False),
        ("'abc'", "abc", False),
        ("'abc'", "'abc'\n\n", False),
        ("'abc'", "'abc' ", False),
        ("1", "True", False),
        ("0", "False", False),
        ("12", "1", False),
        ("[1, 2]", "[1,2]", False),
        ("''", "", False),
    ],
)
def test_check_accepts_only_the_line_that_the_interpreter_prints(want: str, got: str, right: bool) -> None:
    assert doctests.check(doctests.Doctest("any", "...", want), got) is right


def test_unknown_kinds_and_too_many_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['integral'\].*known are index"):
        doctests.generate(["index", "integral"], 2, 0)
    with pytest.raises(ConfigError, match="'add' has no more examples in the test split"):
        doctests.generate(["add"], 1000, 0, "test")
