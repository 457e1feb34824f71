"""The few prompts by which a training is watched, and its result tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data.dataset import Example, prompt_of
from common.data.encode import Encoded, Encoder
from common.data.training_rows import TrainingRows

_LEARNED = 2000  # rows
SHORT = 56  # tokens of an answer whose length can be judged by the few that are asked for


@dataclass(frozen=True)
class SamplePrompt:
    """Turns to answer, with their tools. answer: the row's own, as the chat template writes it where it calls a tool.

    tokens, labels: of the whole row. Empty where the prompt is of no row.
    """

    messages: list[dict[str, Any]]
    answer: str = ""
    tokens: int = 0
    labels: int = 0
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """Of the last turn."""
        return str(self.messages[-1]["content"])


def row_prompts(rows: TrainingRows, count: int) -> list[SamplePrompt]:
    """The prompts of the first complete chat rows of validation, or of training where there are none.

    Those with a short answer first.
    """
    for examples, fitted in ((rows.data.valid, rows.valid.rows), (rows.data.train, rows.train.rows)):
        chats = np.flatnonzero(fitted.whole & fitted.of_kind(lambda kind: not kind.text))
        chats = chats[np.argsort(fitted.label_tokens[chats] > SHORT, kind="stable")][:count]
        wanted = {row.source: (len(row.ids), row.label_tokens) for row in map(fitted.__getitem__, map(int, chats))}
        found: list[SamplePrompt] = []
        for example in examples if wanted else ():  # else no example is read: each may be in a large file
            if example.source in wanted:
                found.append(_of_row(rows.encoder, example, *wanted.pop(example.source)))
            if not wanted:
                return found
    return []


def _of_row(encoder: Encoder, example: Example, tokens: int, labels: int) -> SamplePrompt:
    _, conversation, rendered = encoder.encode_chat(example)  # its tools may be text now
    turns = prompt_of(rendered)
    answer = rendered.messages[len(turns)]
    text = str(answer["content"])
    if answer.get("tool_calls"):
        turn = next(turn for turn in conversation.turns if turn.message == len(turns))
        text = conversation.text[turn.start : turn.stop]
    return SamplePrompt(turns, text, tokens, labels, tuple(rendered.tools))


def trained_answers(rows: Sequence[Encoded], tokenizer: Any) -> set[str]:
    """What the labels of the first rows say: the texts that a model may have learned by heart."""
    found = set()
    for number in range(min(len(rows), _LEARNED)):
        row = rows[number]
        ends = np.flatnonzero(np.diff(row.mask.astype(np.int8), prepend=0, append=0))
        for start, end in ends.reshape(-1, 2):
            text = tokenizer.decode(row.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found.add(text.strip())
    return found


def given_prompts(texts: Sequence[str], rows: list[SamplePrompt]) -> list[SamplePrompt]:
    """Of --sample-prompt, after the system turn that the rows begin with."""
    head = rows[0].messages[:1] if rows and rows[0].messages[:1] and rows[0].messages[0]["role"] == "system" else []
    return [SamplePrompt([*head, {"role": "user", "content": text}]) for text in texts]
