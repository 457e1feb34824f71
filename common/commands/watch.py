"""How a training is watched: its observer, which shows it and asks the model at each validation. A step of `train`."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext

from common.backend import Backend
from common.commands.prepare import Job
from common.data.sample_prompts import given_prompts
from common.display import Display
from common.evaluation.samples import LONGEST, Samples
from common.inference.backend_chat import ChatFormat, backend_chat_model
from common.training.checkpoint import State
from common.training.metrics import Metrics
from common.training.observer import DisplayObserver

FILE = "samples.jsonl"


@contextmanager
def watching(
    job: Job, backend: Backend, state: State, display: Display, stops: Sequence[int]
) -> Iterator[DisplayObserver]:
    """The observer of the loop. Where the model cannot be asked, a warning says why, and training goes on."""
    given = given_prompts(job.options.sample_prompt, job.prompts)
    prompts = [*given, *job.prompts[: max(0, len(job.prompts) - len(given))]]
    if not prompts or not job.valid:
        yield DisplayObserver(display, stops)
        return
    unvalidated = state.step > state.evaluated
    lines = None if job.options.no_text else Metrics(job.run.path / FILE, state.step, unvalidated, display.warn)
    samples: list[Samples] = []
    with display.optional("no samples during training"):
        longest = max(prompt.tokens for prompt in prompts)
        model = backend_chat_model(backend, chat_format(job, longest + 2 * LONGEST), "", True)
        samples.append(Samples(model, prompts, lines))

    def ask(step: int) -> None:
        for each in [*samples]:
            samples.clear()  # a model that failed is not asked again
            with display.optional("no samples during training"):
                each.ask(step, display, lambda: bool(stops))
                samples.append(each)

    with closing(lines) if lines else nullcontext():
        yield DisplayObserver(display, stops, ask)


def chat_format(job: Job, context: int) -> ChatFormat:
    """How the model is prompted, as it is trained. context: tokens of prompt and answer together."""
    served, think = job.served, job.recipe.thinking == "keep"
    return ChatFormat(job.base.model.path, served.template, served.stops, think, context)
