"""Rows with tools where the chat template takes none: refused, without the tools, or with them as text."""

from pathlib import Path
from typing import Any

import pytest

from common.data.chat_template import ChatTemplate
from common.data.dataset import Example
from common.data.encode import MaskingOptions, load_tokenizer
from common.data.formats import read_row
from common.data.tool_text import tools_as_text
from common.errors import UserError
from tests.encoding import encode
from tests.tiny import CHATML

WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
CALL = '{"name": "weather", "arguments": {"city": "Tokyo"}}'
# As LLaMA-Factory's glaive_toolcall_en has them.
ROW = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": CALL},
        {"from": "observation", "value": '{"sky": "blue"}'},
        {"from": "gpt", "value": "It is blue."},
    ],
    "tools": '[{"name": "weather", "description": "of a city", "parameters": {"type": "object"}}]',
}
ONLY_TALK = {"conversations": [ROW["conversations"][0], ROW["conversations"][3]], "tools": ROW["tools"]}


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def example(row: dict[str, Any] = ROW) -> Example:
    return read_row(row, "a:1", {})[1]


def test_the_refusal_names_both_ways(tokenizer: Any) -> None:
    for row in (ROW, ONLY_TALK):
        with pytest.raises(UserError, match="the template leaves out the row's tools") as caught:
            encode(example(row), tokenizer)
        assert "--tools system writes tools and calls as text, --tools drop leaves out the tools." in caught.value.fix


def test_tools_calls_and_results_as_text(tokenizer: Any) -> None:
    encoded = encode(example(), tokenizer, MaskingOptions(tools="system"))
    labels = tokenizer.decode(encoded.ids[encoded.mask])
    assert labels == f"<tool_call>\n{CALL}\n</tool_call><|im_end|>It is blue.<|im_end|>"
    text = tokenizer.decode(encoded.ids)
    assert text.startswith("<|im_start|>system\nYou may call these functions:\n<tools>\n{")
    assert '{"type": "function", "function": {"name": "weather", "description": "of a city", ' in text
    assert '<|im_start|>user\n<tool_response>\n{"sky": "blue"}\n</tool_response><|im_end|>\n' in text
    assert encoded.notes == ("tools written as text, which the template does not take (--tools system)",)


def test_tools_go_behind_a_system_text_and_results_of_two_calls_into_one_turn() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call], "train": False},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Yo"},
    ]
    written = tools_as_text(example({"messages": turns, "tools": [WEATHER]}))
    system, _, called, results, _ = written.messages
    assert system["content"].startswith("Be brief.\n\nYou may call these functions:")
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert called == {"role": "assistant", "content": f"Let me see.\n{text}\n{text}", "train": False}
    assert results["role"] == "user"
    assert results["content"] == "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert written.tools == ()


def test_definitions_left_out(tokenizer: Any) -> None:
    masking = MaskingOptions(tools="drop")
    encoded = encode(example(ONLY_TALK), tokenizer, masking)
    assert tokenizer.decode(encoded.ids[encoded.mask]) == "It is blue.<|im_end|>"
    assert "weather" not in tokenizer.decode(encoded.ids)
    assert encoded.notes == ("tools left out, which the template does not take (--tools drop)",)
    with pytest.raises(UserError, match="the template leaves out the tool call of turn 2"):  # it would be lost
        encode(example(), tokenizer, masking)


def test_a_template_that_takes_tools_keeps_its_form(tokenizer: Any) -> None:
    assert not ChatTemplate(tokenizer, "off").takes_tools
    calls = "m['content'] + (m.tool_calls[0].function | tojson if m.tool_calls else '') +"
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + CHATML.replace("m['content'] +", calls)
    assert ChatTemplate(tokenizer, "off").takes_tools
    plain = encode(example(), tokenizer)
    for mode in ("drop", "system"):
        encoded = encode(example(), tokenizer, MaskingOptions(tools=mode))
        assert (encoded.ids.tolist(), encoded.notes) == (plain.ids.tolist(), ())
