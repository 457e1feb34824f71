"""A JSON list read element by element: Python's own decoder reads a text only as a whole."""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

_BEHIND = tuple(" \t\n\r,]")  # what may stand behind an element
_SPACE = re.compile(r"[ \t\n\r]*")
_READ = 1 << 20  # characters at a time, or as many as are held, so that a long element is not tried too often


class NotJson(Exception):
    """The text is not a JSON list."""


class JsonList:
    """The list in `file`. Of its text one element is held, and what was read with it."""

    def __init__(self, file: "IO[str] | Any") -> None:
        self._file, self._held, self._at = file, "", 0
        self._decoder = json.JSONDecoder()

    def elements(self) -> Iterator[Any]:
        """Raises NotJson where the text is not a list, after the elements before the fault."""
        self._expect("[")
        if self._next() != "]":
            yield self._element()
        while self._next() == ",":
            self._expect(",")
            yield self._element()
        self._expect("]")
        if self._next():
            raise NotJson

    def _next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read():
                return ""

    def _expect(self, mark: str) -> None:
        if self._next() != mark:
            raise NotJson
        self._at += 1

    def _element(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except (ValueError, RecursionError):  # or its end is not read yet
                if not self._read():
                    raise NotJson from None
                continue
            if self._held[end : end + 1] in _BEHIND or not self._read():  # of a number there may be more
                self._at = end
                return value

    def _read(self) -> bool:
        more = self._file.read(max(_READ, len(self._held) - self._at))
        self._held, self._at = self._held[self._at :] + more, 0
        return bool(more)
