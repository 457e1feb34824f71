"""What is suspicious about rows that can be trained on: placeholders, duplicates, leakage, answers that break off."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from common.data.chat_template import ChatTemplate
from common.data.dataset import Dataset, Example, content_key, prompt_key

# Words that are placeholders in single brackets; in double brackets every word is one.
_WORD = (
    r"(?:(?:your|user|first|last|full|company|product)[_ ])?name|username|author|company|email|phone[_ ]number|"
    r"date|city|country|topic|url|placeholder"
)
# Each with the texts of which a match has one: to look for these first takes a hundredth of the time.
_PLACEHOLDERS = tuple(
    (signs, re.compile(pattern, re.MULTILINE))
    for signs, pattern in (
        # {{name}}; not LaTeX's {{a}}, not ${{ x }}
        (("{{",), r"(?<![\\$^_{}A-Za-z0-9])\{\{\s*[^\W\d][\w .-]{1,40}\}\}(?!\})"),
        # {name}, on a line that neither calls nor assigns nor marks up: there it is code
        (("{",), rf"^(?!.*(?:\w\(|=|<\w|\bf[\"'])).*(?<![\\$^_{{A-Za-z0-9])\{{(?:{_WORD})\}}(?!\}})"),
        # [NAME]; [name] may be an index or a link
        (("[",), rf"(?<![A-Za-z0-9_\])\\$])\[(?-i:{_WORD.upper()})\](?![\[(:])"),
        (("[", "<"), r"(?i:[\[<](?:your|insert|enter)[_ ][\w ]{1,30}[\]>])"),
        (("TODO", "TBD"), r"^[^\S\n]*(?:TODO|TBD)(?=:|\s*$)"),
        (("ipsum", "IPSUM", "Ipsum"), r"(?i:\blorem ipsum\b)"),
    )
)
_OPENED, _CLOSED = (re.compile(rf"<{slash}({_WORD})>") for slash in ("", "/"))
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
# A comma, a colon, an opening bracket that is not a smiley's, or a word that does not end a sentence.
_BREAKS_OFF = re.compile(r"(?:[,、，:：]|(?<![:;=])(?<![:;=]-)[(（「『【\[{]|\S (?:and|or|the|an|because))\Z")
_LAST = 16  # characters that decide it
_FENCE = re.compile(r"^ {0,3}```", re.MULTILINE)


@dataclass(frozen=True)
class QualityWarning:
    what: str
    sources: list[str]  # of the rows

    def __str__(self) -> str:
        more = f" and {len(self.sources) - 5} more" if len(self.sources) > 5 else ""
        return f"{len(self.sources)} {self.what}: {', '.join(self.sources[:5])}{more}"


def quality_warnings(data: Dataset) -> list[QualityWarning]:
    """Everything suspicious, the most serious first. Nothing is changed here."""
    every = [*data.train, *data.valid, *data.test]
    found = [
        QualityWarning("validation or test rows that are in training too", _shared(data, content_key)),
        QualityWarning(
            "validation or test rows whose prompt is in training, with another answer", _shared_prompts(data)
        ),
        *(QualityWarning(f"{kind}, left out", sources) for kind, sources in data.left_out.items()),
        QualityWarning("training rows that repeat another", _repeated(data.train)),
        QualityWarning("training rows with the same prompt and different answers", _contradicting(data.train)),
        QualityWarning("rows with a placeholder left in", [row.source for row in every if placeholder(_all_text(row))]),
        QualityWarning("rows whose answer seems to break off", [row.source for row in every if _breaks_off(row)]),
    ]
    return [warning for warning in found if warning.sources]


def control_tokens(rows: list[Example], template: ChatTemplate | None) -> QualityWarning | None:
    """The rows with control tokens of the model in their turns' text, which it reads as such; None without any."""
    if template is None:
        return None
    tokens, sources = dict[str, None](), []
    for row in rows:
        if found := [token for message in row.messages for token in template.special.findall(message["content"])]:
            tokens |= dict.fromkeys(found)
            sources.append(row.source)
    what = f"rows with control tokens in their text, read as such ({', '.join(list(tokens)[:3])})"
    return QualityWarning(what, sources) if sources else None


def placeholder(text: str) -> str | None:
    """The first placeholder outside of code, if any."""
    prose = _CODE.sub("``", text) if "`" in text else text
    likely = (pattern for signs, pattern in _PLACEHOLDERS if any(sign in prose for sign in signs))
    found = next((match[0] for pattern in likely if (match := pattern.search(prose))), None)
    return found or (_never_closed(prose) if "<" in prose else None)


def _never_closed(text: str) -> str | None:
    """The first tag such as <name> that no </name> follows. Each text is read once: a search from each tag is slow."""
    last = {match[1]: match.start() for match in _CLOSED.finditer(text)}
    return next((match[0] for match in _OPENED.finditer(text) if last.get(match[1], -1) < match.start()), None)


def _all_text(row: Example) -> str:
    return row.text if row.text is not None else "\n".join(message["content"] for message in row.messages)


def _breaks_off(row: Example) -> bool:
    """Whether the last answer ends in the middle: by its last characters, or a code fence that stays open.

    Plain text may have been cut anywhere on purpose.
    """
    if row.text is not None or row.messages[-1]["role"] != "assistant" or row.messages[-1].get("tool_calls"):
        return False
    answer = row.messages[-1]["content"].rstrip()
    open_fence = "```" in answer and len(_FENCE.findall(answer)) % 2 == 1 == answer.count("```") % 2
    return open_fence or bool(_BREAKS_OFF.search(answer[-_LAST:]))


def _shared(data: Dataset, key: Callable[[Example], str]) -> list[str]:
    seen = {key(row) for row in data.train}
    return [row.source for row in [*data.valid, *data.test] if key(row) in seen]


def _shared_prompts(data: Dataset) -> list[str]:
    """Sources of held-out rows whose prompt, but not whose answer, is in training; plain text has no prompt."""
    prompts = {prompt_key(row) for row in data.train if row.text is None}
    rows = {content_key(row) for row in data.train}
    others = [row for row in [*data.valid, *data.test] if content_key(row) not in rows]
    return [row.source for row in others if prompt_key(row) in prompts]


def _repeated(rows: list[Example]) -> list[str]:
    seen: set[str] = set()
    found = []
    for row in rows:
        if (content := content_key(row)) in seen:
            found.append(row.source)
        seen.add(content)
    return found


def _contradicting(rows: list[Example]) -> list[str]:
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row.text is None:
            answers[prompt_key(row)].setdefault(content_key(row), row.source)
    return [source for group in answers.values() if len(group) > 1 for source in group.values()]
