"""One training on this computer and on others that help: each computes a part of every step, by its measured speed.

Only this computer updates the adapter: it goes out with the rows, and gradients come back. A worker that leaves costs
the step in which it did, which is done again with who is left; one that comes is taken in from the next step on.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.backend import (
    Adapter,
    Batch,
    ModelInfo,
    OutOfMemory,
    StepResult,
    weight_sum,
)
from common.backend_package import RankPackage
from common.display import Display
from common.memory_terms import MicroBatchShape
from common.rank_backend import RankBackend
from common.recipe import Plan, Recipe
from common.training.dealing import deal_by_speed
from common.training.messages import Message, adapter_parts, batch_arrays, decoded, encoded
from common.training.transport import Line

_LOADING = 1800.0  # seconds that a worker may take to fetch and load the model
_LEAST, _TIMES = 120.0, 20  # seconds that a share may take: so many times what is expected, and never less
_RECENT = 0.3  # weight of the newest step in a measured speed
_POLL = 0.05  # seconds
_RETRY = 2.0  # seconds between attempts to reach a worker that is away


@dataclass
class Helper:
    """A worker as this side sees it. speed: tokens/s, its way here and back included; 0 until it has computed."""

    line: Line | None  # None: this computer itself
    state: str = "away"  # away, loading, ready; unfit: for the session, for want of memory
    what: str = ""
    speed: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    _loading: Any = None
    _tried: float = -1e9
    _said: str = ""

    @property
    def reached(self) -> Line:
        if self.line is None:
            raise RuntimeError("nobody asks this computer over a line")
        return self.line

    def look(self, load: Callable[[], bytes], display: Display) -> None:
        """Begin to load where it is away; take note where it has loaded, or cannot."""
        if self.state == "away" and time.monotonic() - self._tried > _RETRY:
            self._tried, self.state = time.monotonic(), "loading"
            self._loading = self.reached.ask(load(), _LOADING)
        if self.state == "loading" and self._loading.done():
            if fault := self.reached.fault(self._loading):
                self.leave(fault, display)
                return
            message = decoded(self._loading.result())
            if message.kind == "ready":
                self.state, self.what, self._said = "ready", message.values["what"], ""
                display.say(f"{self.reached.address} helps: {self.what}")
            else:
                self.refused(message, display)

    def refused(self, message: Message, display: Display) -> None:
        """It answered by a fault. Where its memory does not suffice, each further attempt would cost a step too."""
        why = str(message.values.get("what", message.kind))
        unfit = bool(message.values.get("memory"))
        self.leave(f"{why}; it is not asked again" if unfit else why, display)
        self.state = "unfit" if unfit else self.state

    def leave(self, why: str, display: Display) -> None:
        """It is away; `why` is said once."""
        self.state, self._tried = "away", time.monotonic()
        if why != self._said:
            self._said = why
            display.warn(f"{self.reached.address} does not help: {why}")

    def finished(self, tokens: int, seconds: float) -> None:
        now = tokens / max(seconds, 1e-6)
        self.speed = now if not self.speed else _RECENT * now + (1 - _RECENT) * self.speed
        self.tokens, self.steps, self.seconds = self.tokens + tokens, self.steps + 1, self.seconds + seconds


class Asked:
    """A share of a step that a helper computes."""

    def __init__(self, helper: Helper, share: Sequence[Batch], data: bytes, began: float) -> None:
        self.helper, self.ended = helper, began
        self.tokens = sum(batch.tokens for batch in share)
        limit = max(_LEAST, _TIMES * self.tokens / helper.speed) if helper.speed else _LOADING
        self.future = helper.reached.ask(data, limit)
        self.future.add_done_callback(self._end)

    def _end(self, future: Any) -> None:
        self.ended = time.perf_counter()

    def reply(self, shapes: Mapping[str, tuple[int, ...]], display: Display) -> Message | None:
        """With loss, positions and gradients of these shapes; None where the helper has left."""
        if fault := self.helper.reached.fault(self.future):
            self.helper.leave(fault, display)
            return None
        message = decoded(self.future.result())
        if message.kind != "gradients":
            self.helper.refused(message, display)
        elif {name: array.shape for name, array in message.arrays.items()} != shapes:
            self.helper.leave("its gradients are of another adapter", display)
        else:
            return message
        return None


class SharedBackend:
    """See `common.backend.Backend` for the contract of every method. display: for what becomes of the workers."""

    def __init__(self, local: RankBackend, lines: Sequence[Line], display: Display) -> None:
        self.local, self.display = local, display
        self.session = secrets.token_hex(8)
        self.helpers = [Helper(line) for line in lines]
        self.own = Helper(None)
        self.eval_step, self.logits, self.generate = local.eval_step, local.logits, local.generate
        self.get_adapter, self.set_adapter = local.get_adapter, local.set_adapter
        self.get_optimizer, self.set_optimizer = local.get_optimizer, local.set_optimizer
        self.dequantized, self.memory, self.cpu_threads = local.dequantized, local.memory, local.cpu_threads
        self.expert_load = local.expert_load

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        info = self.local.load(recipe, plan, folder, adapter)
        self.recipe, self.plan = recipe, plan
        self.own.what = f"{plan.backend} on {plan.device_name}"
        self._look()
        while any(helper.state == "loading" for helper in self.helpers):  # those that are there help from the start
            time.sleep(_POLL)
            self._look()
        return info

    def _look(self) -> None:
        for helper in self.helpers:
            helper.look(self._load_message, self.display)

    def _load_message(self) -> bytes:
        values, arrays = adapter_parts(self.local.get_adapter())
        told = {"session": self.session, "recipe": self.recipe.content(), "adapter": values}
        plan = {"backend": self.plan.backend, "micro_batch_tokens": self.plan.micro_batch_tokens}
        return encoded("load", told | plan, arrays)

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        weight = weight_sum(micro_batches)
        while (positions := self._accumulate(micro_batches, weight, step)) is None:
            pass  # a worker has left: again with who is left
        return StepResult.of(micro_batches, *self.local.apply_gradients(learning_rate), positions)

    def _accumulate(self, micro_batches: Sequence[Batch], weight: float, step: int) -> int | None:
        """Positions computed in all; None where a worker has left, and the step must be done again."""
        self._look()
        ready = [helper for helper in self.helpers if helper.state == "ready"]
        known = [helper.speed for helper in [self.own, *ready] if helper.speed]
        speeds = [helper.speed or min(known, default=1.0) for helper in [self.own, *ready]]
        mine, *theirs = deal_by_speed(micro_batches, speeds, self.plan.device)
        began = time.perf_counter()
        asked = [
            Asked(helper, share, self._share_message(share, weight, step), began)
            for helper, share in zip(ready, theirs, strict=True)
            if share
        ]
        try:
            positions = self.local.accumulate(mine, weight, step)
        except OutOfMemory:
            for one in asked:
                one.future.cancel()
            raise
        self.local.accumulated_loss()  # waits
        ended = time.perf_counter()
        shapes = {name: array.shape for name, array in self.local.get_adapter().arrays().items()} if asked else {}
        found = [one.reply(shapes, self.display) for one in asked]
        for reply in found:
            if reply is None:
                return None
            self.local.add_gradients(reply.values["loss"], dict(reply.arrays))
            positions += int(reply.values["positions"])
        for one in asked:
            one.helper.finished(one.tokens, one.ended - began)
        if mine:
            self.own.finished(sum(batch.tokens for batch in mine), ended - began)
        return positions

    def _share_message(self, share: Sequence[Batch], weight: float, step: int) -> bytes:
        ranks = [batch.rank for batch in share]
        values = {"session": self.session, "step": step, "weight": weight, "ranks": ranks}
        arrays = {f"a:{name}": array for name, array in self.local.get_adapter().arrays().items()}
        return encoded("gradients", values, arrays | {f"b:{n}": a for n, a in batch_arrays(share).items()})

    def shares(self) -> list[dict[str, Any]]:
        """What each computer has done: who, tokens, steps, tokens/s."""
        named = [("here", self.own), *((helper.reached.address, helper) for helper in self.helpers)]
        return [
            {
                "who": name,
                "what": h.what,
                "tokens": h.tokens,
                "steps": h.steps,
                "tokens_per_second": h.tokens / h.seconds,
            }
            for name, h in named
            if h.steps
        ]

    def close(self) -> None:
        self.release()
        self.local.close()

    def release(self) -> None:
        """The workers need not help any longer."""
        for helper in self.helpers:
            if helper.state in ("loading", "ready"):
                helper.reached.ask(encoded("close", {"session": self.session}, {}), 10.0).exception()
                helper.state = "away"

    def exchange(self, recipe: Recipe, plan: Plan, adapter: Adapter) -> None:
        raise NotImplementedError("one training after another over a loaded base is for one computer")

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        """Nothing: the shapes depend on speeds."""

    def apply_plan(self, plan: Plan) -> None:
        self.plan = plan
        self.local.apply_plan(plan)


class SharedPackage:
    """A package whose backend has workers. See `common.backend_package.BackendPackage`."""

    def __init__(self, package: RankPackage, lines: Sequence[Line], display: Display) -> None:
        self._package, self._lines, self._display = package, lines, display
        self.memory_terms, self.fault, self.free_memory = package.memory_terms, package.fault, package.free_memory
        self.choose_device, self.choose_precision = package.choose_device, package.choose_precision
        self.quantization_scheme, self.is_deterministic = package.quantization_scheme, package.is_deterministic
        self.plain_layers = package.plain_layers

        self._created: list[SharedBackend] = []

    def create(self) -> SharedBackend:
        self._created.append(SharedBackend(self._package.create(), self._lines, self._display))
        return self._created[-1]

    def release(self) -> None:
        for backend in self._created:
            backend.release()
