"""A model that learned a row perfectly is asked in a backend as it was trained, and its answer is the expected one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.data.assistant_spans import _leads_to, locate_turns
from common.data.chat_template import OPEN_BLOCK, ChatTemplate
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions
from common.data.turn_edges import BadRow
from common.errors import UserError
from common.evaluation.rows import read_test, said
from common.inference.backend_chat import _decoded, _prompt, hidden_tokens
from tests.templates.conversations import CONVERSATIONS
from tests.templates.families import Family, build, families

FAMILIES = families()
CALLS = tuple(replace(row, messages=row.messages[:2], source="call") for row in CONVERSATIONS if row.source == "tools")
# With reasoning kept, a turn without any is trained after another prompt than the one that is served.
THINKING = tuple(row for row in CONVERSATIONS if row.source in ("reasoning", "think text"))


def perfect_answer(encoder: Encoder, row: Example) -> str:
    """What a backend makes of the tokens that the row's last turn teaches, without its end."""
    encoded, conversation, _ = encoder.encode_chat(row)
    last, prompt = conversation.turns[-1], conversation.text[: conversation.turns[-1].start]
    ids = encoded.ids[encoded.mask].tolist()[: None if last.end == last.stop else -1]
    opened, hidden = OPEN_BLOCK.search(prompt), hidden_tokens(encoder.tokenizer)
    return "".join(text for text, _ in _decoded(iter(ids), encoder.tokenizer, hidden, len(ids) + 1, opened))


@pytest.mark.parametrize(("thinking", "rows"), [("off", CONVERSATIONS), ("keep", THINKING)], ids=["off", "keep"])
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_the_prompt_is_that_of_training(family: Family, thinking: Any, rows: tuple[Example, ...]) -> None:
    template = ChatTemplate(build(family), thinking)
    for row in rows:
        try:
            conversation = locate_turns(row, template)
        except BadRow:
            continue
        last = max(number for number, message in enumerate(row.messages) if message["role"] == "assistant")
        prompt = _prompt(template, [dict(message) for message in row.messages[:last]], row.tools, thinking == "keep")
        assert _leads_to(conversation.text, prompt, conversation.turns[-1].start), row.source


@pytest.mark.parametrize(("thinking", "rows"), [("off", (*CONVERSATIONS, *CALLS)), ("keep", (*THINKING, *CALLS))])
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_perfect_answer_is_the_reference(
    family: Family, thinking: Any, rows: tuple[Example, ...], tmp_path: Path
) -> None:
    encoder, path = Encoder(build(family), MaskingOptions("last", thinking)), tmp_path / "test.jsonl"
    for row in rows:
        path.write_text(json.dumps({"messages": row.messages, "tools": row.tools}), encoding="utf-8")
        try:
            (one,) = read_test(path, encoder, None)
        except UserError:
            continue
        answer = said(perfect_answer(encoder, row))  # a tokenizer may write a space behind an added token
        assert "".join(answer.split()) == "".join(str(one.reference).split()), row.source
