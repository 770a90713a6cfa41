"""Stop strings, exactly: no character of a stop string ever leaves, even when tokens split it."""

from collections.abc import Sequence


class StopText:
    """Text on its way to the reader; keeps back what could be the beginning of a stop string."""

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
