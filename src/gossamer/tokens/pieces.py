"""Much text to token ids, a piece at a time, so that what was met before is not tokenized again.

A byte-level BPE first splits a text by a regular expression, and then merges within each piece. tokenizers
spends nearly all of its time on splitting, and text repeats its pieces: here Python splits, and a
dictionary has the ids of the pieces. The ids are tokenizers' own. A new piece is given to it, and only such
texts are split here of which that cannot change an id:

- The expression is one of those below, written anew for ASCII: of a character's class, Python and tokenizers
  could think differently.
- A piece that may go on in other characters, or depends on them, goes on to the next space that follows
  anything but white space (`_REST`): no expression below matches across that place, or looks across it.
- A text in which an added token stands is not split.
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import tokenizers

MAX_CHARACTERS = 1 << 22  # of the pieces that are kept: about 100 MB with their ids
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_NOT_A_SPACE = _WHITE.replace(" ", "")
_REST = rf"[{_WHITE}]*[^{_WHITE}]*(?:[{_NOT_A_SPACE}][{_WHITE}]*[^{_WHITE}]*)*"
_MARKS = r"\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f"  # ASCII that is no letter, digit or white space
_ENDS = r"(?![^\x00-\x7f])"  # what follows is ASCII, or nothing
_BLANKS = rf"(?=[\t-\r ]++{_ENDS})"  # white space, all of it ASCII
# Pieces of ASCII, below the expression that they stand for. A blank before a letter, digit or mark that is
# followed by other characters is left to `_REST`, as it belongs to them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_WORDS = rf"'(?:[sdmt]|ll|ve|re)|(?> ?[A-Za-z]+){_ENDS}|(?> ?[{_MARKS}]+){_ENDS}"
_GPT2_PIECES = rf"{_GPT2_WORDS}|(?> ?[0-9]+){_ENDS}|{_BLANKS}[\t-\r ]+(?![^\t-\r ])|[\t-\r](?=[!-~])"
_DIGITS_PIECES = (  # each digit is split off first, and ends the white space before it
    rf"{_GPT2_WORDS}|[0-9]|{_BLANKS}[\t-\r ]+(?=[0-9])|{_BLANKS}[\t-\r ]+(?![^\t-\r ])|[\t-\r](?=[!-~])"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LLAMA3_PIECES = (
    rf"(?>'(?:[sdmtSDMT]|[lL]{{2}}|[vrVR][eE])){_ENDS}|(?>(?![\r\n])[\t-\r {_MARKS}]?[A-Za-z]+){_ENDS}|"
    rf"(?>[0-9]{{1,3}}){_ENDS}|(?![{_MARKS}][A-Za-z])(?> ?[{_MARKS}]+[\r\n]*){_ENDS}|"
    rf"{_BLANKS}[\t-\r ]*[\r\n]+|{_BLANKS}[\t-\r ]+(?![^\t-\r ])|[\t-\r ](?=[0-9])|[\t\x0b\x0c](?=[{_MARKS}])"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_KNOWN: list[tuple[list[dict[str, Any]], str]] = [
    ([_BYTES | {"use_regex": True}], _GPT2_PIECES),
    ([_split(_GPT2), _BYTES | {"use_regex": False}], _GPT2_PIECES),
    ([_split(r"\p{N}"), _split(_GPT2), _BYTES | {"use_regex": False}], _DIGITS_PIECES),
    ([{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}], _DIGITS_PIECES),
    ([_split(_LLAMA3), _BYTES | {"use_regex": False}], _LLAMA3_PIECES),
    (
        [_split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), _BYTES | {"use_regex": False}],
        _LLAMA3_PIECES.replace("{1,3}", ""),
    ),
]


class PieceCache:
    """The ids of the pieces of texts that a tokenizer has met."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, pieces: str) -> None:
        """`pieces`: what a piece is, as a regular expression."""
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._tokenizer = tokenizer
        self._pieces = re.compile(f"{pieces}|{_REST}", re.DOTALL).findall
        self._has_added = re.compile("|".join(map(re.escape, added)) or "(?!)").search
        self._ids: dict[str, bytes] = {}
        self._num_characters = 0

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, document: Mapping[str, Any]) -> Self | None:
        """A cache for the tokenizer of a tokenizer.json, `document`; None where ids could differ by it."""
        splits = document.get("pre_tokenizer") or {}
        found = splits["pretokenizers"] if splits.get("type") == "Sequence" else [splits]
        found = [{name: value for name, value in each.items() if name != "trim_offsets"} for each in found]
        pieces = next((pieces for known, pieces in _KNOWN if known == found), None)
        model, normalizer = document["model"], document.get("normalizer") or {"type": "NFC"}
        plain = all(
            not (token.single_word or token.lstrip or token.rstrip)
            and token.content.isascii()
            and not re.search(r"\s", token.content)
            for token in tokenizer.get_added_tokens_decoder().values()
        )
        if pieces is None or not plain or normalizer != {"type": "NFC"}:
            return None
        return cls(tokenizer, pieces) if model.get("type") == "BPE" and not model.get("dropout") else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [n], as tokenizers makes them without its post-processor."""
        pieces = [[text] if self._has_added(text) else self._pieces(text) for text in texts]
        met, ids = set().union(*pieces), self._ids
        new = met - ids.keys()
        if self._num_characters + sum(map(len, new)) > MAX_CHARACTERS:
            self._ids, self._num_characters, new = (ids := {}), 0, met
        self._num_characters += sum(map(len, new))
        for piece, found in zip(
            new, self._tokenizer.encode_batch_fast([*new], add_special_tokens=False), strict=True
        ):
            ids[piece] = array("i", found.ids).tobytes()
        return [np.frombuffer(b"".join(map(ids.__getitem__, each)), np.int32) for each in pieces]
