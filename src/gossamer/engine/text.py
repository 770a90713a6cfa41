"""Text as it comes out of the engine: from ids that arrive one at a time, up to a stop string."""

from collections.abc import Sequence

from gossamer.tokens.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no UTF-8 (yet)


class TextStream:
    """Text from ids that arrive one at a time: the pieces joined are `Tokenizer.decode` of all the ids.

    Text is held back while a later id could still change it: an unfinished UTF-8 character, or a run of
    SentencePiece's byte tokens (one bad byte turns the whole run into U+FFFD).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The ids given out last: decoders treat the beginning of a text otherwise than its middle.
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    @property
    def pending(self) -> str:
        """The text held back, as it would read if no further id came."""
        if not self._held:
            return ""
        return self._tokenizer.decode(self._context + self._held)[len(self._context_text) :]

    def push(self, index: int) -> str:
        """Take one id; returns the text that is now certain (often "")."""
        if self._tokenizer.is_special(index):
            return ""
        self._held.append(index)
        if self._tokenizer.may_continue(index):
            return ""
        text = self.pending
        if text.endswith(REPLACEMENT):
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        """The rest of the text, once no further id will come."""
        return self._give_out(self.pending) if self._held else ""

    def _give_out(self, text: str) -> str:
        self._context, self._held = self._held, []
        self._context_text = self._tokenizer.decode(self._context)
        return text


class StopText:
    """Text on its way to the reader; keeps back what could be the beginning of a stop string.

    No character of a stop string ever leaves, even when tokens split it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str, pending: str = "") -> str:
        """Take certain text; returns what may be shown.

        `pending` is text that comes true if generation ends now: a stop string in it ends generation.
        Afterwards `stopped` says whether a stop string was found, and everything before it has been returned.
        """
        self._held += text
        whole = self._held + pending
        start = min((at for stop in self._stops if (at := whole.find(stop)) >= 0), default=-1)
        if start >= 0:
            self.stopped = True
            self._held = ""
            return whole[:start]
        keep = self._begun(self._held)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was kept back, once no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
