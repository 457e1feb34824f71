"""A chat's prompts as the texts around the contents of its turns, and the Go template for Ollama that writes the same.

The export compares `TurnTexts.prompt` with the chat template. That `TurnTexts.go_template` writes the same prompts is
held by tests, which execute it for every known chat template and for random texts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from common.data.chat_template import Message
from common.data.turn_edges import common_prefix


@dataclass(frozen=True)
class TurnTexts:
    """What a prompt has before and after the contents of its turns.

    opening: before a user's turn that is the first, such as a BOS. generation: the generation prompt, after the last
    turn where that is a user's, and before an unfinished answer. system_turn: whether a system text has a turn of its
    own; else it stands within the first user's turn, where `user_start` does not follow it.
    """

    system_start: str
    system_end: str
    opening: str
    user_start: str
    user_end: str
    assistant_start: str
    assistant_end: str
    generation: str
    system_turn: bool

    @classmethod
    def of(cls, between: dict[str, str], stops: list[str], special: re.Pattern[str]) -> "TurnTexts":
        """From the texts between turns: `^s`, `su`, `ua`, `au` and `u$`; `^` and `$` are a prompt's start and end.

        stops: the texts that end a turn. special: the tokenizer's special tokens, none of which is cut in two.
        """
        first, later, after_system = between["^u"], between["au"], between["su"]
        head = _after_stop(_common_suffix(first, later, special), stops)
        system_turn = after_system.endswith(head)
        end = _common_prefix(between["ua"], between["u$"], special)
        end = end[: len(end) - len(_after_stop(end, stops))] or end
        return cls(
            system_start=between["^s"],
            system_end=after_system.removesuffix(head) if system_turn else after_system,
            opening=first.removesuffix(head),
            user_start=head,
            user_end=end,
            assistant_start=between["ua"][len(end) :],
            assistant_end=later.removesuffix(head),
            generation=between["u$"][len(end) :],
            system_turn=system_turn,
        )

    def prompt(self, messages: list[Message]) -> str:
        """The prompt for `messages`, whose roles are an optional system, then user and assistant in turn.

        The first may be an assistant: Ollama leaves out the oldest of a conversation that has become too long.
        """
        parts = []
        for number, message in enumerate(messages):
            last = number == len(messages) - 1
            if message["role"] == "system":
                start, end = self.system_start, self.system_end
            elif message["role"] == "user":
                start = self.opening if number == 0 else ""
                follows = number == 1 and messages[0]["role"] == "system"
                start += "" if follows and not self.system_turn else self.user_start
                end = self.user_end + (self.generation if last else "")
            else:
                start = self.generation if last else self.assistant_start
                end = "" if last else self.assistant_end
            parts.append(start + message["content"] + end)
        return "".join(parts)

    def go_template(self) -> str:
        """The same as a Go template over Ollama's `Messages`."""
        begins = 'or (ne $i 1) (ne (index $.Messages 0).Role "system")'
        user_start = _literal(self.user_start) if self.system_turn else _when(begins, self.user_start)
        return (
            "{{- range $i, $_ := .Messages }}\n"
            "{{- $last := eq (len (slice $.Messages $i)) 1 -}}\n"
            f'{{{{ if eq .Role "system" }}}}{_literal(self.system_start)}{{{{ .Content }}}}{_literal(self.system_end)}'
            f'{{{{ else if eq .Role "user" }}}}{_when("eq $i 0", self.opening)}{user_start}{{{{ .Content }}}}'
            f"{_literal(self.user_end)}{_when('$last', self.generation)}"
            f'{{{{ else if eq .Role "assistant" }}}}{_when("$last", self.generation, self.assistant_start)}'
            f"{{{{ .Content }}}}{_when('not $last', self.assistant_end)}{{{{ end }}}}\n"
            "{{- end }}"
        )


def _after_stop(text: str, stops: list[str]) -> str:
    """What follows the last end of a turn in `text`: the start of the next turn."""
    ends = [found.end() for stop in stops for found in re.finditer(re.escape(stop) + r"\s*", text)]
    return text[max(ends, default=0) :]


def _common_prefix(one: str, other: str, special: re.Pattern[str]) -> str:
    """What both begin with, no token of `special` cut in two."""
    same = len(common_prefix(one, other))
    cut = [
        found.start() for text in (one, other) for found in special.finditer(text) if found.start() < same < found.end()
    ]
    return one[: min(cut, default=same)]


def _common_suffix(one: str, other: str, special: re.Pattern[str]) -> str:
    """What both end with, no token of `special` cut in two."""
    same = len(common_prefix(one[::-1], other[::-1]))
    for text in (one, other):
        edge = len(text) - same
        same = min(
            [same, *(len(text) - found.end() for found in special.finditer(text) if found.start() < edge < found.end())]
        )
    return one[len(one) - same :]


def _when(condition: str, text: str, otherwise: str = "") -> str:
    if text == otherwise:
        return _literal(text)
    if not text:
        return _when(f"not {condition}", otherwise)
    tail = f"{{{{ else }}}}{_literal(otherwise)}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{_literal(text)}{tail}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text within a Go template within a Modelfile, whose parser drops characters that cannot be printed."""
    runs = (run for part in re.split(r'(\{\{|""")', text) for run in _runs(part))
    quoted = "".join(f"{{{{ {_go_string(run)} }}}}" if quote else run for quote, run in runs)
    return re.sub(r'\{(?=\{\{ "|\Z)', '{{ "{" }}', quoted)  # a brace right before an action would become part of it


def _runs(part: str) -> Iterator[tuple[bool, str]]:
    """Stretches of a text, and whether each must be quoted."""
    if part in ("{{", '"""'):
        yield True, part
        return
    for quote, letters in groupby(part, lambda letter: letter != "\n" and not letter.isprintable()):
        yield quote, "".join(letters)


def _go_string(text: str) -> str:
    def escaped(letter: str) -> str:
        return letter if letter.isascii() and letter.isprintable() and letter not in '"\\' else f"\\U{ord(letter):08x}"

    return f'"{"".join(map(escaped, text))}"'
