"""A model's answers to many prompts, several at once where llama.cpp makes them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from typing import Any

from common.data.dataset import Example
from common.errors import Refusal
from common.inference.backend_chat import ChatModel
from common.sampling import Sampling


def ask_all(
    model: ChatModel,
    left: dict[int, Example],
    sampling: Sampling,
    slots: int,
    keep: Callable[[int, dict[str, Any]], None],
) -> None:
    """Ask for the rows of `left`, by number; `keep` is called in this thread with the number and the answered row.

    A prompt that the model refuses has `finish: error` and an `error`, and no answer. slots: answers made at once.
    """

    def ask(number: int) -> dict[str, Any]:
        row, text, finish = left[number], "", None
        tools = {"tools": list(row.tools)} if row.tools else {}
        try:
            with closing(model.answer(row.messages, sampling.for_row(number), row.tools)) as pieces:
                for piece, end in pieces:
                    text, finish = text + piece, end
        except Refusal as error:  # of this prompt: others can be answered
            return {"messages": list(row.messages), "finish": "error", "error": error.what} | tools
        return {"messages": [*row.messages, {"role": "assistant", "content": text}], "finish": finish} | tools

    if slots == 1:  # in this thread: a backend's framework may not be called from another
        for number in left:
            keep(number, ask(number))
        return
    pool = ThreadPoolExecutor(slots)
    jobs = {pool.submit(ask, number): number for number in left}
    try:
        for job in as_completed(list(jobs)):
            keep(jobs[job], job.result())
            del jobs[job]
    finally:  # after a failure or Ctrl-C: the server ends next, and with it the answers that are under way
        pool.shutdown(wait=False, cancel_futures=True)
        for job, number in jobs.items():
            if job.done() and not job.cancelled() and job.exception() is None:
                keep(number, job.result())
