"""Every template on every conversation: labeled, refused or WRONG. `python -m tests.templates.report` prints it.

The proof does not know how `encode` finds its labels: it decodes each run of labeled tokens and what lies between the
runs, and learns how a template ends a turn by rendering the conversation with a marker in the answer's place.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from common.data.dataset import Example
from common.data.encode import Encoded, MaskingOptions, exported_template
from common.errors import UserError
from tests.encoding import encode
from tests.templates.conversations import CONVERSATIONS, EXACT, THOUGHTS
from tests.templates.families import Family, build, families, standing_in

LABELED, OPEN, REFUSED, WRONG = "labeled", "no end", "refused", "WRONG"  # "no end": the template writes none
MARKS = {LABELED: "[green]yes", OPEN: "[yellow]open", REFUSED: "[dim]-", WRONG: "[bold red]WRONG"}
MARKER = "qzMARKERzq"
# What templates write around reasoning, apart from tokens.
_AROUND = re.compile(r"</?think(?:ing)?>|\b(?:analysis|assistant|final|think|response|to|self|user|all)\b|[>=]")
_ALL_REFUSALS = "this row cannot be labeled exactly: "
_DATE = "26 Jul 2024"
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_OPEN = r"(?:<(?:\w+:)?think>|<\|START_THINKING\|>|<\|channel>thought)"
_BLOCK = re.compile(rf"\s*(?:{_OPEN}\s*)?(?:</(?:\w+:)?think>|<\|END_THINKING\|>|<channel\|>)\s*")

Encode = Callable[[Example, Any], Encoded]


@dataclass(frozen=True)
class Verdict:
    outcome: str
    why: str = ""


def judge(example: Example, tokenizer: Any, how: Encode = encode) -> Verdict:
    """The outcome of `how` on one conversation, and its reason where it is not "labeled"."""
    try:
        encoded = how(example, tokenizer)
    except UserError as error:
        return Verdict(REFUSED, error.what.split("\n")[0].removeprefix(f"{example.source}: "))
    except Exception as error:  # a user would see a traceback
        return Verdict(WRONG, f"encode raised {error!r}")
    try:
        fault = find_fault(example, tokenizer, encoded)
    except Exception as error:
        return Verdict(WRONG, f"the row was labeled, but rendering it raises {error!r}")
    if fault:
        return Verdict(WRONG, fault)
    return Verdict(LABELED)


def find_fault(example: Example, tokenizer: Any, encoded: Encoded) -> str:
    """What is wrong with these labels, or ""."""
    example = _as_rendered(example, tokenizer, "spaces around answers taken off" in encoded.notes)
    text = rendered(example.messages, example, tokenizer)
    ids = encoded.ids.tolist()
    wanted, got = (
        _bare(tokenizer.decode(part, skip_special_tokens=False), tokenizer)
        for part in (tokenizer(text, add_special_tokens=False)["input_ids"], ids)
    )
    if got != wanted and not (got.startswith(wanted) and not _without_tokens(got[len(wanted) :], tokenizer).strip()):
        return "the text is not that of the rendered conversation, thinking blocks apart"
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and (ids[0] != tokenizer.bos_token_id or text[len(bos) :].startswith(bos)):
        return "not exactly one BOS at the start"
    if bos and bos != tokenizer.eos_token and text.count(bos) <= 1 and ids.count(tokenizer.bos_token_id) > 1:
        return "more than one BOS"
    runs = _runs(encoded.mask)
    turns = [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]
    if len(runs) != len(turns):
        return f"{len(runs)} labeled runs for {len(turns)} assistant turns"
    if fault := _unlike_serving(example, tokenizer, ids[: runs[-1][0]]):
        return fault
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


def rendered(messages: Any, example: Example, tokenizer: Any, prompt: bool = False, template: str | None = None) -> str:
    """The conversation by the template alone, as the model is later served: with thinking off."""
    settings = {"add_generation_prompt": prompt, "tokenize": False, "enable_thinking": False, "date_string": _DATE}
    settings["thinking"] = False
    settings["chat_template"] = template or _TODAY.sub(_day, str(tokenizer.chat_template))
    said = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(said, tools=list(example.tools) or None, **settings)
    except TypeError:
        if example.tools:
            raise
        return tokenizer.apply_chat_template(said, tools=[], **settings)


def _unlike_serving(example: Example, tokenizer: Any, before: list[int]) -> str:
    """Whether the tokens before the last answer are those that the exported model is served before it."""
    if example.messages[-1]["role"] != "assistant":
        return ""
    template = _TODAY.sub(_day, exported_template(tokenizer, MaskingOptions()))
    prompt = rendered(example.messages[:-1], example, tokenizer, prompt=True, template=template)
    served = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    plain = tokenizer("a")["input_ids"]
    if plain[:1] == [tokenizer.bos_token_id] and served[:1] != plain[:1]:
        served = [*plain[:1], *served]  # as llama.cpp does
    return "" if before == served else f"it is not trained behind the prompt it is served: {prompt[-60:]!r}"


def _bare(text: str, tokenizer: Any) -> str:
    bos = tokenizer.bos_token or ""
    text = _BLOCK.sub("", text.removeprefix(bos))
    return re.sub(rf"\s+|{_OPEN}", "", text)


def _day(call: re.Match[str]) -> str:
    return repr(datetime(2024, 7, 26).strftime(call[2]))


def _as_rendered(example: Example, tokenizer: Any, stripped: bool) -> Example:
    """Without thoughts, and with its system text in the first user turn, and arguments as JSON, where it must be so."""
    messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in example.messages]
    for message in messages:
        if message["role"] == "assistant":
            said = message["content"]
            said = said.partition("</think>")[2].lstrip() if said.lstrip().startswith("<think>") else said
            message["content"] = said.strip() if stripped else said
    text = [
        m
        | {
            "tool_calls": [
                {
                    **c,
                    "function": {
                        **c["function"],
                        "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for c in m["tool_calls"]
            ]
        }
        if m.get("tool_calls")
        else m
        for m in messages
    ]
    for form in (messages, text):
        for chosen in (form, _folded(form)):
            try:
                said = rendered(chosen, example, tokenizer)
            except Exception:
                continue
            if all(m["content"].strip() in said for m in chosen if m["role"] in ("system", "user")):
                return replace(example, messages=tuple(chosen))
    return example


def _folded(messages: list[dict]) -> list[dict]:
    if messages[0]["role"] != "system":
        return messages
    first = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _fault_of_run(run: str, example: Example, turn: int, tokenizer: Any) -> str:
    message = example.messages[turn]
    answer = message["content"].rpartition("</think>")[2].strip()
    if message.get("tool_calls"):
        if not ("get_weather" in run and "Kyoto" in run and "heavy clouds" not in run):
            return f"the tool call is not what is labeled: {run!r}"
        return "" if _tokens(run, tokenizer) else f"no token ends the tool call: {run!r}"
    opening = _opening(example, turn, tokenizer)
    if opening and run.lstrip().startswith(opening):
        run = run.lstrip()[len(opening) :]
    head, found, tail = run.partition(answer)
    if example.source not in EXACT:
        head, found, tail = run.rpartition(answer)
        head = _without_tokens(_AROUND.sub("", head), tokenizer)
        for thought in THOUGHTS:
            head = head.replace(thought, "", 1)
    if not found:
        return f"the answer is not in the labels: {run!r}"
    if head.strip():
        return f"more than the answer is labeled: {run!r}"
    ending = _ending(example, turn, tokenizer)
    if _without_tokens(tail, tokenizer).strip() and not ending.strip().startswith(tail.strip()):
        return f"something other than the end of turn follows the answer: {tail!r}"
    ends, wanted = _tokens(tail, tokenizer), _tokens(ending, tokenizer)
    last = turn + 1 == len(example.messages)
    followed = _tokens(_followed(example, turn, tokenizer), tokenizer)
    if not wanted and ends:  # some templates write the end only when another turn follows
        return "" if followed[: len(ends)] == ends else f"{tail!r} is labeled as the end of turn, and nothing ends it"
    if not ends and not last and followed[:1] != wanted[:1]:
        return ""  # what ends a turn that is past is not where the model must stop
    if wanted and not ends:
        return f"the end of turn is not a label: the template writes {ending!r}"
    if len(ends) > len(wanted) or (last and ends != wanted[: len(ends)]):
        return f"{tail!r} is labeled as the end of turn, the template writes {ending!r}"
    return ""


def _ending(example: Example, turn: int, tokenizer: Any) -> str:
    """What the template writes behind the answer of `turn` when the conversation ends there."""
    return _marked(example, turn, tokenizer)[1]


def _opening(example: Example, turn: int, tokenizer: Any) -> str:
    """What the model itself writes before its answer, such as gpt-oss's channel: what the prompt does not hold yet."""
    prompt = rendered(example.messages[:turn], example, tokenizer, prompt=True)
    before = _marked(example, turn, tokenizer)[0]
    prompt = re.sub(rf"{_BLOCK.pattern}\Z", "", prompt)
    return before[len(prompt) :].strip() if before.startswith(prompt) else ""


def _followed(example: Example, turn: int, tokenizer: Any) -> str:
    """What the template writes behind the answer of `turn` when the user continues."""
    marked = {k: v for k, v in example.messages[turn].items() if k != "tool_calls"} | {"content": MARKER}
    text = rendered([*example.messages[:turn], marked, {"role": "user", "content": "?"}], example, tokenizer)
    return text.rpartition(MARKER)[2]


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
    """Two tables: the outcomes, and the reasons for what is not labeled."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=190)
    names = [row.source for row in CONVERSATIONS]
    table = Table("template", "vocabulary", *names, title="Labels", caption="open: labeled, the template writes no end")
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
    found = run(partial(encode))  # options go here: partial(encode, masking=MaskingOptions(...))
    show(found)
    sys.exit(any(verdict.outcome == WRONG for verdicts in found.values() for verdict in verdicts.values()))
