"""What is suspicious about the text of one row: a placeholder that was left in, an answer that breaks off."""

import re

from common.data.dataset import Example

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


def breaks_off(row: Example) -> bool:
    """Whether the last answer ends in the middle: by its last characters, or a code fence that stays open.

    Plain text may have been cut anywhere on purpose.
    """
    if row.text is not None or row.messages[-1]["role"] != "assistant" or row.messages[-1].get("tool_calls"):
        return False
    answer = row.messages[-1]["content"].rstrip()
    open_fence = "```" in answer and len(_FENCE.findall(answer)) % 2 == 1 == answer.count("```") % 2
    return open_fence or bool(_BREAKS_OFF.search(answer[-_LAST:]))
