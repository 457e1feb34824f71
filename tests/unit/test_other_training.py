"""Rows of other trainings are called by its name, and none of their turns is trained in silence."""

from typing import Any

import pytest

from common.data.formats import read_row
from common.data.messages import Fault
from tests.tiny import chat

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "So"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Yo", "No"))
ASKED = {"role": "user", "content": "Hi"}
PAIR = "is a preference row (`chosen` and `rejected`: for DPO, ORPO or a reward model)"
MARKED = "marks its answer as good or bad (`{}`: a row for KTO); to train on every answer alike: --field {}"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (  # LLaMA-Factory's: the history was trained, and the two answers ignored
            {
                "conversations": TURNS,
                "chosen": {"from": "gpt", "value": "Yo"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            f"{PAIR}; to train on the chosen one, append it to `conversations`",
        ),
        (
            {"instruction": "Hi", "input": "", "chosen": "Yo", "rejected": "No"},
            f"{PAIR}; to train on the chosen one: --field completion=chosen",
        ),
        (
            {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
            f"{PAIR}; to train on the chosen one: --field completion=",
        ),
        (
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
            f"{PAIR}; to train on the chosen one: --field completion=chosen",
        ),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, f"{PAIR}; to train on the chosen one: --field messages="),
        (
            {"prompt": "Hi", "messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            f"{PAIR}; to train on the chosen one: --field messages=chosen",
        ),
        (
            {"messages": [ASKED, GOOD], "rejected_response": "No"},
            "is a preference row (`rejected_response`: for DPO, ORPO or a reward model); "
            "to train on `messages` alone: --field messages=messages",
        ),
        (
            {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "is a preference row (`preferred_output` and `non_preferred_output`: ",
        ),
        (chat("Hi", "Yo") | {"kto_tag": False}, MARKED.format("kto_tag", "messages=messages")),
        (chat("Hi", "Yo") | {"label": True}, MARKED.format("label", "messages=messages")),
        ({"conversations": TURNS, "label": False}, MARKED.format("label", "conversations=conversations")),
        ({"instruction": "Hi", "output": "Yo", "kto_tag": True}, MARKED.format("kto_tag", "completion=output")),
        ({"prompt": "Hi", "completion": "Yo", "label": False}, MARKED.format("label", "completion=completion")),
        ({"prompt": "Hi", "completion": "Yo", "label": "True"}, MARKED.format("label", "completion=completion")),
        ({"prompt": "Hi", "completions": ["a", "b"], "labels": [True, False]}, "a row for a process reward model"),
    ],
    ids=str,
)
def test_a_row_of_another_training_is_called_so(row: dict[str, Any], words: str) -> None:
    with pytest.raises(Fault) as caught:
        read_row(row, "a:1", {})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fields", "answer"),
    [
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, {"completion": "chosen"}, "Yo"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {"output": "chosen"}, "Yo"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {"messages": "chosen"}, "Yo"),
        ({"conversations": TURNS[:2], "rejected": "No"}, {"conversations": "conversations"}, "Yo"),
        ({"prompt": "Hi", "completion": "No", "label": False}, {"completion": "completion"}, "No"),
        ({"prompt": "Hi", "completion": "Yo", "rejected": None, "label": 1}, {}, "Yo"),
        ({"prompt": "Hi", "completion": "Yo", "rejected": "", "kto_tag": ""}, {}, "Yo"),
    ],
    ids=str,
)
def test_what_field_says_is_trained(row: dict[str, Any], fields: dict[str, str], answer: str) -> None:
    assert read_row(row, "a:1", fields)[1].messages[-1]["content"] == answer


def test_a_class_beside_a_text_is_no_mark() -> None:
    assert read_row({"text": "Once", "label": True}, "a:1", {})[2] == ["label"]
