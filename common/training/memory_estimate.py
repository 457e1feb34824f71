"""How much memory a plan will take, part by part, from the model's config and the recipe: nothing is loaded.

The terms are counted from what each backend keeps for the backward pass (`torch_backend/autograd.py`, MLX's graph); the
few numbers that cannot be counted stand in `_MEASURED` and `_GAPS`. `python -m benchmarks.memory` holds the sum against
measured peaks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.backend import Adapter, Batch
from common.data.batching import LABEL_STEPS, TOKEN_STEPS, rounded
from common.models.families import end_to_end, forward_config
from common.models.shapes import tensor_shapes
from common.recipe import Plan, Recipe
from common.system.memory import GAPS_EVERY, KEPT_BLOCKS


def loss_chunk(config: dict[str, Any], plan: Plan) -> int:
    """Label positions whose logits take about 32 MB, on GPUs more; so few that products are slow there are never.

    Half as many as 64 made a step of Gemma-3-270M a quarter longer on torch; on an H200, 128 in place of 256 the loss
    half as long again. MLX queues ahead and holds several chunks.
    """
    room = 2**20 * (256 if plan.device == "cuda" else 64 if plan.device in ("gpu", "mps") else 32)
    return min(1024, max(64 if plan.backend == "torch" else 32, room // (4 * config["vocab_size"]) // 32 * 32))


MEGA = 10**6
_COMPILED = 30 * MEGA  # oneDNN's bf16 products, where shapes vary
_PROCESSORS = 132  # of the GPU measured on
_GAPS = {"fp32": 0.25, "bf16": 0.55}  # of what lies in blocks of less than twice KEPT_BLOCKS; with glibc 2.36


@dataclass(frozen=True)
class MicroBatchShape:
    """What memory depends on of a micro-batch."""

    rows: int
    width: int  # the longest row's tokens
    tokens: int  # real ones
    labels: int

    @staticmethod
    def of(batch: Batch) -> "MicroBatchShape":
        return MicroBatchShape(len(batch.lengths), batch.input_ids.shape[1], batch.tokens, batch.label_tokens)


@dataclass(frozen=True)
class MeasuredTerms:
    """What cannot be counted. `overhead`: libraries' own buffers; `slack`: what the allocator holds beyond its use."""

    overhead: int
    slack: float
    known: bool  # on this kind of device


_MEASURED = {
    ("torch", "cpu"): MeasuredTerms(40 * MEGA, 0.0, True),
    ("mlx", "cpu"): MeasuredTerms(0, 0.0, True),
    ("torch", "cuda"): MeasuredTerms(180 * MEGA, 0.0, True),  # an H200: cuBLAS's memory, of graphs and without
    ("torch", "mps"): MeasuredTerms(500 * MEGA, 0.1, False),
    ("mlx", "gpu"): MeasuredTerms(100 * MEGA, 0.1, False),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, of the moment when most is needed."""

    parts: dict[str, int]
    measured: bool  # False: on a kind of device whose coefficients nobody has measured

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class ModelDims:
    """Of a model, from its normalized text config."""

    hidden: int
    inner: int
    queries: int  # width of all heads
    keys: int  # width of all key heads
    heads: int
    layers: int
    vocabulary: int
    linear: int  # weights in layers that are quantized and adapted
    other: int  # embeddings, norms, an untied head
    gemma: bool
    capped: bool  # attention scores
    final_cap: bool  # logits
    flash: bool  # on an NVIDIA GPU, in bf16
    normed: bool  # queries and keys
    windows: tuple[int | None, ...]
    stored: int  # bytes of a weight in the checkpoint

    @staticmethod
    def of(config: dict[str, Any]) -> "ModelDims":
        shapes = tensor_shapes(config)
        linear = sum(math.prod(s) for name, s in shapes.items() if name.endswith("_proj.weight"))
        return ModelDims(
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            queries=config["num_attention_heads"] * config["head_dim"],
            keys=config["num_key_value_heads"] * config["head_dim"],
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            linear=linear,
            other=sum(math.prod(s) for s in shapes.values()) - linear,
            gemma=config["model_type"].startswith("gemma"),
            capped=config["model_type"] == "gemma2",
            flash=end_to_end(config, "cuda", "bf16"),
            final_cap=forward_config(config).logit_softcap is not None,
            normed=config["model_type"] in ("gemma3_text", "qwen3"),
            windows=forward_config(config).windows,
            stored=2 if config.get("dtype") in ("bfloat16", "float16") else 4,
        )


def weight_bytes(sizes: ModelDims, recipe: Recipe, as_stored: bool = False) -> int:
    """Of the base as it is held. as_stored: what a frozen one does on torch's CPU, where products widen it."""
    plain = 2 if recipe.precision == "bf16" else 4
    scheme = recipe.quantization
    if scheme.startswith("mlx-"):
        _, bits, group = scheme.split("-")
        each = int(bits.removesuffix("bit")) / 8 + 2 * plain / int(group)  # a scale and a bias a group
        return round((sizes.linear + sizes.other) * each)  # MLX quantizes embeddings too
    if scheme == "nf4":
        return round(sizes.linear * (0.5 + 4 / 64) + sizes.other * (min(plain, sizes.stored) if as_stored else plain))
    if scheme == "int8":
        return sizes.linear + sizes.other * plain
    return (sizes.linear + sizes.other) * (min(plain, sizes.stored) if as_stored else plain)


def trained_bytes(adapter: Adapter | None, sizes: ModelDims) -> tuple[int, int]:
    """`(weights beside the base, gradients and AdamW's two moments)`; all float32."""
    if adapter is None:
        return 0, 12 * (sizes.linear + sizes.other)
    count = sum(array.size for weight in adapter.weights.values() for array in weight.parts().values())
    return 4 * count, 12 * count


def predict(
    config: dict[str, Any], recipe: Recipe, plan: Plan, adapter: Adapter | None, shapes: Sequence[MicroBatchShape]
) -> MemoryEstimate:
    """The peak over micro-batches of `shapes`. `config`: the normalized text config; `adapter` None: all is trained."""
    sizes = ModelDims.of(config)
    known = _MEASURED[plan.backend, plan.device]
    beside, moments = trained_bytes(adapter, sizes)
    if plan.backend == "torch" and plan.device == "cpu":
        beside *= 2  # what training starts from is held beside what it makes of it
    as_stored = (plan.backend, plan.device) == ("torch", "cpu") and adapter is not None and not adapter.dora
    parts: dict[str, int] = {
        "weights": weight_bytes(sizes, recipe, as_stored),
        "adapter": beside,
        "gradients and moments": moments,
    }
    dearest = max((activations(sizes, recipe, plan, shape) for shape in shapes), key=lambda parts: sum(parts.values()))
    parts |= dearest
    if plan.backend == "mlx" and (recipe.precision == "fp32" or recipe.quantization != "none"):
        # the embeddings as stored, in two bytes, beside what is made of them
        loading = sizes.vocabulary * sizes.hidden * (2 + (4 if recipe.precision == "fp32" else 2))
        loading += weight_bytes(sizes, recipe) // 20 if recipe.quantization != "none" else 0
        if loading > sum(parts.values()):
            parts = {"weights": parts["weights"], "while loading": loading - parts["weights"]}
    parts["slack"] = known.overhead + round(known.slack * sum(parts.values()))
    if (plan.backend, plan.device, recipe.precision) == ("torch", "cpu", "bf16"):
        parts["slack"] += _COMPILED
    return MemoryEstimate(parts, known.known)


def activations(sizes: ModelDims, recipe: Recipe, plan: Plan, shape: MicroBatchShape) -> dict[str, int]:
    """What one micro-batch adds at its dearest moment: in the loss, or in a layer's backward pass."""
    torch, wide = plan.backend == "torch", recipe.precision == "fp32"
    each = 4 if wide else 2
    cuda = torch and plan.device == "cuda"
    flash = sizes.flash and cuda and not wide
    general = recipe.method != "lora" or recipe.dropout or recipe.quantization == "int8"  # PEFT's, transformers' layers
    tokens, labels = shape.tokens, shape.labels
    if flash and not general:
        tokens, labels = rounded(tokens, *TOKEN_STEPS), rounded(labels, *LABEL_STEPS)
    padding = 1.0 if flash else shape.rows * shape.width / tokens
    kept: float = sizes.hidden * (6 if sizes.gemma else 4)  # before and after norms
    kept += (sizes.queries + sizes.keys) * sizes.normed
    keys = sizes.queries if cuda and not flash else sizes.keys  # repeated for each of their queries
    kept += (sizes.queries + 2 * keys) * padding  # what attention reads
    kept += sizes.queries * (padding + (padding > 1) if torch else 1)  # what it gives, also without the padding
    block = 2 * KEPT_BLOCKS
    small = kept * (sizes.hidden * tokens * each < block)
    inner = sizes.inner * (2 if torch and not general else 3)
    small += inner * (sizes.inner * tokens * each < block)
    kept += inner
    if torch and general:
        kept *= 1.5
    layer: float = kept * each + 28 * recipe.rank
    scores = sizes.heads * shape.width * padding * 4  # a row of attention scores for each token
    windows = {w for w in sizes.windows if w is not None and w < shape.width} if not flash else set()
    masks = shape.width**2 * (each if torch else 1) * (len(windows) + sizes.capped)  # shared by the layers
    attention = 0.0  # torch never writes scores out, if they are not capped
    if sizes.capped:
        layer, attention = layer + 3 * scores, 3 * scores
    elif not torch:
        layer, attention = layer + scores, 4 * scores
    # float32 whatever the weights are in; MLX queues operations ahead and holds what they will need
    saved: float
    working: float = max(sizes.inner * (4 if torch else 14) * 4, attention)
    chunk = min(plan.loss_chunk, labels) * sizes.vocabulary * 4
    loss = chunk * ((1 if wide else 1.5) if torch else 6) * (2 if sizes.final_cap else 1)  # bf16's products beside it
    if recipe.method == "full":  # the head's gradient, and a chunk's share of it
        loss += 2 * 4 * sizes.vocabulary * sizes.hidden
    gaps = sizes.layers
    if plan.gradient_checkpointing:
        saved, working, gaps = sizes.layers * sizes.hidden * each, layer + working, min(GAPS_EVERY + 1, gaps)
    else:
        saved = sizes.layers * layer
    if plan.device == "cpu" and torch:
        saved += _GAPS[recipe.precision] * gaps * small * each  # between blocks that glibc keeps
    saved, once = saved * tokens + masks, working * tokens
    if flash and not plan.gradient_checkpointing:  # its backward pass repeats exactly: a sum a share of the processors
        shares = math.ceil(_PROCESSORS / (shape.rows * sizes.heads))
        once += shares * (tokens + 128 * shape.rows) * sizes.queries * 4
    if once > loss:
        return {"saved activations": round(saved), "working memory": round(once)}
    return {"saved activations": round(saved), "loss chunk": round(loss)}
