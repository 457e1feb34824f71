"""The terms of torch's memory estimate: see `common.memory_terms.MemoryTerms`. Imports no torch.

They are counted from what the backward passes of `linear.py`, `mlp.py`, `norm.py`, `rope.py` and `attention.py` keep.
A change there changes a term here; `python -m benchmarks.memory` compares the estimate with measured peaks.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from common.data.batching import LABEL_STEPS, TOKEN_STEPS, rounded
from common.memory_terms import MeasuredTerms, MicroBatchShape, ModelDims, ShardedBytes, StepMemory
from common.recipe import Plan, Recipe
from common.system.hardware import cpu_bf16
from torch_backend.host_memory import KEPT_BLOCKS, TRIM_EVERY

_MEGA = 10**6
_MEASURED = {
    "cpu": MeasuredTerms(40 * _MEGA, 0.0, True),
    "cuda": MeasuredTerms(180 * _MEGA, 0.0, True),  # on an H200: cuBLAS's memory, with graphs and without
    "mps": MeasuredTerms(500 * _MEGA, 0.1, False),
}
# A CPU's bf16 products are compiled and kept for each length of a micro-batch, in multiples of PAD_MULTIPLE, and each
# leaves other gaps in the heap: 0.11 GB for one, 0.30 for 11 and 0.46 for 20 on one thread, and on two 0.65 for 19
# (SmolLM2-135M, an Intel Xeon with amx_bf16, 30 November 2026, commits 70e0c38 and 368f737). Of more lengths the oldest
# products are dropped.
PAD_MULTIPLE = 16
_COMPILED, _LENGTH, _MOST_LENGTHS = 85 * _MEGA, 28 * _MEGA, 24
_PROCESSORS = 132  # of the H200
_COMPLETE_LAYERS = 6  # of a sharded model: two and the buffer of a third, and with glibc the gaps that they leave
_GATHERED = 30 * _MEGA  # FSDP2's and gloo's buffers
# Share of what lies in blocks below twice KEPT_BLOCKS, with glibc 2.36. widened: products widen bf16 activations.
_GAPS = {"fp32": 0.25, "bf16": 0.15, "widened": 0.55}


def packs_attention(head_dim: int, padded: bool, device: str, precision: str) -> bool:
    """Whether attention reads packed rows (varlen), without padding, and with a deterministic backward pass.

    torch's FlashAttention does: in bf16 on an NVIDIA GPU from Ampere on, for these head sizes. padded: the model is one
    of those that pad all the same (`ModelDims.padded`).
    """
    return device == "cuda" and precision == "bf16" and not padded and head_dim % 8 == 0 and head_dim <= 256


def loss_chunk(vocabulary: int, device: str) -> int:
    """As many labels as have logits of 32 MB, on GPUs more, but never so few that products become slow.

    Half of 64 labels made a step of Gemma-3-270M a quarter longer. On an H200 the loss took half as long again with 128
    as with 256.
    """
    budget = 2**20 * {"cuda": 256, "mps": 64}.get(device, 32)
    return min(1024, max(64, budget // (4 * vocabulary) // 32 * 32))


def weight_bytes(dims: ModelDims, recipe: Recipe) -> int:
    return _weight_bytes(dims, recipe, 2 if recipe.precision == "bf16" else 4) + _table_bytes(dims, recipe)


def held_bytes(dims: ModelDims, recipe: Recipe, device: str) -> int:
    """On a CPU a frozen base stays as it is stored, and products widen it."""
    item = 2 if recipe.precision == "bf16" else 4
    stored = device == "cpu" and recipe.method != "full" and not dims.plain
    held = _weight_bytes(dims, recipe, min(item, dims.stored) if stored else item)
    # what is looked up of a mapped table the system may take back
    mapped = device == "cpu" and dims.stored == 2 and recipe.method != "full" and recipe.quantization != "int8"
    return held if mapped else held + _table_bytes(dims, recipe)


def _table_bytes(dims: ModelDims, recipe: Recipe) -> int:
    """Of embeddings of each layer, which are widened where they are trained, or read by transformers for int8."""
    item = 2 if recipe.precision == "bf16" else 4
    return dims.table * (item if recipe.method == "full" or recipe.quantization == "int8" else min(item, dims.stored))


def _weight_bytes(dims: ModelDims, recipe: Recipe, item: int) -> int:
    """Of all but embeddings of each layer. item: bytes of a weight that is not quantized."""
    other = dims.other - dims.table
    if recipe.quantization == "nf4":
        return round(dims.linear * (0.5 + 4 / 64) + other * item)  # a float32 scale for every 64 weights
    if recipe.quantization == "int8":
        return dims.linear + other * (2 if recipe.precision == "bf16" else 4)
    return (dims.linear + other) * item


def unshardable(dims: ModelDims, recipe: Recipe) -> str:
    if dims.plain:
        return "its architecture has no layers of ours"
    if dims.delta is not None:
        return "its gated delta nets were not tried so"
    if dims.convolved:
        return "its short convolutions were not tried so"
    if not dims.shardable:
        return "a Gemma 4 was not tried so"
    if recipe.quantization != "none":  # bitsandbytes' issue 1945
        return f"bitsandbytes' {recipe.quantization} weights cannot be sharded exactly"
    if recipe.method == "dora" and dims.stored != (2 if recipe.precision == "bf16" else 4):
        return "DoRA's lengths would be those of weights before they are converted"
    return "long rows of this model are computed apart from short ones" if dims.splits else ""


def sharded_bytes(dims: ModelDims, recipe: Recipe, plan: Plan) -> ShardedBytes:
    count, layers = dims.linear + dims.other, _COMPLETE_LAYERS * dims.linear / dims.layers
    item = held_bytes(dims, recipe, plan.device) / count
    weights = item * (count / plan.ranks + dims.other + layers) + _GATHERED
    return ShardedBytes(round(weights), round(item * dims.other), round(12 * count / plan.ranks + 4 * layers))


def adapter_copies(recipe: Recipe, device: str) -> float:
    """On a CPU the arrays of the adapter that training started from stay in memory.

    Our own products in bf16 read a copy in their type.
    """
    plain = recipe.method != "full" and recipe.quantization != "int8"
    computed = device == "cuda" or (device == "cpu" and bool(cpu_bf16()))
    copied = 0.5 if recipe.precision == "bf16" and plain and computed else 0.0
    return (2 if device == "cpu" else 1) + copied


def message_copies(device: str) -> tuple[int, int]:
    """On a GPU's host they are nowhere counted."""
    return (4, 3) if device == "cpu" else (0, 0)


def update_copies(recipe: Recipe, device: str) -> float:
    """AdamW updates in place."""
    return 0.0


def loading_bytes(dims: ModelDims, recipe: Recipe) -> int:
    return 0


def measured(device: str, precision: str, tokens: Collection[int]) -> MeasuredTerms:
    terms = _MEASURED[device]
    if device != "cpu" or precision != "bf16":
        return terms
    lengths = min(_MOST_LENGTHS, len({-(-count // PAD_MULTIPLE) for count in tokens})) if cpu_bf16() else 0
    return replace(terms, overhead=terms.overhead + _COMPILED + _LENGTH * lengths)


@dataclass(frozen=True)
class _Kernels:
    """How a micro-batch is computed, which decides what is kept of it."""

    item: int  # bytes of an activation
    low: int  # bytes of a value of `x @ A.T`
    widened: bool  # 16-bit activations, but products in float32
    copied: bool  # the backward pass of attention in float32
    packed: bool  # attention reads packed rows
    general: bool  # by PEFT's and transformers' own layers
    repeated: bool  # key heads are repeated for each of their queries
    outputs: bool  # of DoRA's layers are kept
    dropped: bool  # some of the adapter's inputs
    tokens: int
    labels: int
    padding: float  # padded positions of a token in attention

    @staticmethod
    def of(dims: ModelDims, recipe: Recipe, device: str, shape: MicroBatchShape) -> "_Kernels":
        packed = packs_attention(dims.head_dim, dims.padded, device, recipe.precision)
        general = dims.plain or recipe.method == "full" or recipe.quantization == "int8"
        tokens, labels = shape.tokens, shape.labels
        if packed and not general and recipe.method == "lora" and not recipe.dropout:  # as CUDA graphs round them
            tokens, labels = rounded(tokens, *TOKEN_STEPS), rounded(labels, *LABEL_STEPS)
        item = 4 if recipe.precision == "fp32" else 2
        widened = device == "cpu" and item == 2 and (general or not cpu_bf16())
        return _Kernels(
            item=item,
            low=4 if general or widened or device == "mps" else item,
            widened=widened,
            copied=device == "cpu" and item == 2 and not (dims.plain or dims.capped),
            packed=packed,
            general=general,
            repeated=device == "cuda" and not packed,
            outputs=recipe.method == "dora",
            dropped=bool(recipe.dropout),
            tokens=tokens,
            labels=labels,
            padding=1.0 if packed else shape.rows * shape.width / tokens,
        )


def step_memory(dims: ModelDims, recipe: Recipe, plan: Plan, shape: MicroBatchShape) -> StepMemory:
    kernels = _Kernels.of(dims, recipe, plan.device, shape)
    kept, small = _kept_values(dims, kernels)
    layer = kept * kernels.item + 7 * recipe.rank * kernels.low
    attention = 18 * dims.delta.computed(shape.positions) * 4 / kernels.tokens if dims.delta else 0.0
    if dims.capped:  # else scores are not written out
        attention = 3 * dims.heads * shape.width * kernels.padding * 4
        layer += attention
    elif kernels.copied:  # float32 copies in `CpuAttention`
        attention = max(attention, 16 * (dims.queries + dims.keys) * kernels.padding)
    working = max(dims.widest * 4 * 4, attention)
    gaps, saved = dims.layers, dims.layers * layer
    if plan.gradient_checkpointing:
        saved, working = dims.layers * dims.hidden * kernels.item, layer + working
        gaps = min(TRIM_EVERY + 1, gaps)
    if dims.layer_inputs:  # with checkpointing their projection has a backward pass too
        saved += dims.layers * dims.layer_inputs.width * kernels.item * (4 if plan.gradient_checkpointing else 1)
    if plan.device == "cpu":
        saved += _GAPS["widened" if kernels.widened else recipe.precision] * gaps * small * kernels.item
    saved, working = saved * kernels.tokens + _mask_bytes(dims, kernels, shape.width), working * kernels.tokens
    if kernels.packed and not plan.gradient_checkpointing:
        working += _deterministic_sums(dims, kernels.tokens, shape.rows)
    return StepMemory(saved, working, _loss_bytes(dims, recipe, plan.loss_chunk, kernels.labels))


def _kept_values(dims: ModelDims, kernels: _Kernels) -> tuple[float, float]:
    """Values that a layer keeps of each token for its backward pass; and those of them that lie in small blocks."""
    padding = kernels.padding
    kept: float = dims.hidden * (6 if dims.gemma else 4)  # before and after norms
    kept += dims.layer_inputs.kept(dims.hidden) if dims.layer_inputs else 0
    attention: float = (dims.queries + dims.keys) * dims.normed
    keys = dims.queries if kernels.repeated else dims.keys
    attention += (dims.queries + 2 * keys) * padding  # its inputs
    attention += dims.queries * (padding + (padding > 1))  # its output, with and without the padding
    nets, widest = 0.0, 0
    if (delta := dims.delta) is not None:
        share, widest = delta.layers / dims.layers, max(delta.keys, delta.values)
        # the gate, its sigmoid and the product
        nets, attention = share * delta.kept(padding), (1 - share) * (attention + 3 * dims.queries)
    if dims.convolved:  # what is projected in three, the convolved and the product
        share = dims.convolved / dims.layers
        attention = share * 5 * dims.hidden + (1 - share) * attention
    kept += attention
    inner = dims.inner * (3 if kernels.general else 2)
    block = 2 * KEPT_BLOCKS / (kernels.tokens * kernels.item)
    small = kept * (dims.hidden < block) + nets * (widest < block) + inner * (dims.inner < block)
    kept += nets + inner
    return (kept * 1.5 if kernels.general else kept) + _adapters_values(dims, kernels), small


def _adapters_values(dims: ModelDims, kernels: _Kernels) -> float:
    """Those of them that adapters keep beside what they read, but for `x @ A.T`."""
    kept, outputs = 0.0, dims.queries + 2 * dims.keys + 2 * dims.hidden
    if kernels.outputs and not kernels.general:  # those of gate and up are kept anyway
        kept += outputs
    elif kernels.outputs:  # PEFT: 4 bytes, and from bf16 two copies more
        kept += (outputs + 2 * dims.inner) * (1 if kernels.item == 4 else 6)
    if kernels.dropped and not kernels.general:  # the masks, a byte a value
        kept += (2 * dims.hidden + dims.queries + dims.inner) / kernels.item
    elif kernels.dropped:  # what is left of each layer's input, and the factors, in float32
        kept += (5 * dims.hidden + dims.queries + dims.inner) * 8 / kernels.item
    return kept


def _mask_bytes(dims: ModelDims, kernels: _Kernels, width: int) -> int:
    """The layers share a mask for each window; a backward pass of `CpuAttention` has a float32 copy."""
    windows = {w for w in dims.windows if w is not None and w < width} if not kernels.packed else set()
    return width**2 * (kernels.item * (len(windows) + dims.capped) + 4 * (kernels.copied and bool(windows)))


def _deterministic_sums(dims: ModelDims, tokens: int, rows: int) -> int:
    """FlashAttention's deterministic backward pass: a partial sum for each share of the GPU's processors."""
    shares = math.ceil(_PROCESSORS / (rows * dims.heads))
    return shares * (tokens + 128 * rows) * dims.queries * 4


def _loss_bytes(dims: ModelDims, recipe: Recipe, chunk: int, labels: int) -> float:
    if dims.plain:  # logits, their softmax and their gradient
        return 3 * labels * dims.vocabulary * 4
    logits = min(chunk, labels) * dims.vocabulary * 4
    loss = logits * (1 if recipe.precision == "fp32" else 1.5) * (2 if dims.final_cap else 1)  # bf16 products beside it
    if recipe.method == "full":  # the head's gradient, and a chunk's share of it
        loss += 2 * 4 * dims.vocabulary * dims.hidden
    return loss
