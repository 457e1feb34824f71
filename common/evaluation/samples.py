"""Answers to the same few prompts at every validation of a training, beside those from before its first step."""

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.sample_prompts import SamplePrompt
from common.display import Display
from common.documents import read_json_lines
from common.inference.backend_chat import ChatModel
from common.sampling import Sampling
from common.training.metrics import Metrics

LONGEST = 96  # tokens of an answer; fewer where the row's own is short
_MORE = 8  # tokens beyond one and a half times the row's own
_LONG = 20  # characters of a beginning that is more than a turn of phrase
_SECONDS, _SHARE = 8.0, 0.03  # that answers may take: so many at first and at last, between so much of the time


@dataclass(frozen=True)
class Answer:
    """To one of the prompts. ended: whether it came to its end within the tokens that it had."""

    prompt: SamplePrompt
    text: str
    ended: bool


class Samples:
    """Asks the model that is being trained.

    Each answer is a line of a file, with the step, the prompt's last turn, the row's own answer, and whether it ended.
    """

    def __init__(
        self,
        model: ChatModel,
        prompts: Sequence[SamplePrompt],
        file: Metrics,
        texts: bool = True,
        seconds: float = _SECONDS,
        trained: Set[str] = frozenset(),
    ) -> None:
        """texts: whether answers are kept. seconds: that they may take at first. trained: answers of training rows."""
        self._trained = trained
        self._model, self._prompts, self._file, self._texts, self._seconds = model, prompts, file, texts, seconds
        self._before = _answers_before(file.path)
        self._began, self._spent = time.monotonic(), 0.0
        self._expected = [0.0] * len(prompts)  # seconds that each answer takes, as far as is known
        self._beside = 0.0  # seconds that `spend` counted last

    def ask(self, step: int, display: Display, stop: Callable[[], bool], last: bool = False) -> list[dict[str, Any]]:
        """A line for each answer after `step`, kept and the first one shown.

        There are none before the time that has been saved up is enough for all, by what they took before. They end
        where they take longer, or a stop comes. last: no validation follows, and there is as much time as at first.
        """
        began = time.monotonic()
        allowed = self._seconds + _SHARE * (began - self._began) - self._spent
        if last:
            allowed = max(allowed, self._seconds)
        elif sum(self._expected) + self._beside > allowed:
            return []
        answers: list[Answer] = []
        for number, prompt in enumerate(self._prompts):
            asked = time.monotonic()
            answer = self._answer(prompt, lambda: stop() or time.monotonic() - began > allowed)
            taken = time.monotonic() - asked
            if answer is None:
                longest = max(*self._expected, 2 * taken)  # that those took whose time is not known
                self._expected[number:] = [longest] * (len(self._prompts) - number)
                break
            self._expected[number] = taken
            answers.append(answer)
        self._spent += time.monotonic() - began
        if not step:
            self._before = {(number, answer.prompt.text): answer.text for number, answer in enumerate(answers)}
        lines = [_line(step, number, answer, self._trained) for number, answer in enumerate(answers)]
        for line in lines if self._texts else []:
            self.keep(line)
        if answers:
            self._show(step, answers[0], display)
        return lines

    def spend(self, seconds: float) -> None:
        """Count seconds that something asked beside the answers has taken, and will take the next time."""
        self._spent += seconds
        self._beside = seconds

    def keep(self, line: dict[str, Any]) -> None:
        """Write the line into the file of the answers."""
        self._file.write(line)

    def _answer(self, prompt: SamplePrompt, late: Callable[[], bool]) -> Answer | None:
        """None where it got too late."""
        text, ended = "", False
        if late():
            return None
        longest = min(LONGEST, prompt.labels * 3 // 2 + _MORE) if prompt.labels else LONGEST
        pieces = self._model.answer(prompt.messages, Sampling(temperature=0, max_tokens=longest), prompt.tools)
        for piece, end in pieces:
            text, ended = text + piece, end == "stop"
            if late():
                pieces.close()
                return None
        return Answer(prompt, text, ended)

    def _show(self, step: int, answer: Answer, display: Display) -> None:
        before = self._before.get((0, answer.prompt.text))
        display.sample(
            f"step {step}" if step else "before the first step",
            answer.prompt.text,
            answer.text,
            before if step else None,
        )


def _line(step: int, number: int, answer: Answer, trained: Set[str]) -> dict[str, Any]:
    """known: the answer is that of a training row, word for word; one that was cut, where it is the beginning of one.

    copied: and the prompt's own answer is none of those.
    """
    line = {"step": step, "number": number, "prompt": answer.prompt.text, "reference": answer.prompt.answer}
    text = answer.text.strip()
    known = text in trained or (not answer.ended and len(text) >= _LONG and any(t.startswith(text) for t in trained))
    copied = known and answer.prompt.answer.strip() not in trained
    return line | {"answer": answer.text, "ended": answer.ended, "known": known, "copied": copied}


def _answers_before(file: Path) -> dict[tuple[Any, Any], str]:
    """The answers from before the first step, by number and text of the prompt."""
    lines = read_json_lines(file, "Remove it: no result depends on it.")
    found = [line for line in lines if line.get("step") == 0 and "answer" in line]
    return {(line.get("number", 0), line.get("prompt")): str(line.get("answer")) for line in found}
