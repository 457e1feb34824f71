"""What a backend's `memory_terms.py` is asked, in sizes of a model and a micro-batch, and answers in bytes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from common.recipe import Plan, Recipe

_AT_ONCE = 2**20  # values of an array


@dataclass(frozen=True)
class DeltaDims:
    """The sizes of a model's gated delta nets, which stand in place of attention."""

    layers: int
    keys: int  # width of all key heads, that of the queries too
    values: int  # width of all value heads
    head_dim: int  # of keys and queries
    value_dim: int

    def kept(self, padding: float) -> float:
        """Values that a net keeps of each token. padding: padded positions of a token."""
        mixed = 2 * self.keys + self.values
        # before and after SiLU, queries and keys of length 1; the output, its norm, the gate and their product
        return (2 * mixed + 2 * self.keys) * padding + 4 * self.values

    def computed(self, positions: int) -> int:
        """Values of all queries, or all values, that are computed at once: of a group of heads.

        positions: padded ones of a micro-batch.
        """
        key_heads = self.keys // self.head_dim
        size = positions * max(self.head_dim, self.value_dim) * (self.values // self.value_dim // key_heads)
        return size * key_heads_at_once(size, key_heads)


def key_heads_at_once(size: int, count: int) -> int:
    """Of a gated delta net with `count` key heads, how many are computed at once. size: values of one and all its rows.

    Some twenty arrays as large as this are needed for a moment. A GPU is busy with fewer.
    """
    return max(1, min(count, _AT_ONCE // size))


@dataclass(frozen=True)
class LayerInputs:
    """Embeddings of each layer, beside those of the model."""

    table: int  # weights, of which those of a batch's tokens are looked up
    width: int  # of a token in one layer

    def kept(self, hidden: int) -> int:
        """Values that a layer keeps of each token more: around its own norm, and of the gate."""
        return 2 * hidden + 4 * self.width


@dataclass(frozen=True)
class ModelDims:
    """The sizes of a model that memory depends on. Where its layers differ in width: the mean."""

    hidden: int
    inner: int  # of the MLP
    widest: int  # the widest MLP
    queries: int  # width of all heads
    keys: int  # width of all key heads
    heads: int
    head_dim: int  # the widest
    layers: int
    vocabulary: int
    linear: int  # weights in layers that are quantized and adapted
    other: int  # embeddings, norms, an untied head
    gemma: bool  # norms after attention and MLP too
    capped: bool  # attention scores
    final_cap: bool  # logits
    normed: bool  # queries and keys
    windows: tuple[int | None, ...]  # of each layer; None: it sees all tokens before
    splits: bool  # long rows are computed apart from short ones (longrope)
    stored: int  # bytes of a weight in the checkpoint
    delta: DeltaDims | None = None
    layer_inputs: LayerInputs | None = None
    convolved: int = 0  # layers with a short convolution in place of attention
    shardable: bool = True
    quantized: bool = False  # the checkpoint's weights, embeddings among them, by MLX
    plain: bool = False  # computed by the library's own layers, which keep all logits of a row

    @property
    def table(self) -> int:
        """Weights, a part of `other`, that stay in the stored type unless they are trained."""
        return self.layer_inputs.table if self.layer_inputs else 0

    @property
    def untied(self) -> bool:
        """Whether the output head has weights of its own, beside the embeddings."""
        return self.other - self.table >= 2 * self.vocabulary * self.hidden

    @property
    def padded(self) -> bool:
        """Whether attention pads rows on every device: where scores are capped, and beside layers of another kind."""
        return self.capped or self.delta is not None or bool(self.convolved)


class MicroBatchShape(NamedTuple):
    """The sizes of a micro-batch, on which memory and time depend."""

    rows: int
    width: int  # tokens of the longest row
    tokens: int  # without padding
    labels: int

    @property
    def positions(self) -> int:
        """Those that attention computes."""
        return self.rows * self.width


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one micro-batch adds: `saved` for the backward pass, and the larger of the other two."""

    saved: float
    working: float  # within a layer's backward pass
    loss: float  # of a chunk


@dataclass(frozen=True)
class ShardedBytes:
    """Bytes that a rank holds of a sharded model."""

    weights: int  # its part of all, and the complete ones that are computed with
    gathering: int  # for a moment, before a micro-batch is computed
    state: int  # gradients and moments of full fine-tuning


@dataclass(frozen=True)
class MeasuredTerms:
    """What cannot be counted. `overhead`: bytes of libraries' own buffers; `slack`: share that the allocator adds."""

    overhead: int
    slack: float
    known: bool  # measured on this kind of device; False: guessed


class MemoryTerms(Protocol):
    """A backend's `memory_terms.py`: what its own code holds, in bytes."""

    def loss_chunk(self, vocabulary: int, device: str) -> int:
        """Label positions whose logits are computed at once."""

    def weight_bytes(self, dims: ModelDims, recipe: Recipe) -> int:
        """The base, in the recipe's precision and quantization."""

    def held_bytes(self, dims: ModelDims, recipe: Recipe, device: str) -> int:
        """The base as training holds it: less than `weight_bytes` where stored 16-bit weights are not widened."""

    def unshardable(self, dims: ModelDims, recipe: Recipe) -> str:
        """Why the ranks cannot hold a part of the model each; empty where they can."""

    def sharded_bytes(self, dims: ModelDims, recipe: Recipe, plan: Plan) -> ShardedBytes:
        """What a rank holds of a sharded model."""

    def adapter_copies(self, recipe: Recipe, device: str) -> float:
        """Float32 copies of the adapter's weights."""

    def message_copies(self, device: str) -> tuple[int, int]:
        """Float32 copies of the adapter that messages with each worker take: in a micro-batch, and more after it."""

    def update_copies(self, recipe: Recipe, device: str) -> float:
        """Float32 copies of what is trained that are made, and let go, while the optimizer updates it."""

    def loading_bytes(self, dims: ModelDims, recipe: Recipe) -> int:
        """The peak while the model is loaded; 0 where a step always takes more."""

    def step_memory(self, dims: ModelDims, recipe: Recipe, plan: Plan, shape: MicroBatchShape) -> StepMemory:
        """What one micro-batch adds."""

    def measured(self, device: str, precision: str, tokens: Collection[int]) -> MeasuredTerms:
        """The coefficients of a kind of device. tokens: of each micro-batch, whose number decides what is compiled."""
