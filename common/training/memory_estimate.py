"""How much memory a plan will take, part by part, from the model's config and the recipe: nothing is loaded.

Each backend's `memory_terms.py` counts what its own code holds; here the terms are added up.
"""

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from statistics import mean
from typing import Any

from common.backend import Adapter
from common.backend_package import BackendPackage
from common.data import layouts
from common.data.layouts import choose_layouts, layout_for
from common.memory_terms import DeltaDims, LayerInputs, MicroBatchShape, ModelDims
from common.models import gemma4, lfm2
from common.models.experts import target_of
from common.models.families import LANGUAGE_LAYER, forward_config, hf_name, is_known
from common.models.lora_init import layer_number
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder
from common.models.shapes import NORMED, adaptable_shapes, linear_shapes, tensor_shapes
from common.option_fields import EXPERTS
from common.recipe import Plan, Recipe
from common.system.environment import chip, environment
from common.system.hardware import nvidia_gpus
from common.training.learned_memory import LearnedMemory, Observation, learned

# What one micro-batch adds. An update is none of it: smaller micro-batches do not make it smaller.
_OF_STEP = ("saved activations", "working memory", "loss chunk", "validation")
_LEARNED = "learned"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, of the moment when most is needed. What earlier runs have taught is a part, often negative."""

    parts: dict[str, int]
    measured: bool  # False: on a kind of device whose coefficients nobody has measured

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def step(self) -> int:
        """What the largest micro-batch adds, as counted: without what was learned."""
        return sum(self.parts.get(name, 0) for name in _OF_STEP)

    @property
    def fixed(self) -> int:
        """The rest, as counted."""
        return self.peak - self.step - self.parts.get(_LEARNED, 0)


def model_dims(config: dict[str, Any]) -> ModelDims:
    """Of a normalized text config; its `dtype` is the type that the checkpoint stores."""
    shapes = tensor_shapes(config)
    linear = sum(math.prod(shape) for shape in adaptable_shapes(config, ["all-linear"]).values())
    own = (config["head_dim"], config["num_key_value_heads"])
    heads, inner = [own], [config["intermediate_size"]]
    if config["model_type"] in gemma4.KINDS:
        layers = range(config["num_hidden_layers"])
        heads, inner = [gemma4.heads(config, i) for i in layers], [gemma4.inner(config, i) for i in layers]
    if config["model_type"] == lfm2.KIND:
        inner = [lfm2.inner(config)]
    return ModelDims(
        hidden=config["hidden_size"],
        inner=round(mean(inner)),
        widest=max(inner),
        queries=round(config["num_attention_heads"] * mean(width for width, _ in heads)),
        keys=round(mean(width * count for width, count in heads)),
        heads=config["num_attention_heads"],
        head_dim=max(width for width, _ in heads),
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        linear=linear,
        other=sum(math.prod(s) for s in shapes.values()) - linear,
        gemma=config["model_type"].startswith("gemma"),
        capped=config["model_type"] == "gemma2",
        final_cap=forward_config(config).logit_softcap is not None,
        normed=config["model_type"] in NORMED,
        windows=forward_config(config).windows,
        splits=forward_config(config).rope_split is not None,
        stored=2 if config.get("dtype") in ("bfloat16", "float16") else 4,
        delta=_delta_dims(config),
        layer_inputs=_layer_inputs(config),
        convolved=(config.get("layer_types") or []).count(lfm2.CONVOLUTION),
        shardable=config["model_type"] not in gemma4.KINDS,
    )


def _layer_inputs(config: dict[str, Any]) -> LayerInputs | None:
    if not (width := config.get("hidden_size_per_layer_input")):
        return None
    return LayerInputs(config["vocab_size_per_layer_input"] * config["num_hidden_layers"] * width, width)


def _delta_dims(config: dict[str, Any]) -> DeltaDims | None:
    layers = (config.get("layer_types") or []).count("linear_attention")
    if not layers:
        return None
    head_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    keys, values = config["linear_num_key_heads"] * head_dim, config["linear_num_value_heads"] * value_dim
    return DeltaDims(layers, keys, values, head_dim, value_dim)


def dims_of(model: ModelFolder) -> ModelDims:
    """`model_dims` of a model. Of an unknown architecture by what its files hold, on the large side."""
    config = model.config | {"dtype": model.dtype}
    if is_known(config):
        return replace(model_dims(config), quantized=quantized_source(model.path) is not None)
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    layers, adapted = int(config["num_hidden_layers"]), linear_shapes(model, ["all-linear"])
    outputs = _expert_outputs(model)
    for module, (out_features, _) in adapted.items():
        outputs[layer_number(module)] += out_features
    linear = sum(out_features * in_features for out_features, in_features in adapted.values())
    heads = int(config.get("num_attention_heads") or 1)
    hidden = int(config["hidden_size"])
    return ModelDims(
        hidden=hidden,
        inner=max(outputs.values()),
        widest=max(outputs.values()),
        queries=hidden,
        keys=hidden,
        heads=heads,
        head_dim=hidden // heads,
        layers=layers,
        vocabulary=int(config["vocab_size"]),
        linear=linear,
        other=sum(map(math.prod, shapes.values())) - linear,
        gemma=True,
        capped=False,
        final_cap=True,
        normed=True,
        windows=(),
        splits=False,
        stored=2 if config["dtype"] in ("bfloat16", "float16") else 4,
        plain=True,
    )


def _expert_outputs(model: ModelFolder) -> Counter[int]:
    """Of each layer, what those experts put out that a token comes to; of experts that the files hold by themselves."""
    chosen = int(model.config.get("num_experts_per_tok") or 1)
    shapes = {hf_name(name.removesuffix(".weight")): tensor.shape for name, tensor in model.tensors.items()}
    outputs: Counter[int] = Counter()
    for module, shape in shapes.items():
        if target_of(module) == EXPERTS and ".experts.0." in module and LANGUAGE_LAYER.fullmatch(module):
            outputs[layer_number(module)] += chosen * shape[0]
    return outputs


def training_state_bytes(adapter: Adapter | None, dims: ModelDims) -> tuple[int, int]:
    """`(weights beside the base, gradients and AdamW's two moments)`; all float32. adapter None: full fine-tuning."""
    if adapter is None:
        return 0, 12 * (dims.linear + dims.other)
    count = sum(array.size for weight in adapter.weights.values() for array in weight.parts().values())
    return 4 * count, 12 * count


@dataclass(frozen=True)
class TrainingMemory:
    """What a training takes of memory on a backend, whatever its plan."""

    package: BackendPackage
    dims: ModelDims
    recipe: Recipe
    adapter: Adapter | None  # None: full fine-tuning
    workers: int = 0  # that help this computer
    learned: LearnedMemory = field(default_factory=LearnedMemory)
    layouts: tuple[MicroBatchShape, ...] = ()  # that the training computes which is observed

    def with_learned(self, plan: Plan) -> "TrainingMemory":
        """The same, corrected by what was observed on the plan's device of trainings of this kind."""
        packages, recipe = environment()["packages"], self.recipe
        try:
            of = (self.package.memory_terms, sys.modules[__name__], layouts)
            sources = "".join(map(inspect.getsource, of))  # type: ignore[arg-type]
        except OSError:  # an installation without sources: nobody knows which version of the estimate it is
            return self
        device = f"{plan.device} of {self._processor(plan)}"
        how = f"{recipe.precision} {recipe.quantization} {recipe.method}{' with dropout' * bool(recipe.dropout)}"
        kind = f"{plan.backend} {packages[plan.backend]}, {device}, {how}"
        return replace(self, learned=learned(kind, sha256(sources.encode()).hexdigest()[:12], recipe.model_hash))

    def _processor(self, plan: Plan) -> str:
        """The name of the GPU that computes where it is NVIDIA's, else of the machine's processor."""
        names = {gpu.name for gpu in nvidia_gpus()} if plan.device != "cpu" else set()
        if len(names) < 2:
            return names.pop() if names else chip()
        why = self.package.choose_precision("auto", plan.device_name).why  # it begins with the name of that GPU
        return max((name for name in names if why.startswith(name)), key=len, default=why)

    def joins_layouts(self, plan: Plan) -> bool:
        """Whether micro-batches are computed in a few layouts that are chosen beforehand: by MLX on a GPU."""
        return plan.device == "gpu" and not (self.dims.splits or self.dims.plain or self.workers)

    def expecting(self, plan: Plan, shapes: Callable[[], Counter[MicroBatchShape]]) -> "TrainingMemory":
        """The same for a training that was told to expect these shapes, which will be observed."""
        return replace(self, layouts=tuple(choose_layouts(shapes())) if self.joins_layouts(plan) else ())

    def observed(
        self, plan: Plan, shapes: Iterable[MicroBatchShape], validation: MicroBatchShape | None, peak: int
    ) -> Observation:
        """What the measured peak of these micro-batches, in bytes above 0, says of their estimate."""
        if self.layouts:
            shapes = {layout_for(shape, self.layouts) for shape in shapes}
        counted = self._estimate(plan, shapes, (self.layouts or (validation,)) if validation else ())
        return self.learned.observation(plan.gradient_checkpointing, counted.fixed, counted.step, peak)

    def corrected(self, seen: Observation) -> "TrainingMemory":
        """The same, having learned from one more observation."""
        return replace(self, learned=self.learned.with_observation(seen))

    def estimate(
        self, plan: Plan, shapes: Iterable[MicroBatchShape], validation: MicroBatchShape | None = None
    ) -> MemoryEstimate:
        """The peak over micro-batches of `shapes` in training, and of `validation`, which has no backward pass.

        shapes: where they are computed in a few layouts, a counter of them. validation: then of any row alone.
        """
        held_out = [validation] if validation else []
        if not self.joins_layouts(plan):
            return self._estimate(plan, shapes, held_out)
        counts = Counter(shapes)
        layouts = choose_layouts(counts + Counter(held_out))
        return self._estimate(plan, {layout_for(shape, layouts) for shape in counts}, layouts if held_out else [])

    def _estimate(
        self, plan: Plan, shapes: Iterable[MicroBatchShape], validation: Sequence[MicroBatchShape]
    ) -> MemoryEstimate:
        """The same of shapes as they are computed."""
        terms, dims, recipe = self.package.memory_terms, self.dims, self.recipe
        beside, moments = training_state_bytes(self.adapter, dims)
        weights = terms.held_bytes(dims, recipe, plan.device)
        sharded = terms.sharded_bytes(dims, recipe, plan) if plan.sharded else None
        if sharded:
            weights, moments = sharded.weights, moments if self.adapter else sharded.state
        parts: dict[str, int] = {
            "weights": weights,
            "adapter": round(beside * terms.adapter_copies(recipe, plan.device)),
            "gradients and moments": moments,
        }
        if self.adapter is None and validation and plan.device == "cpu":
            parts["best weights"] = 4 * (dims.linear + dims.other)  # of the validations so far
        shapes = [*shapes]
        steps = [self._step(plan, shape, dims) for shape in shapes]
        steps += [self._validation(plan, shape) for shape in validation]
        if sharded:
            steps.append({"gathering of shards": sharded.gathering})
        if copies := terms.update_copies(recipe, plan.device):
            trained = beside if self.adapter else 4 * (dims.linear + dims.other)
            steps.append({"optimizer update": round(copies * trained)})
        if self.workers:
            during, after = (self.workers * copies * beside for copies in terms.message_copies(plan.device))
            parts["messages to workers"] = during
            steps.append({"gradients of workers": after})
        largest: dict[str, int] = max(steps, key=lambda step: sum(step.values()))
        parts |= largest
        loading = terms.loading_bytes(dims, recipe)
        if loading > sum(parts.values()):
            parts = {"weights": parts["weights"], "while loading": loading - parts["weights"]}
        tokens = [shape.tokens for shape in (*shapes, *validation)]
        measured = terms.measured(plan.device, recipe.precision, tokens)
        parts["slack"] = measured.overhead + round(measured.slack * sum(parts.values()))
        counted = MemoryEstimate(parts, measured.known)
        if plan.sharded:  # of which nothing was learned
            return counted
        correction = self.learned.correction(plan.gradient_checkpointing, counted.fixed, counted.step)
        return MemoryEstimate(parts | {_LEARNED: correction}, measured.known) if correction else counted

    def _validation(self, plan: Plan, shape: MicroBatchShape) -> dict[str, int]:
        """What a micro-batch adds without a backward pass: one layer's share, since each is freed in its turn."""
        plain = plan.model_copy(update={"gradient_checkpointing": False})
        return {"validation": sum(self._step(plain, shape, replace(self.dims, layers=1)).values())}

    def _step(self, plan: Plan, shape: MicroBatchShape, dims: ModelDims) -> dict[str, int]:
        """What one micro-batch adds at its peak: in a layer's backward pass, or in the loss."""
        step = self.package.memory_terms.step_memory(dims, self.recipe, plan, shape)
        if step.working > step.loss:
            return {"saved activations": round(step.saved), "working memory": round(step.working)}
        return {"saved activations": round(step.saved), "loss chunk": round(step.loss)}
