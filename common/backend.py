"""The contract of a backend: nothing but plain Python, and numpy arrays under Hugging Face names, crosses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, SupportsFloat

from common.errors import Unable
from common.memory_terms import MicroBatchShape

if TYPE_CHECKING:
    import numpy as np

    from common.recipe import Plan, Recipe
    from common.sampling import Sampler

Progress = Callable[[float, str], None]  # a fraction in 0..1 and a short text


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right; causal attention makes a padding mask needless.

    `targets` are already shifted: `targets[b, t]` is the token that must follow `input_ids[b, t]`. Its loss counts
    `loss_weights[b, t]` times, and is a label where that is not 0. A row's last token predicts nothing, so it is not
    among the inputs.
    """

    input_ids: np.ndarray  # [B, T] int32
    targets: np.ndarray  # [B, T] int32
    loss_weights: np.ndarray  # [B, T] float32, none below 0; 0 for padding
    lengths: np.ndarray  # [B] int32, real tokens in each row
    rank: int = 0  # that computes it, where several train together

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def label_tokens(self) -> int:
        return int((self.loss_weights > 0).sum())

    @property
    def shape(self) -> MicroBatchShape:
        rows, width = self.input_ids.shape
        return MicroBatchShape(rows, width, self.tokens, self.label_tokens)


def weight_sum(batches: Sequence[Batch]) -> float:
    """Of the labels of a step: what its loss is divided by."""
    return sum(float(batch.loss_weights.sum(dtype="float64")) for batch in batches)


@dataclass(frozen=True)
class StepResult:
    """`loss_sum / weight_sum` is the loss.

    Scalars may be lazy: float() waits for them, and raises OutOfMemory where the step failed and was undone.
    """

    loss_sum: SupportsFloat  # over label tokens, each times its weight
    weight_sum: float
    grad_norm: SupportsFloat  # the global norm before clipping; 0 in evaluation
    label_tokens: int
    tokens: int
    padded_tokens: int  # positions that attention computes: the tokens, and the padding of rows or of rounded shapes

    @staticmethod
    def of(batches: Sequence[Batch], loss_sum: SupportsFloat, grad_norm: SupportsFloat, padded: int) -> StepResult:
        """The result over `batches`, whose tokens and weights are counted here."""
        labels, tokens = sum(batch.label_tokens for batch in batches), sum(batch.tokens for batch in batches)
        return StepResult(loss_sum, weight_sum(batches), grad_norm, labels, tokens, padded)


@dataclass(frozen=True)
class Memory:
    """Bytes. `used` and `peak` are the allocator's where it has one, else resident set growth since before loading."""

    used: int
    peak: int
    total: int
    kind: Literal["unified", "cuda", "rss", "sampled"]  # sampled: a resident set whose peak may have been missed
    swap: int


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is: its size, counted in parameters, and its architecture's name."""

    layers: int
    trainable: int
    total: int  # the adapter's included
    architecture: str
    warning: str = ""  # of what makes it slower here than it could be


@dataclass(frozen=True)
class LoraWeight:
    """One adapted linear layer: `W' = W + scale * B @ A`, with DoRA its rows rescaled to the length `magnitude`.

    DoRA (Liu et al. 2024): row i of W' becomes `magnitude[i] * W'[i] / |W'[i]|`.
    """

    A: np.ndarray  # [r, in] float32
    B: np.ndarray  # [out, r] float32
    alpha: float
    rslora: bool = False  # rank-stabilized, Kalajdzievski 2023
    magnitude: np.ndarray | None = None  # [out] float32, DoRA's

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def parts(self) -> dict[str, np.ndarray]:
        """The trained arrays, by the names that optimizer state uses."""
        found = {"lora_A": self.A, "lora_B": self.B}
        return found if self.magnitude is None else found | {"magnitude": self.magnitude}


@dataclass(frozen=True)
class Adapter:
    """The result of training: LoRA weights by module (`model.layers.0.self_attn.q_proj`), or all weights by name.

    After full fine-tuning `full` holds every tensor in float32, and `weights` is empty. A backend's is read tensor by
    tensor: it changes with the next step, and is gone when the backend is closed.
    """

    base_model: str
    layers: int  # of the base model, 0 where not known: mlx-lm counts adapted layers from the last
    dropout: float
    weights: dict[str, LoraWeight] = field(repr=False)
    full: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    dora: bool = False  # also where the magnitudes are still to be taken from the base

    @property
    def method(self) -> str:
        """As --method names it: lora, dora or full."""
        return "full" if self.full else "dora" if self.dora else "lora"

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        """The most frequent pair among its weights: patterns may give some modules others."""
        return Counter((weight.rank, weight.alpha) for weight in self.weights.values()).most_common(1)[0][0]

    def arrays(self) -> Mapping[str, np.ndarray]:
        """All trained arrays: `<module>.lora_A` and so on, or the tensors of `full`; the names of optimizer state."""
        parts = {f"{name}.{part}": a for name, w in self.weights.items() for part, a in w.parts().items()}
        return parts or self.full

    def copied(self) -> Adapter:
        """The same with arrays of its own, which stay as they are."""
        return replace(self, full=dict(self.full))

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> Adapter:
        """The same adapter with other values in its matrices."""
        weights = {
            name: replace(
                weight,
                A=arrays[f"{name}.lora_A"],
                B=arrays[f"{name}.lora_B"],
                magnitude=arrays.get(f"{name}.magnitude"),
            )
            for name, weight in self.weights.items()
        }
        return replace(self, weights=weights)


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state, portable between backends.

    Keys are `<module>.lora_A`, `.lora_B` and `.magnitude` in PEFT's layout, or tensor names after full fine-tuning. A
    backend's arrays may change with the next step.
    """

    step: int
    exp_avg: Mapping[str, np.ndarray] = field(repr=False)
    exp_avg_sq: Mapping[str, np.ndarray] = field(repr=False)


class OutOfMemory(Unable):
    """Raised in place of the framework's own error; the loop repeats the step in smaller micro-batches.

    undid_previous: the step before this one is undone too, because the device had not written what it computed.
    """

    def __init__(self, reason: str = "", undid_previous: bool = False) -> None:
        fix = "Close other programs; a run continues with --resume RUN and a lower --memory-limit."
        super().__init__(f"Memory ran out: {reason}", fix)
        self.reason, self.undid_previous = reason, undid_previous

    def __str__(self) -> str:
        return self.reason


class Backend(Protocol):
    """One framework. Nothing but numpy and plain Python crosses these calls."""

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        """Load the base from `folder` and attach `adapter`; None: full fine-tuning, every weight is trained.

        A DoRA weight without a magnitude starts from the length of the base's rows, as quantized. Called once.
        """
        ...

    def exchange(self, recipe: Recipe, plan: Plan, adapter: Adapter) -> None:
        """Train another adapter over the base that is loaded, as after `load`; not after full fine-tuning.

        recipe: of the same base, precision, quantization and method. plan: as for apply_plan.
        """
        ...

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        """Be told how many micro-batches of which shapes are to come, where it is better to compute few different ones.

        Others may come all the same.
        """
        ...

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        """The result of one optimizer step: the sum of weighted token losses by the sum of weights, over all batches.

        The weights' sum is above 0.
        `step` (from 1) seeds the dropout masks, so that a resumed run draws the same ones.
        Raises OutOfMemory with weights and optimizer state as they were before the call, or before the one before it
        whose result has not been read: `undid_previous`.
        """
        ...

    def eval_step(self, batch: Batch) -> StepResult:
        """The loss of one micro-batch, without dropout. Raises OutOfMemory."""
        ...

    def get_adapter(self) -> Adapter: ...

    def set_adapter(self, adapter: Adapter) -> None:
        """Copy its arrays, each read once, in the same order on all ranks: rank 0 may send them one by one."""
        ...

    def get_optimizer(self) -> OptimizerState: ...

    def set_optimizer(self, state: OptimizerState) -> None:
        """Copy its arrays, those of `exp_avg` first; as `set_adapter` does."""
        ...

    def dequantized(self) -> dict[str, Callable[[], np.ndarray]]:
        """By tensor name, a function that dequantizes the weight to float32, as this backend computes with it.

        Empty where the base is not quantized.
        """
        ...

    def logits(self, token_ids: np.ndarray, adapter: bool = True, positions: np.ndarray | None = None) -> np.ndarray:
        """Logits [T, vocabulary] float32 of one row of token ids [T], or [P, vocabulary] at `positions` [P] alone.

        adapter: False gives the base model's. Random states are left untouched. Raises OutOfMemory.
        """
        ...

    def generate(
        self,
        token_ids: np.ndarray,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: Sampler,
        adapter: bool = True,
    ) -> Iterator[int]:
        """Yield the ids that follow `token_ids` [T], each chosen by `sampler`; keys and values are cached.

        Ends before one of `stop_ids`, or after `max_new_tokens`. Several may be advanced in turns. Random states are
        left untouched. Raises OutOfMemory.
        """
        ...

    def expert_load(self, rows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        """How often the tokens of rows of ids [T] choose each expert of a mixture: counts [experts] by layer.

        Random states are left untouched. Raises UserError where a layer does not say what is chosen, and OutOfMemory.
        """
        ...

    def memory(self) -> Memory: ...

    def cpu_threads(self) -> tuple[int, int] | None:
        """`(threads that compute now, as many as compute on a quiet machine)`; None where they do not adapt to load."""
        ...

    def apply_plan(self, plan: Plan) -> None:
        """Continue with another plan of the same backend and device: checkpointing and the loss chunk may change."""
        ...

    def close(self) -> None:
        """Free the model; the backend is not used again."""
        ...
