"""What is doubtful about rows that can be trained on: placeholders, duplicates, leakage, answers that break off."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from common.data import Data, Example, content_key, prompt_key

# What templates and lazy hands leave behind: {{name}}, <your name>, [insert date], TODO.
_PLACEHOLDER = re.compile(
    r"\{\{\s*[\w .-]{1,40}\s*\}\}"
    r"|<(?:your|insert|the)[ _][\w ]{1,30}>"
    r"|\[(?:your|insert)[ _][\w ]{1,30}\]"
    r"|\bTODO\b|\bTBD\b|\blorem ipsum\b",
    re.IGNORECASE,
)
_BREAKS_OFF = re.compile(r"(?:[,、，:：]|\b(?:and|or|the|of|to|with|because)|[(（「『\[])\s*\Z")


@dataclass(frozen=True)
class Finding:
    what: str
    sources: list[str]

    def __str__(self) -> str:
        more = f" and {len(self.sources) - 5} more" if len(self.sources) > 5 else ""
        return f"{self.what}: {', '.join(self.sources[:5])}{more}"


def doubtful(data: Data) -> list[Finding]:
    """Everything doubtful, the gravest first; no row is changed or taken out for it."""
    every = [*data.train, *data.valid, *data.test]
    found = [
        Finding("rows of training that stand in validation or test too", _shared(data, content_key)),
        Finding("validation or test rows whose prompt is in training, with another answer", _shared_prompts(data)),
        Finding("rows that are there more than once", _again(data.train, content_key)),
        Finding("rows with a prompt that has another answer elsewhere", _contradicting(data.train)),
        Finding("rows with a placeholder left in", [r.source for r in every if _PLACEHOLDER.search(_all_text(r))]),
        Finding("rows whose answer seems to break off", [r.source for r in every if _breaks_off(r)]),
    ]
    return [finding for finding in found if finding.sources]


def _all_text(row: Example) -> str:
    return row.text if row.text is not None else "\n".join(message["content"] for message in row.messages)


def _breaks_off(row: Example) -> bool:
    """By its last letters, or a code fence that stays open."""
    if row.text is not None or row.messages[-1]["role"] != "assistant":
        return False
    answer = row.messages[-1]["content"].rstrip()
    return bool(_BREAKS_OFF.search(answer)) or answer.count("```") % 2 == 1


def _shared(data: Data, key: Callable[[Example], str]) -> list[str]:
    seen = {key(row) for row in data.train}
    return [row.source for row in [*data.valid, *data.test] if key(row) in seen]


def _shared_prompts(data: Data) -> list[str]:
    rows = {content_key(row) for row in data.train}
    train, valid, test = ([row for row in part if row.text is None] for part in (data.train, data.valid, data.test))
    chats = Data(train, valid, test)
    same = set(_shared(chats, prompt_key))
    return [r.source for r in [*chats.valid, *chats.test] if r.source in same and content_key(r) not in rows]


def _again(rows: list[Example], key: Callable[[Example], str]) -> list[str]:
    seen: set[str] = set()
    found = []
    for row in rows:
        if (content := key(row)) in seen:
            found.append(row.source)
        seen.add(content)
    return found


def _contradicting(rows: list[Example]) -> list[str]:
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row.text is None:
            answers[prompt_key(row)].setdefault(content_key(row), row.source)
    return [source for group in answers.values() if len(group) > 1 for source in group.values()]
