"""What the loop does where memory is short: smaller micro-batches, then gradient checkpointing; swap is watched."""

from dataclasses import dataclass, field

from common.backend import Backend, Batch, Memory
from common.errors import UserError
from common.recipe import Plan
from common.training.checkpoint import State
from common.training.observer import Observer

_COMPUTED_TWICE = "each layer is now computed twice, to save memory (gradient checkpointing)"
SWAP_GROWTH = 256 * 10**6  # bytes; smaller changes come and go by themselves


@dataclass
class ShortMemory:
    """Changes `state`, and through apply_plan the backend; the mathematics stays the same."""

    backend: Backend
    plan: Plan
    state: State
    observer: Observer
    _swap: int = field(init=False)

    def __post_init__(self) -> None:
        self._swap = self.backend.memory().swap
        if self.state.gradient_checkpointing != self.plan.gradient_checkpointing:
            self._checkpoint_gradients(self.state.gradient_checkpointing)

    @property
    def current_plan(self) -> Plan:
        """With the micro-batches and the checkpointing that are used now."""
        names = ("micro_batch_tokens", "gradient_checkpointing")
        return self.plan.model_copy(update={name: getattr(self.state, name) for name in names})

    def use_less(self, batches: list[Batch], what: str) -> None:
        """Halve the largest micro-batch; where each is one row, checkpoint gradients.

        Raises UserError where nothing is left to do, so this ends.
        """
        splittable = [batch.input_ids.size for batch in batches if len(batch.lengths) > 1]
        if splittable:
            self.state.micro_batch_tokens = min(self.state.micro_batch_tokens, max(splittable)) // 2
            self.observer.warn(f"{what}; micro-batches now have at most {self.state.micro_batch_tokens} tokens")
        elif not self.state.gradient_checkpointing:
            self.state.gradient_checkpointing = True
            self._checkpoint_gradients(True)
            self.observer.warn(f"{what}; {_COMPUTED_TWICE}")
        else:
            longest = max(batch.input_ids.size for batch in batches)
            raise UserError(
                f"{what.capitalize()} with one row at a time; its longest row has {longest} tokens.",
                "Lower --max-length or --rank, or train a smaller model.",
            ) from None

    def use_plan(self, plan: Plan, what: str) -> None:
        """Use the plan's micro-batches and checkpointing from the next step on."""
        changes = []
        if plan.micro_batch_tokens < self.state.micro_batch_tokens:
            self.state.micro_batch_tokens = plan.micro_batch_tokens
            changes.append(f"micro-batches now have at most {plan.micro_batch_tokens} tokens")
        if plan.gradient_checkpointing and not self.state.gradient_checkpointing:
            self.state.gradient_checkpointing = True
            self._checkpoint_gradients(True)
            changes.append(_COMPUTED_TWICE)
        self.observer.warn("; ".join([what, *changes]))

    def _checkpoint_gradients(self, on: bool) -> None:
        self.backend.apply_plan(self.plan.model_copy(update={"gradient_checkpointing": on}))

    def watch_swap(self, memory: Memory, batches: list[Batch]) -> None:
        """Warn where swap has grown; with --on-swap replan, use smaller micro-batches from the next step on.

        A step that waits for the disk takes minutes.
        """
        growth = memory.swap - self._swap
        if growth < SWAP_GROWTH:
            return
        self._swap = memory.swap
        what = f"swap has grown by {growth / 1e6:.0f} MB at step {self.state.step}: the machine is short of memory"
        if self.plan.on_swap == "warn":
            self.observer.warn(f"{what}. Close programs; or Ctrl-C, then --resume RUN --memory-limit SIZE")
            return
        try:
            self.use_less(batches, what)
        except UserError:
            self.observer.warn(f"{what}, and micro-batches cannot be smaller; close other programs")
