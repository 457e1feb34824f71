"""The MLX backend: mlx-lm's model and LoRA layers behind `common.seam.Backend`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.blas import preload

preload()  # before mlx is imported, or never

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

from common.config import Plan, Recipe  # noqa: E402
from common.families import text_name  # noqa: E402
from common.memory import swap_used, total  # noqa: E402
from common.seam import (  # noqa: E402
    Adapter,
    Batch,
    LoraWeight,
    Memory,
    ModelInfo,
    OptimizerState,
    OutOfMemory,
    StepResult,
)
from mlx_backend.base import head, hidden_states, load_base  # noqa: E402
from mlx_backend.loss import loss_sum  # noqa: E402
from mlx_backend.weights import PARTS, to_mlx, to_numpy  # noqa: E402

_DTYPES = {"bf16": mx.bfloat16, "fp32": mx.float32}


class MlxBackend:
    """See `common.seam.Backend` for the contract of every method."""

    def load(self, recipe: Recipe, plan: Plan, folder: Path, targets: Sequence[str]) -> ModelInfo:
        from mlx_lm.tuner.lora import LoRALinear

        self.recipe = recipe
        self.previous_device = mx.default_device()
        mx.set_default_device(mx.gpu if plan.device == "gpu" else mx.cpu)
        if plan.device == "cpu":
            mx.disable_compile()  # on a CPU it calls a C++ compiler for every new shape
        mx.reset_peak_memory()
        self.model: Any = load_base(folder, _DTYPES[recipe.precision])
        self.model.freeze()
        modules = dict(self.model.named_modules())
        self.layers = {
            name: LoRALinear.from_base(
                modules[text_name(name)], r=recipe.rank, dropout=recipe.dropout, scale=recipe.alpha / recipe.rank
            )
            for name in sorted(targets)
        }
        self.model.update_modules(tree_unflatten([(text_name(name), layer) for name, layer in self.layers.items()]))
        with _memory_errors():
            mx.eval(self.model.parameters())
        self.optimizer = optim.AdamW(
            recipe.learning_rate,
            betas=[recipe.beta1, recipe.beta2],
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            bias_correction=True,  # off by default, unlike every other AdamW
        )
        self.optimizer.init(self.model.trainable_parameters())
        self.gradient = nn.value_and_grad(self.model, lambda batch: loss_sum(self.model, batch))
        return ModelInfo(
            device=plan.device,
            dtype=recipe.precision,
            layers=len(self.model.layers),
            trainable=sum(p.size for _, p in tree_flatten(self.model.trainable_parameters())),
            total=sum(p.size for _, p in tree_flatten(self.model.parameters())),
            architecture=type(self.model).__module__.rsplit(".", 1)[-1],
        )

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        self.model.train()
        if self.recipe.dropout:
            mx.random.seed((self.recipe.seed << 32) + step)
        count = sum(batch.label_tokens for batch in micro_batches)
        total_loss, gradients = mx.array(0.0), None
        with _memory_errors():
            for batch in micro_batches:
                loss, part = self.gradient(batch)
                part = tree_map(lambda g: g / count, part)
                gradients = part if gradients is None else tree_map(mx.add, gradients, part)
                total_loss = total_loss + loss
                mx.eval(total_loss, gradients)  # frees this micro-batch's activations
        norm = mx.sqrt(sum((mx.square(g).sum() for _, g in tree_flatten(gradients)), mx.array(0.0)))
        if self.recipe.max_grad_norm:
            factor = mx.minimum(1.0, self.recipe.max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
            gradients = tree_map(lambda g: g * factor, gradients)
        self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state, norm)
        return StepResult(total_loss, norm, count, sum(batch.tokens for batch in micro_batches))

    def eval_step(self, batch: Batch) -> StepResult:
        self.model.eval()
        with _memory_errors():
            loss = loss_sum(self.model, batch)
            mx.eval(loss)  # here, where running out of memory is still known for what it is
        return StepResult(loss, 0.0, batch.label_tokens, batch.tokens)

    def get_adapter(self) -> Adapter:
        recipe = self.recipe
        weights = {
            name: LoraWeight(to_numpy(layer.lora_a), to_numpy(layer.lora_b), recipe.alpha)
            for name, layer in self.layers.items()
        }
        return Adapter(recipe.model, recipe.rank, recipe.alpha, recipe.dropout, weights)

    def set_adapter(self, adapter: Adapter) -> None:
        for name, weight in adapter.weights.items():
            self.layers[name].lora_a = to_mlx(weight.A)
            self.layers[name].lora_b = to_mlx(weight.B)
        mx.eval(self.model.trainable_parameters())

    def get_optimizer(self) -> OptimizerState:
        state = dict(tree_flatten(self.optimizer.state))
        moments = {
            moment: {
                f"{name}.{part}": to_numpy(state[f"{text_name(name)}.{mlx_part}.{moment}"])
                for name in self.layers
                for part, mlx_part in PARTS.items()
            }
            for moment in ("m", "v")
        }
        return OptimizerState(int(state["step"].item()), moments["m"], moments["v"])

    def set_optimizer(self, state: OptimizerState) -> None:
        flat: list[tuple[str, mx.array]] = []
        for name in self.layers:
            for part, mlx_part in PARTS.items():
                flat.append((f"{text_name(name)}.{mlx_part}.m", to_mlx(state.exp_avg[f"{name}.{part}"])))
                flat.append((f"{text_name(name)}.{mlx_part}.v", to_mlx(state.exp_avg_sq[f"{name}.{part}"])))
        tree: dict[str, Any] = tree_unflatten(flat)
        tree["step"] = mx.array(state.step, mx.uint64)
        tree["learning_rate"] = mx.array(self.recipe.learning_rate)
        self.optimizer.state = tree

    def logits(self, token_ids: np.ndarray, adapter: bool = True) -> np.ndarray:
        self.model.eval()
        inputs = mx.array(np.asarray(token_ids, np.int32))[None]
        scales = {name: layer.scale for name, layer in self.layers.items()}
        if not adapter:
            for layer in self.layers.values():
                layer.scale = 0.0
        try:
            return np.array(head(self.model, hidden_states(self.model, inputs))[0])
        finally:
            for name, layer in self.layers.items():
                layer.scale = scales[name]

    def memory(self) -> Memory:
        return Memory(mx.get_active_memory(), mx.get_peak_memory(), total(), "unified", swap_used())

    def close(self) -> None:
        del self.model, self.layers, self.optimizer, self.gradient
        mx.clear_cache()
        mx.enable_compile()
        mx.set_default_device(self.previous_device)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """OutOfMemory for what MLX raises, a RuntimeError that only its text tells from others."""
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error).lower() and "malloc" not in str(error).lower():
            raise
        mx.clear_cache()
        raise OutOfMemory(str(error).split("\n")[0]) from None
