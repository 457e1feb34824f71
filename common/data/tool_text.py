"""Tools, calls and results of a row as text, for chat templates that take none: in the form of Hermes and Qwen."""

import json
from dataclasses import replace
from typing import Any

from common.data.chat_template import Message
from common.data.dataset import Example

_HEAD = "You may call these functions:\n<tools>\n"
_TAIL = """
</tools>

For each call, write the function's name and arguments as JSON:
<tool_call>
{"name": ..., "arguments": {...}}
</tool_call>"""


def uses_tools(example: Example) -> bool:
    """Whether the row defines tools, calls one, or has the result of one."""
    return bool(example.tools) or any(
        message["role"] == "tool" or message.get("tool_calls") for message in example.messages
    )


def tools_as_text(example: Example) -> Example:
    """The row with its tools in the system message, its calls in the answers, and results in turns of the user's."""
    messages: list[Message] = []
    results = False  # whether the last turn is of results: those of several calls are one turn
    for message in example.messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if results:
                messages[-1]["content"] += f"\n{text}"
            else:
                messages.append({"role": "user", "content": text})
        else:
            messages.append(_with_calls(message))
        results = message["role"] == "tool"
    if example.tools:
        text = _HEAD + "\n".join(map(_json, example.tools)) + _TAIL
        if messages[0]["role"] == "system":
            text = f"{messages.pop(0)['content']}\n\n{text}"
        messages.insert(0, {"role": "system", "content": text})
    return replace(example, messages=tuple(messages), tools=())


def _with_calls(message: Message) -> Message:
    """The message, its tool calls written behind its text."""
    calls = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in message.get("tool_calls") or ()]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join([*filter(None, [message["content"]]), *calls])}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
