"""THE training loop: one for both backends."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from common.backend import Backend, Batch, Memory, OutOfMemory, StepResult
from common.data.batching import micro_batches, step_rows
from common.data.encode import Encoded
from common.errors import UserError
from common.recipe import Plan, Recipe
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.metrics import timed


class Observer(Protocol):
    """What the loop tells, and the one thing it asks: whether the user wants it to stop."""

    def step(self, line: dict, memory: Memory) -> None: ...

    def evaluation(self, line: dict) -> None: ...

    def warn(self, text: str) -> None: ...

    def stop_requested(self) -> bool: ...


class Interrupted(Exception):
    """The user asked to stop; the step was finished and saved."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of optimizer step `step` (from 1): linear warm-up, then the schedule, which no step sees at zero."""
    if step <= recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    share = (step - 1 - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return recipe.learning_rate * factor[recipe.schedule]


def train(
    backend: Backend,
    recipe: Recipe,
    plan: Plan,
    rows: list[Encoded],
    valid: list[Encoded],
    run: Path,
    state: State,
    observer: Observer,
    seconds: dict[str, float] | None = None,
) -> State:
    """From `state` to the recipe's last step; evaluates, saves and logs on the way.

    A step is saved before it is validated, so that a stop or a kill within a long validation loses nothing; a
    validation that was broken off is done again when the run goes on. `seconds` gets what training, validation and
    saving took, each by itself. Raises Interrupted after a requested stop, UserError for a loss that is not finite or
    memory that no cut saves.
    """
    seconds = {} if seconds is None else seconds
    seconds.setdefault("train", 0.0)
    first, queued, swap, saved_at = True, None, _Swap(backend, plan), time.monotonic()
    if state.gradient_checkpointing != plan.gradient_checkpointing:
        backend.apply_plan(plan.model_copy(update={"gradient_checkpointing": state.gradient_checkpointing}))
    owed = bool(valid) and state.step > state.evaluated and _evaluates(recipe, state.step)
    with _open_metrics(run / "metrics.jsonl", state.step, owed) as metrics:

        def settle(step: _Queued, ended: float) -> None:
            """Wait for the step, look at its figures, tell them."""
            nonlocal first
            loss, norm = _read(step)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _not_finite(run, step.number, step.rows)
            lasted = ended - step.started
            _count(state, step, loss, lasted, timed=not first)
            seconds["train"] += lasted
            first = False
            memory = backend.memory()
            line = {
                "step": step.number,
                "loss": loss,
                "label_tokens": step.result.label_tokens,
                "tokens": step.result.tokens,
                "learning_rate": step.rate,
                "grad_norm": norm,
                "seconds": lasted,
                "memory": memory.used,
            }
            _write(metrics, line)
            observer.step(line, memory)
            swap.look(memory, step.batches, state, observer)

        def save() -> None:
            nonlocal saved_at
            with timed(seconds, "save"):
                checkpoint.save(run, state, backend.get_adapter(), backend.get_optimizer(), recipe.hash())
            saved_at = time.monotonic()

        def validate(saved: bool) -> None:
            with timed(seconds, "evaluate"):
                done = _evaluate(backend, plan, valid, run, state, observer, metrics)
            if done and saved:
                checkpoint.add_evaluation(run, state)
            if not done:
                if not saved:
                    save()
                raise Interrupted(run)

        def cut(number: int) -> tuple[list[Encoded], list[Batch]]:
            chosen = [rows[i] for i in step_rows(len(rows), recipe.batch_size, recipe.seed, number)]
            return chosen, micro_batches(chosen, state.micro_batch_tokens, plan.device)

        if owed:
            validate(saved=True)
        ready = cut(state.step + 1)
        for number in range(state.step + 1, recipe.steps + 1):
            started, rate = time.perf_counter(), learning_rate(recipe, number)
            chosen, batches = ready
            try:
                result, batches = _step(backend, plan, chosen, batches, rate, number, state, observer)
            except UserError:
                if queued is not None:  # that one is done
                    settle(queued, started)
                raise
            before, queued = queued, _Queued(number, rate, chosen, batches, result, started)
            last = number == recipe.steps
            size = state.micro_batch_tokens
            if not last:
                ready = cut(number + 1)  # while the device computes
            if before is not None:
                settle(before, started)
                if not last and state.micro_batch_tokens != size:
                    ready = cut(number + 1)
            stop = observer.stop_requested()
            evaluates = bool(valid) and _evaluates(recipe, number)
            late = plan.save_minutes and time.monotonic() - saved_at >= 60 * plan.save_minutes
            saves = bool(last or stop or late or number % plan.save_every == 0)
            if evaluates or saves or first:  # the first step's time is its own: it warms up
                _read(queued)
                settle(queued, time.perf_counter())
                queued = None
            if saves:
                save()
            if stop:
                raise Interrupted(run)
            if evaluates:
                validate(saves)
    return state


def _evaluates(recipe: Recipe, step: int) -> bool:
    return step == recipe.steps or step % recipe.eval_every == 0


@dataclass(frozen=True)
class _Queued:
    """A step that the device may still be computing: its figures are read a step later, so that it never idles."""

    number: int
    rate: float
    rows: list[Encoded]
    batches: list[Batch]
    result: StepResult
    started: float


def _read(step: _Queued) -> tuple[float, float]:
    """`(mean loss, gradient norm)`, waited for. Raises UserError for what a device reports only now."""
    try:
        return float(step.result.loss_sum) / step.result.label_tokens, float(step.result.grad_norm)
    except RuntimeError as error:
        raise UserError(
            f"Step {step.number} failed on the device: {str(error).splitlines()[0]}",
            "Go on with --resume RUN and a lower --memory-limit.",
        ) from None


def evaluate(
    backend: Backend,
    rows: list[Encoded],
    micro_batch_tokens: int,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean token loss over all label tokens of `rows`; None where `stop` said so between two micro-batches."""
    results: list[StepResult] = []
    for batch in micro_batches(rows, micro_batch_tokens, device):
        if stop():
            return None
        results.append(backend.eval_step(batch))
        if len(results) > 1:
            float(results[-2].loss_sum)  # stay one micro-batch ahead of the device, so that a stop is heard in time
    return sum(float(r.loss_sum) for r in results) / sum(r.label_tokens for r in results)


def _step(
    backend: Backend,
    plan: Plan,
    rows: list[Encoded],
    batches: list[Batch],
    rate: float,
    step: int,
    state: State,
    observer: Observer,
) -> tuple[StepResult, list[Batch]]:
    """The step, cut finer and done again while memory does not suffice; the mathematics stays the same."""
    while True:
        try:
            return backend.train_step(batches, rate, step), batches
        except OutOfMemory:
            _cut_finer(batches, f"step {step} ran out of memory", backend, plan, state, observer)
            batches = micro_batches(rows, state.micro_batch_tokens, plan.device)


def _cut_finer(batches: list[Batch], what: str, backend: Backend, plan: Plan, state: State, observer: Observer) -> None:
    """Halve the widest micro-batch that can be cut; where each is one row, checkpoint gradients.

    The mathematics stays the same. Raises UserError where both are done already, so it ends.
    """
    cuttable = [batch.input_ids.size for batch in batches if len(batch.lengths) > 1]
    if cuttable:
        state.micro_batch_tokens = min(state.micro_batch_tokens, max(cuttable)) // 2
        observer.warn(f"{what}; micro-batches are now cut to {state.micro_batch_tokens} tokens")
    elif not state.gradient_checkpointing:
        state.gradient_checkpointing = True
        backend.apply_plan(plan.model_copy(update={"gradient_checkpointing": True}))
        observer.warn(f"{what}; each layer's work is now done twice to hold less (gradient checkpointing)")
    else:
        longest = max(batch.input_ids.size for batch in batches)
        raise UserError(
            f"{what.capitalize()} with one row at a time; its longest row has {longest} tokens.",
            "Lower --max-length or --rank, or train a smaller model.",
        ) from None


class _Swap:
    """Watches the machine's swap while training: a step that waits for the disk takes minutes."""

    def __init__(self, backend: Backend, plan: Plan) -> None:
        self._backend, self._plan = backend, plan
        self._before = backend.memory().swap

    def look(self, memory: Memory, batches: list[Batch], state: State, observer: Observer) -> None:
        """Warn where swap has grown; with --on-swap replan do something about it from the next step on."""
        grown = memory.swap - self._before
        if grown < _SWAP_GROWTH:
            return
        self._before = memory.swap
        what = f"swap has grown by {grown / 1e6:.0f} MB at step {state.step}: the machine is short of memory"
        if self._plan.on_swap == "warn":
            observer.warn(f"{what}. Close programs; or Ctrl-C, then --resume RUN --memory-limit SIZE")
            return
        try:
            _cut_finer(batches, what, self._backend, self._plan, state, observer)
        except UserError:
            observer.warn(f"{what}, and nothing is left to be cut; close other programs")


_SWAP_GROWTH = 256 * 10**6  # bytes; less comes and goes by itself


def _count(state: State, step: _Queued, loss: float, seconds: float, timed: bool) -> None:
    result = step.result
    state.step, state.train_loss = step.number, loss
    state.tokens += result.tokens
    state.label_tokens += result.label_tokens
    state.padded_tokens += result.positions
    state.train_seconds += seconds
    if timed:
        state.timed_seconds += seconds
        state.timed_tokens += result.tokens
        state.timed_label_tokens += result.label_tokens


def _evaluate(
    backend: Backend, plan: Plan, valid: list[Encoded], run: Path, state: State, observer: Observer, metrics: TextIO
) -> bool:
    """Validate after `state.step`, keep the adapter if it is the best; False where a stop was asked for meanwhile."""
    while True:
        try:
            loss = evaluate(backend, valid, state.micro_batch_tokens, plan.device, observer.stop_requested)
            break
        except OutOfMemory:
            batches = micro_batches(valid, state.micro_batch_tokens, plan.device)
            what = f"the validation after step {state.step} ran out of memory"
            _cut_finer(batches, what, backend, plan, state, observer)
    if loss is None:
        return False
    if not math.isfinite(loss):
        checkpoint.discard(run, state.step)  # what such weights are saved in is nothing to go on from
        raise _not_finite(run, state.step, valid, "validation loss")
    state.evaluated = state.step
    if state.best_valid_loss is None or loss < state.best_valid_loss:
        state.best_valid_loss, state.best_step, state.best = loss, state.step, backend.get_adapter()
    line = {"step": state.step, "valid_loss": loss}
    _write(metrics, line)
    observer.evaluation(line)
    return True


def _not_finite(run: Path, step: int, rows: list[Encoded], what: str = "loss or its gradient") -> UserError:
    found = checkpoint.latest(run)
    kept = f"The checkpoint of step {found[0].step} is kept" if found else "No checkpoint had been written yet"
    more = f" and {len(rows) - 32} more" if len(rows) > 32 else ""
    sources = ", ".join(row.source for row in rows[:32]) + more
    return UserError(
        f"The {what} is not finite at step {step}, on the rows {sources}. {kept}.",
        "Lower --learning-rate or raise --warmup; look at those rows; on a GPU try --precision fp32, or a lower "
        "--memory-limit (Metal has been seen to go on with wrong numbers where memory ran out).",
    )


def _open_metrics(path: Path, step: int, owed: bool):
    """Open for appending, without the lines of what a resumed run will do again: steps after `step`, and where it is
    `owed` the validation after `step`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= step]
    if owed:
        kept = [line for line in kept if _step_of(line) < step or "valid_loss" not in line]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # the last line of a killed run may be cut


def _write(metrics, line: dict) -> None:
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()
