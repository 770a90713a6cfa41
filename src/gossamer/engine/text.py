"""Text as it comes out of the engine: from ids that arrive one at a time, up to a stop string."""

from collections.abc import Mapping, Sequence

from gossamer.tokens.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no UTF-8 (yet)
CHARACTER_BYTES = 4  # of the longest character in UTF-8
MOST_HELD = 2 * CHARACTER_BYTES  # ids that are decoded again with every new one
FIRST_MARK = 0xD800  # surrogates stand for special tokens in StopText: no decoded text holds one


class TextStream:
    """Text from ids that arrive one at a time, each character as soon as all of its bytes are there.

    The pieces joined are `Tokenizer.decode` of all the ids, with one exception: among SentencePiece's byte
    tokens, a byte that is part of no character becomes U+FFFD by itself, where `decode` does that to the
    whole run of bytes around it, however long. The work for an id does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The ids given out last: decoders treat the beginning of a text otherwise than its middle.
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []  # ids after these, whose text is not complete
        self._num_given = 0  # characters of that text that are out already
        self._bytes = bytearray()  # the beginning of a character in byte tokens, and their ids
        self._byte_ids: list[int] = []
        ids = [tokenizer.byte_id(byte) for byte in REPLACEMENT.encode()]
        self._replacement_ids = [] if None in ids else [index for index in ids if index is not None]

    def push(self, index: int) -> str:
        """Take one id; returns the text that is now certain (often "")."""
        if self._tokenizer.is_special(index):
            return ""
        byte = self._tokenizer.byte_value(index)
        if byte is None:
            return self._broken(len(self._bytes)) + self._take([index])
        self._bytes.append(byte)
        self._byte_ids.append(index)
        text = ""
        while self._bytes:
            try:
                self._bytes.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text += self._broken(error.end)
            else:
                text += self._take(self._byte_ids)
                self._bytes, self._byte_ids = bytearray(), []
        return text

    def flush(self) -> str:
        """The rest of the text, once no further id will come."""
        return self._complete() + self._broken(len(self._bytes))

    def _take(self, ids: Sequence[int]) -> str:
        """Add ids; returns their text but for a last character that may be unfinished."""
        self._held += ids
        text = self._held_text()
        if not text.endswith(REPLACEMENT):
            return self._give_out(text)
        new = text[self._num_given : -1]
        self._num_given = len(text) - 1
        if len(self._held) > MOST_HELD:  # bytes that are no UTF-8: go on from the last few of them
            self._begin_after(self._held[-CHARACTER_BYTES:])
            self._context_text = self._context_text[:-1]
        return new

    def _complete(self) -> str:
        """Give out all of the text held back."""
        return self._give_out(self._held_text())

    def _give_out(self, text: str) -> str:
        new = text[self._num_given :]
        self._begin_after(self._held or self._context)
        return new

    def _broken(self, count: int) -> str:
        """Give out U+FFFD for each of the first `count` bytes held, which are part of no character."""
        if not count:
            return ""
        new = self._complete() + REPLACEMENT * count
        del self._bytes[:count], self._byte_ids[:count]
        self._begin_after(self._replacement_ids)
        return new

    def _begin_after(self, ids: list[int]) -> None:
        self._context, self._held, self._num_given = ids, [], 0
        self._context_text = self._tokenizer.decode(ids)

    def _held_text(self) -> str:
        return self._tokenizer.decode(self._context + self._held)[len(self._context_text) :]


class StopText:
    """Text on its way to the reader; keeps back what could be the beginning of a stop string.

    No character of a stop string ever leaves, even when tokens split it. A stop string may hold special
    tokens, which are not part of the text: see `marks`.
    """

    def __init__(self, stops: Sequence[str], special_ids: Mapping[str, int] | None = None) -> None:
        """`special_ids`: the text of each special token -> its id."""
        found = [text for text in special_ids or {} if text and any(text in stop for stop in stops)]
        named = sorted(found, key=len, reverse=True)
        marked = {text: chr(FIRST_MARK + number) for number, text in enumerate(named)}
        self._stops = tuple(dict.fromkeys([*stops, *(_replaced(stop, marked) for stop in stops)]))
        self._unmarked = str.maketrans(dict.fromkeys(marked.values()))
        self._held = ""
        self.stopped = False
        self.marks = {(special_ids or {})[text]: mark for text, mark in marked.items()}
        """The id of each special token that a stop string holds -> what to push when it comes."""

    def push(self, text: str) -> str:
        """Take text; returns what may be shown.

        Afterwards `stopped` says whether a stop string was found, and everything before it has been returned.
        """
        self._held += text
        start = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if start >= 0:
            self.stopped, self._held = True, self._held[:start]
            return self.flush()
        return self._show(len(self._held) - self._begun(self._held))

    def flush(self) -> str:
        """What was kept back, once no more text comes."""
        return self._show(len(self._held))

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown.translate(self._unmarked) if self.marks else shown

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _replaced(text: str, marked: Mapping[str, str]) -> str:
    for special, mark in marked.items():
        text = text.replace(special, mark)
    return text
