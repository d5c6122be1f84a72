"""Stop strings in text that arrives in pieces: nothing that may be the beginning of one is let out."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts a stream of pieces before the stop string that is first complete, wherever its characters are split.

    >>> text = StopStrings(["END"])
    >>> [text.push(piece) for piece in ("one E", "N", "two ", "EN", "D three")], text.found
    (['one ', '', 'ENtwo ', '', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take a piece; returns the text that is now certain to come before any stop string."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def end(self) -> str:
        """No more pieces: what was held back was no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
