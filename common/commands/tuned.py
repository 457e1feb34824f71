"""What the loaded model shows when its training is complete: the loss of the test rows, and an answer."""

from common.backend import Adapter, Backend
from common.commands.prepare import Job
from common.commands.watch import chat_format
from common.data.encoded_rows import rows_hash
from common.display import Display
from common.evaluation.bootstrap import estimate, mean, perplexity
from common.evaluation.losses import grouped_losses
from common.export.gguf import SAMPLE_TOKENS
from common.inference.backend_chat import backend_chat_model
from common.sampling import Sampling
from common.training.metrics import timed


def score_test(job: Job, backend: Backend, adapter: Adapter, seconds: dict[str, float], display: Display) -> None:
    """Show and keep the exported adapter's loss over the test rows. A failure here costs nobody a training."""
    if not job.test:
        return
    with display.optional("the test rows are not scored"), timed(seconds, "test"):
        restore(job, backend, adapter)
        with display.stage("score the test rows") as progress:
            losses = grouped_losses(backend, job.test, job.plan, job.recipe.seed, progress)
        loss = estimate(losses, mean, job.recipe.seed)
        of_tokens = loss.through(perplexity)
        job.run.update(
            test_loss=loss.value,
            test_loss_interval=loss.interval,
            test_perplexity=of_tokens.value,
            test_perplexity_interval=of_tokens.interval,
            test_rows=len(job.test),
            test_hash=rows_hash(job.test),
        )
        display.say(f"test loss {loss:.4f}, perplexity {of_tokens:.3f} over {len(job.test)} rows")


def sample(job: Job, backend: Backend, adapter: Adapter, display: Display) -> None:
    """Show and keep the tuned model's answer to the sample prompt. A failure here costs nobody a training."""
    prompt = job.prompts[0]
    with display.optional("no sample"):
        restore(job, backend, adapter)
        model = backend_chat_model(backend, chat_format(job), "", True)
        pieces = model.answer(prompt.messages, Sampling(temperature=0, max_tokens=SAMPLE_TOKENS), prompt.tools)
        answer = "".join(text for text, _ in pieces)
        job.run.update_export(sample={"prompt": prompt.messages, "answer": answer})
        display.sample(job.plan.backend, prompt.text, answer)


def restore(job: Job, backend: Backend, adapter: Adapter) -> None:
    """Have the backend hold the exported adapter, where training continued after it."""
    if job.run.record.exported_step != job.run.record.steps:
        backend.set_adapter(adapter)
