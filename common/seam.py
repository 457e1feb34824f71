"""What crosses the line between the shared code and a backend: plain numpy, under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, SupportsFloat

if TYPE_CHECKING:
    import numpy as np

    from common.config import Plan, Recipe

IGNORE = -100  # the label of a position that carries no loss
Progress = Callable[[float, str], None]  # a fraction in 0..1 and a short text


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right; causal attention makes a padding mask needless.

    `labels` are already shifted: `labels[b, t]` is the token that must follow `input_ids[b, t]`, or IGNORE.
    A row's last token predicts nothing, so it is not among the inputs.
    """

    input_ids: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32
    lengths: np.ndarray  # [B] int32, real tokens in each row

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def label_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class StepResult:
    """`loss_sum` is summed over label tokens. Scalars may be lazy: float() waits for them."""

    loss_sum: SupportsFloat
    grad_norm: SupportsFloat  # the global norm before clipping; 0 in evaluation
    label_tokens: int
    tokens: int


@dataclass(frozen=True)
class Memory:
    """Bytes. `used` and `peak` are the allocator's where it has one, else resident set growth since before loading."""

    used: int
    peak: int
    total: int
    kind: Literal["unified", "cuda", "rss"]
    swap: int


@dataclass(frozen=True)
class ModelInfo:
    device: str
    dtype: str
    layers: int
    trainable: int  # parameters
    total: int  # parameters, the adapter's included
    architecture: str


@dataclass(frozen=True)
class LoraWeight:
    """One adapted linear layer: `W + alpha / r * B @ A`."""

    A: np.ndarray  # [r, in] float32
    B: np.ndarray  # [out, r] float32
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """LoRA weights under Hugging Face module names, such as `model.layers.0.self_attn.q_proj`."""

    base_model: str
    rank: int
    alpha: float
    dropout: float
    weights: dict[str, LoraWeight] = field(repr=False)


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state, portable between backends. Keys are `<module>.lora_A` and `<module>.lora_B`, in PEFT's layout."""

    step: int
    exp_avg: dict[str, np.ndarray] = field(repr=False)
    exp_avg_sq: dict[str, np.ndarray] = field(repr=False)


class OutOfMemory(Exception):
    """Raised by a backend instead of its framework's own error; the loop cuts the micro-batch finer and repeats."""


class Backend(Protocol):
    """One framework. Nothing but numpy and plain Python crosses these calls."""

    def load(self, recipe: Recipe, plan: Plan, folder: Path, targets: Sequence[str]) -> ModelInfo:
        """Load the frozen base from `folder` and put a zero adapter on the modules named in `targets`."""
        ...

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        """One optimizer step; the loss is the sum over label tokens divided by their count over all micro-batches.

        `step` (from 1) seeds the dropout masks, so that a resumed run draws the same ones.
        Raises OutOfMemory with weights and optimizer state as they were before the call.
        """
        ...

    def eval_step(self, batch: Batch) -> StepResult: ...

    def get_adapter(self) -> Adapter: ...

    def set_adapter(self, adapter: Adapter) -> None: ...

    def get_optimizer(self) -> OptimizerState: ...

    def set_optimizer(self, state: OptimizerState) -> None: ...

    def logits(self, token_ids: np.ndarray, adapter: bool = True) -> np.ndarray:
        """Logits [T, vocabulary] float32 of one row of token ids [T]; spends no randomness."""
        ...

    def memory(self) -> Memory: ...

    def close(self) -> None:
        """Free the model; the backend is not used again."""
        ...
