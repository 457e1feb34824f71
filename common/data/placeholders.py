"""Placeholders for what the turns of a row say: they show where a template writes it, and what it strips of it."""

import re
from bisect import bisect_right
from collections.abc import Iterator

from common.data.chat_template import PLACEHOLDER, Message
from common.data.turn_edges import Unlabeled

# How templates strip a text.
_STRIPPED = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lstrip(),
    lambda text: text.rstrip(),
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


class Placeholders:
    """The messages with placeholders for what the assistant says and thinks, and with `every` for what others say.

    messages: so masked. originals: the text behind each placeholder.
    """

    def __init__(self, messages: list[Message], every: bool) -> None:
        salt = ""
        while any(_holds(message, f"qTWINTUNE{salt}q") for message in messages):
            salt += "x"
        self.originals: dict[str, str] = {}
        self.messages = [self._masked(message, number, salt, every) for number, message in enumerate(messages)]
        self._pattern = re.compile(rf"qTWINTUNE{salt}q(\d+)q[cr]")

    def _masked(self, message: Message, number: int, salt: str, every: bool) -> Message:
        if message["role"] != "assistant" and not (every and message["role"] in ("system", "user")):
            return message
        keys = [key for key in ("content", "reasoning_content") if message.get(key)]
        names = {key: PLACEHOLDER.format(salt, number, key[0]) for key in keys}
        self.originals |= {name: message[key] for key, name in names.items()}
        return message | names

    def found(self, text: str) -> Iterator[re.Match[str]]:
        """Where `text` has placeholders, each with the number of its message as group 1."""
        return self._pattern.finditer(text)

    def contents(self, masked: str, text: str) -> dict[str, str]:
        """The text in place of each placeholder of `masked`: what the turn says, as the template strips it.

        Raises Unlabeled where `text` is not `masked` with such texts in place, to the letter.
        """
        found: dict[str, str] = {}
        places = list(self.found(masked))
        at = places[0].start() if places else len(masked)
        if not text.startswith(masked[:at]):
            raise Unlabeled("the template renders the row differently for other answers")
        for place, end in zip(places, [*(place.start() for place in places[1:]), len(masked)], strict=False):
            literal = masked[place.end() : end]
            variants = (strip(self.originals[place[0]]) for strip in _STRIPPED)
            content = next((variant for variant in variants if text.startswith(variant + literal, at)), None)
            if content is None:
                raise Unlabeled("the template changes the assistant's text")
            if place[0] in found:
                raise Unlabeled("the template writes an answer twice")
            found[place[0]] = content
            at += len(content) + len(literal)
        if at != len(text):
            raise Unlabeled("the template renders the row differently for other answers")
        return found


def _holds(message: Message, text: str) -> bool:
    """Whether a value of the message, or a part of it, has the text; `str` of a long text takes its time."""
    return any(text in (value if isinstance(value, str) else str(value)) for value in message.values())


class Filled:
    """A masked text with its placeholders replaced, and where each position in it has moved to."""

    def __init__(self, masked: str, placeholders: Placeholders, contents: dict[str, str]) -> None:
        parts, at, growth = list[str](), 0, 0
        self._ends, self._growths = [0], [0]
        for place in placeholders.found(masked):
            content = contents[place[0]]
            parts += [masked[at : place.start()], content]
            at, growth = place.end(), growth + len(content) - len(place[0])
            self._ends.append(at)
            self._growths.append(growth)
        self.text = "".join([*parts, masked[at:]])

    def moved(self, at: int) -> int:
        """The position in `text` of position `at` in the masked text."""
        return at + self._growths[bisect_right(self._ends, at) - 1]
