"""Every template on every conversation: labelled, refused or WRONG. `python -m tests.templates.report` prints it.

The proof does not know how `encode` finds its labels: it decodes each run of labelled tokens and what lies between the
runs, and learns how a template ends a turn by rendering the conversation with a marker in the answer's place.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from common.data import Example
from common.errors import UserError
from common.template import Encoded, encode
from tests.templates.conversations import CONVERSATIONS, EXACT, THOUGHTS
from tests.templates.families import Family, build, families, standing_in

LABELLED, OPEN, REFUSED, WRONG = "labelled", "no end", "refused", "WRONG"  # "no end": the template writes none
MARKS = {LABELLED: "[green]yes", OPEN: "[yellow]open", REFUSED: "[dim]-", WRONG: "[bold red]WRONG"}
MARKER = "qzMARKERzq"
# What templates write around reasoning, apart from tokens.
_AROUND = re.compile(r"</?think(?:ing)?>|\b(?:analysis|assistant|final|think|response|to|self|user|all)\b|[>=]")
_ALL_REFUSALS = "this row cannot be labelled exactly: "
_DATE = "26 Jul 2024"

Encode = Callable[[Example, Any], Encoded]


@dataclass(frozen=True)
class Verdict:
    outcome: str
    why: str = ""


def judge(example: Example, tokenizer: Any, how: Encode = encode) -> Verdict:
    """The outcome of `how` on one conversation, and its reason where it is not "labelled"."""
    try:
        encoded = how(example, tokenizer)
    except UserError as error:
        return Verdict(REFUSED, error.what.split("\n")[0].removeprefix(f"{example.source}: "))
    except Exception as error:  # a user would see a traceback
        return Verdict(WRONG, f"encode raised {error!r}")
    try:
        fault = find_fault(example, tokenizer, encoded)
    except Exception as error:
        return Verdict(WRONG, f"the row was labelled, but rendering it raises {error!r}")
    if fault:
        return Verdict(WRONG, fault)
    return Verdict(LABELLED if _tokens(_ending(example, len(example.messages) - 1, tokenizer), tokenizer) else OPEN)


def find_fault(example: Example, tokenizer: Any, encoded: Encoded) -> str:
    """What is wrong with these labels, or ""."""
    text = rendered(example.messages, example, tokenizer)
    ids = encoded.ids.tolist()
    if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
        return "the ids are not those of the rendered conversation"
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and (ids[0] != tokenizer.bos_token_id or text[len(bos) :].startswith(bos)):
        return "not exactly one BOS at the start"
    if bos and bos != tokenizer.eos_token and text.count(bos) == 1 and ids.count(tokenizer.bos_token_id) != 1:
        return "not exactly one BOS"
    runs = _runs(encoded.mask)
    turns = [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]
    if len(runs) != len(turns):
        return f"{len(runs)} labelled runs for {len(turns)} assistant turns"
    gone = said = 0
    for turn, (start, stop) in zip(turns, runs, strict=True):
        before = tokenizer.decode(ids[gone:start], skip_special_tokens=False)
        run = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        for message in example.messages[said:turn]:
            if message["role"] != "tool" and message["content"].strip() not in before:
                return f"turn {turn + 1}: the {message['role']}'s text does not stand before the labels"
        fault = _fault_of_run(run, example, turn, tokenizer)
        if fault:
            return f"turn {turn + 1}: {fault}"
        gone, said = stop, turn + 1
    return ""


def rendered(messages: Any, example: Example, tokenizer: Any, prompt: bool = False) -> str:
    """The conversation by the template alone, as the model is later served: with thinking off."""
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(example.tools) or None,
        tokenize=False,
        add_generation_prompt=prompt,
        enable_thinking=False,
        date_string=_DATE,
    )


def _fault_of_run(run: str, example: Example, turn: int, tokenizer: Any) -> str:
    message = example.messages[turn]
    answer = message["content"].rpartition("</think>")[2].strip()
    if message.get("tool_calls"):
        if not ("get_weather" in run and "Kyoto" in run and "heavy clouds" not in run):
            return f"the tool call is not what is labelled: {run!r}"
        return "" if _tokens(run, tokenizer) else f"no token ends the tool call: {run!r}"
    head, found, tail = run.partition(answer)
    if example.source not in EXACT:
        head, found, tail = run.rpartition(answer)
        head = _without_tokens(_AROUND.sub("", head), tokenizer)
        for thought in THOUGHTS:
            head = head.replace(thought, "", 1)
    if not found:
        return f"the answer is not in the labels: {run!r}"
    if head.strip() not in ("", _opening(example, turn, tokenizer)):
        return f"more than the answer is labelled: {run!r}"
    if _without_tokens(tail, tokenizer).strip():
        return f"something other than the end of turn follows the answer: {tail!r}"
    ending = _ending(example, turn, tokenizer)
    ends, wanted = _tokens(tail, tokenizer), _tokens(ending, tokenizer)
    if wanted and not ends:
        return f"the end of turn is no label: the template writes {ending!r}"
    if len(ends) > len(wanted) or (turn + 1 == len(example.messages) and ends != wanted[: len(ends)]):
        return f"{tail!r} is labelled as the end of turn, the template writes {ending!r}"
    return ""


def _ending(example: Example, turn: int, tokenizer: Any) -> str:
    """What the template writes behind the answer of `turn` when the conversation ends there."""
    return _marked(example, turn, tokenizer)[1]


def _opening(example: Example, turn: int, tokenizer: Any) -> str:
    """What the model itself writes before its answer, such as gpt-oss's channel: what the prompt does not hold yet."""
    prompt = rendered(example.messages[:turn], example, tokenizer, prompt=True)
    before = _marked(example, turn, tokenizer)[0]
    return before[len(prompt) :].strip() if before.startswith(prompt) else ""


def _marked(example: Example, turn: int, tokenizer: Any) -> tuple[str, str]:
    """The text before and behind the answer of `turn`, the conversation's last."""
    marked = {k: v for k, v in example.messages[turn].items() if k != "tool_calls"} | {"content": MARKER}
    before, _, behind = rendered([*example.messages[:turn], marked], example, tokenizer).rpartition(MARKER)
    return before, behind


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _pattern(tokenizer: Any) -> re.Pattern[str]:
    added = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, added)))


def _tokens(text: str, tokenizer: Any) -> list[str]:
    """The added tokens in `text`, those of thinking apart: an empty block ends no turn."""
    return [token for token in _pattern(tokenizer).findall(text) if "think" not in token.lower()]


def _without_tokens(text: str, tokenizer: Any) -> str:
    return _pattern(tokenizer).sub("", text)


def run(how: Encode = encode) -> dict[Family, dict[str, Verdict]]:
    """`{family: {conversation: verdict}}` over all of them."""
    return {family: {row.source: judge(row, build(family), how) for row in CONVERSATIONS} for family in families()}


def show(report: dict[Family, dict[str, Verdict]]) -> None:
    """Two tables: the outcomes, and the reasons for what is not labelled."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=190)
    names = [row.source for row in CONVERSATIONS]
    table = Table(
        "template", "vocabulary", *names, title="Labels", caption="open: labelled, the template writes no end"
    )
    reasons = Table("conversations", "why not", title="Refused or wrong")
    for family, verdicts in report.items():
        table.add_row(family.name, standing_in(family), *(MARKS[verdicts[name].outcome] for name in names))
        whys: dict[str, list[str]] = {}
        for name, verdict in verdicts.items():
            if verdict.why:
                why = re.sub(r"turn \d+", "a turn", verdict.why).removeprefix(_ALL_REFUSALS)
                whys.setdefault(("WRONG: " if verdict.outcome == WRONG else "") + why, []).append(name)
        if whys:
            reasons.add_row(f"[bold]{family.name}", "")
        for why, rows in whys.items():
            reasons.add_row("all" if len(rows) == len(names) else ", ".join(rows), escape(why))
    console.print(table)
    console.print(reasons)
    every = [verdict.outcome for verdicts in report.values() for verdict in verdicts.values()]
    console.print(", ".join(f"{every.count(outcome)} {outcome}" for outcome in MARKS), f"of {len(every)}")


if __name__ == "__main__":
    found = run(partial(encode))  # a style goes here: partial(encode, style=Style(...))
    show(found)
    sys.exit(any(verdict.outcome == WRONG for verdicts in found.values() for verdict in verdicts.values()))
