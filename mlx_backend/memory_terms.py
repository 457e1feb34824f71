"""The terms of MLX's memory estimate: see `common.memory_terms.MemoryTerms`. Imports no MLX.

They are counted from MLX's graph: what the vjp of each operation in `attention.py`, `mlp.py` and `loss.py` reads. A
change there changes a term here; `python -m benchmarks.memory` compares the estimate with measured peaks.
"""

from collections.abc import Collection

from common.data.layouts import smallest_layout
from common.memory_terms import MeasuredTerms, MicroBatchShape, ModelDims, ShardedBytes, StepMemory
from common.recipe import Plan, Recipe

_MEASURED = {"cpu": MeasuredTerms(0, 0.0, True), "gpu": MeasuredTerms(100 * 10**6, 0.1, False)}


def loss_chunk(vocabulary: int, device: str) -> int:
    """As many labels as have logits of 32 MB, on a GPU 64; MLX queues ahead and holds several chunks."""
    budget = 2**20 * (64 if device == "gpu" else 32)
    return min(1024, max(32, budget // (4 * vocabulary) // 32 * 32))


def weight_bytes(dims: ModelDims, recipe: Recipe) -> int:
    item = 2 if recipe.precision == "bf16" else 4
    other = dims.other - dims.table  # that is in the stored type
    table = dims.table * (item if recipe.method == "full" else min(item, dims.stored))
    if not recipe.quantization.startswith("mlx-"):
        return (dims.linear + other) * item + table
    _, bits, group, *mixed = recipe.quantization.split("-")
    each = 8 if mixed else int(bits.removesuffix("bit"))  # at most
    quantized = each / 8 + 2 * item / int(group)  # a scale and a bias for each group
    return table + round(dims.linear * quantized + other * (quantized if dims.quantized else item))


def held_bytes(dims: ModelDims, recipe: Recipe, device: str) -> int:
    return weight_bytes(dims, recipe)


def unshardable(dims: ModelDims, recipe: Recipe) -> str:
    return "MLX holds the complete model on each device"


def sharded_bytes(dims: ModelDims, recipe: Recipe, plan: Plan) -> ShardedBytes:
    raise AssertionError(unshardable(dims, recipe))


def adapter_copies(recipe: Recipe, device: str) -> float:
    """On a GPU the adapter and its moments before the last step are kept: see confirmation.py.

    The model computes with a copy in its own precision.
    """
    computed = 0.5 if recipe.precision == "bf16" and recipe.method != "full" else 0.0
    return (4 if device == "gpu" else 1) + computed


def message_copies(device: str) -> tuple[int, int]:
    """They are numpy's: MLX's peak does not include them, though on a Mac they take of the same memory."""
    return 0, 0


def update_copies(recipe: Recipe, device: str) -> float:
    """Weights and moments before a step are kept until it is written; of an adapter's, on a GPU `adapter_copies` knows.

    Gradients are freed as they are used: of every weight 2.3 copies were measured on a CPU with SmolLM2-135M, and 2.9
    with Gemma-3-270M. This is between them.
    """
    if recipe.method == "full":
        return 2.6
    return 0.0 if device == "gpu" else 3.0


def loading_bytes(dims: ModelDims, recipe: Recipe) -> int:
    """Embeddings or a head as stored, in two bytes, beside what they become; a head is loaded after all the rest."""
    if recipe.precision == "bf16" or dims.quantized:
        return 0
    stored = 2 * dims.vocabulary * dims.hidden
    if dims.stored == 2 and (dims.untied or recipe.quantization != "none"):  # layers are quantized before the rest
        return weight_bytes(dims, recipe) + stored
    return 3 * stored


def measured(device: str, precision: str, tokens: Collection[int]) -> MeasuredTerms:
    return _MEASURED[device]


def step_memory(dims: ModelDims, recipe: Recipe, plan: Plan, shape: MicroBatchShape) -> StepMemory:
    item = 4 if recipe.precision == "fp32" else 2
    shape = smallest_layout(shape) if plan.device == "gpu" else shape
    padding = shape.rows * shape.width / shape.tokens
    kept = _kept_values(dims, padding)
    if recipe.method == "dora":  # the layers' outputs; those of gate and up are kept anyway
        kept += dims.queries + 2 * dims.keys + 2 * dims.hidden
    layer = kept * item + 7 * recipe.rank * (4 if recipe.method == "full" else item)
    scores = dims.heads * shape.width * padding * 4  # a row of attention scores for each token, written out
    layer, attention = (layer + 3 * scores, 3 * scores) if dims.capped else (layer + scores, 4 * scores)
    if dims.delta is not None:  # few layers have scores
        layer -= scores * dims.delta.layers / dims.layers
        net = 40 * dims.delta.computed(shape.positions) / shape.tokens + dims.delta.kept(padding)
        attention = max(attention, 4 * net)
    layer -= scores * dims.convolved / dims.layers
    # float32 whatever the weights are in; MLX queues operations ahead and holds their inputs
    working = max(dims.widest * 14 * 4, attention)
    saved: float
    if plan.gradient_checkpointing:
        # of a gated delta net what is kept and its gradients are held together
        saved, working = dims.layers * dims.hidden * item, (1 if dims.delta is None else 2) * layer + working
    else:
        saved = dims.layers * layer
    if dims.layer_inputs:
        saved += dims.layers * dims.layer_inputs.width * item * 3
    windows = {w for w in dims.windows if w is not None and w < shape.width}
    masks = shape.width**2 * (len(windows) + dims.capped)  # booleans, shared by the layers
    # of a chunk and of the next, which is queued
    logits = (shape.width if dims.plain else min(2 * plan.loss_chunk, shape.labels)) * dims.vocabulary * 4
    loss = logits * 3.2 * (2 if dims.final_cap else 1)
    if recipe.method == "full":  # the head's gradient, and a chunk's share of it
        loss += 2 * 4 * dims.vocabulary * dims.hidden
    return StepMemory(saved * shape.tokens + masks, working * shape.tokens, loss)


def _kept_values(dims: ModelDims, padding: float) -> float:
    """Values that a layer keeps of each token for its backward pass."""
    kept: float = dims.hidden * (6 if dims.gemma else 4)  # before and after norms
    kept += dims.layer_inputs.kept(dims.hidden) if dims.layer_inputs else 0
    attention: float = (dims.queries + dims.keys) * dims.normed
    attention += (dims.queries + 2 * dims.keys) * padding  # its inputs
    attention += dims.queries  # its output
    if dims.delta is not None:
        attention += 3 * dims.queries  # the gate, its sigmoid and the product
        share = dims.delta.layers / dims.layers
        attention = share * dims.delta.kept(padding) + (1 - share) * attention
    if dims.convolved:  # what is projected in three, the convolved and the product
        share = dims.convolved / dims.layers
        attention = share * 5 * dims.hidden + (1 - share) * attention
    return kept + attention + dims.inner * 3
