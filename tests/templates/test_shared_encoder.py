"""One encoder for many rows: what it infers from earlier rows is what it would find in each row by itself."""

import random
from typing import Any

import pytest

from common.data import assistant_spans
from common.data.assistant_spans import Conversation
from common.data.chat_template import ChatTemplate, Message
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions
from common.data.turn_edges import MaskedRow
from common.errors import UserError
from tests.templates.conversations import CONVERSATIONS
from tests.templates.families import Family, build, families

FAMILIES = families()


def outcome(encoder: Encoder, example: Example) -> tuple[Any, ...]:
    try:
        row = encoder(example)
    except UserError as error:
        return (error.what,)
    return row.ids.tolist(), row.loss_weights.tolist(), row.ends, row.notes


def located_one_by_one(messages: list[Message], tools: Any, template: ChatTemplate) -> Conversation:
    return assistant_spans._located(messages, tools, template, every=False)


@pytest.mark.parametrize("thinking", ["off", "keep"])
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_rows_teach_each_other_nothing_wrong(family: Family, thinking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, masking = build(family), MaskingOptions(thinking=thinking)
    shared, rows = Encoder(tokenizer, masking), list(CONVERSATIONS)
    order = random.Random(1).sample(rows * 2, 2 * len(rows))
    found = {id(row): outcome(shared, row) for row in order}  # the second time each row is inferred
    monkeypatch.setattr(MaskedRow, "known_edges", lambda *anything: None)
    for row in rows:
        assert found[id(row)] == outcome(Encoder(tokenizer, masking), row), row.source
    monkeypatch.setattr(assistant_spans, "_locate", located_one_by_one)
    for row in rows:  # with placeholders for the assistant's turns alone, some rows cannot be labeled
        alone = outcome(Encoder(tokenizer, masking), row)
        assert len(alone) == 1 or found[id(row)] == alone, row.source
