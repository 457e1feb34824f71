"""The MLX backend: mlx-lm's model and LoRA layers behind `common.backend.Backend`."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_backend.blas import preload

preload()  # before mlx is imported, or never

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from common.backend import (  # noqa: E402
    Adapter,
    Batch,
    Memory,
    ModelInfo,
    OptimizerState,
    OutOfMemory,
    StepResult,
    weight_sum,
)
from common.data.layouts import choose_layouts  # noqa: E402
from common.memory_terms import MicroBatchShape  # noqa: E402
from common.models.families import is_known  # noqa: E402
from common.models.mlx_quantized import is_quantized  # noqa: E402
from common.models.model_folder import ModelFolder  # noqa: E402
from common.recipe import Plan, Recipe  # noqa: E402
from common.sampling import Sampler, generate_tokens  # noqa: E402
from common.system.memory import swap_used  # noqa: E402
from mlx_backend.checkpointing import checkpoint_layers  # noqa: E402
from mlx_backend.confirmation import Confirmation, device_errors  # noqa: E402
from mlx_backend.device_settings import DeviceSettings  # noqa: E402
from mlx_backend.experts import counted  # noqa: E402
from mlx_backend.forward import Forward, PackedForward, PlainForward  # noqa: E402
from mlx_backend.group import sum_over_ranks  # noqa: E402
from mlx_backend.lora import Dropout, attach, detached, paths, put, stacks  # noqa: E402
from mlx_backend.loss import Inputs  # noqa: E402
from mlx_backend.model import DTYPES, load_base, load_plain  # noqa: E402
from mlx_backend.optimizer import Optimizer, State  # noqa: E402
from mlx_backend.quantize import dequantized, quantize  # noqa: E402
from mlx_backend.trained import Tensors, Trained  # noqa: E402


class MlxBackend:
    """See `common.backend.Backend` for the contract of every method."""

    forward: Forward

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        self.layouts: list[MicroBatchShape] = []
        self.settings = DeviceSettings(plan)
        budget = min(plan.memory_budget, mx.get_memory_limit())
        self.confirmation = Confirmation(plan.device == "gpu", budget, always=adapter is None)
        try:
            return self._load(recipe, plan, ModelFolder(folder), adapter)
        except BaseException:  # nobody closes what was never loaded
            self.settings.restore()
            raise

    def _load(self, recipe: Recipe, plan: Plan, base: ModelFolder, adapter: Adapter | None) -> ModelInfo:
        known, dtype = is_known(base.config), DTYPES[recipe.precision]
        self.model: Any = load_base(base, dtype, recipe.method == "full") if known else load_plain(base, dtype)
        self.forward = PackedForward(self.model, plan.device) if known else PlainForward(self.model, plan.device)
        self.names = base.full_names
        with device_errors():
            if recipe.quantization != "none" and not is_quantized(base):
                quantize(self.model, recipe.quantization)
        self._begin(recipe, plan, adapter)
        return ModelInfo(
            layers=len(self.model.layers),
            trainable=sum(p.size for _, p in tree_flatten(self.model.trainable_parameters())),
            total=sum(p.size for _, p in tree_flatten(self.model.parameters())),
            architecture=type(self.model).__module__.rsplit(".", 1)[-1],
        )

    def exchange(self, recipe: Recipe, plan: Plan, adapter: Adapter) -> None:
        self._end_step()
        put(self.model, {name: layer.linear for name, layer in self.layers.items()})
        self._begin(recipe, plan, adapter)

    def _begin(self, recipe: Recipe, plan: Plan, adapter: Adapter | None) -> None:
        """Have the loaded model train this, from the start."""
        self.recipe, self.start = recipe, adapter
        with device_errors():
            self.layers: dict[str, Any] = {}
            if adapter is not None:
                self.model.freeze()
                self.layers = attach(self.model, adapter)
            self.dropout = Dropout(self.layers.values(), recipe.dropout)
            self.model.eval()  # all modules alike
            self.apply_plan(plan)
            for _, parameter in tree_flatten(self.model.parameters()):
                mx.eval(parameter)  # one by one: what a weight is converted from is freed before the next is read
            self.confirmation.settle([])
        self._join(recipe, adapter)

    def _join(self, recipe: Recipe, adapter: Adapter | None) -> None:
        """Find the trained arrays and join them."""
        weights = [path for path, _ in tree_flatten(self.model.trainable_parameters())]
        names = paths(self.model, adapter) if adapter else {self.names[path]: path for path in weights}
        groups = recipe.optimizer_groups(names)
        members, parts = [members for members, _, _ in groups], stacks(adapter) if adapter else {}
        self.trained = Trained(self.model, names, members, adapter is not None, parts)
        self.trained.computed = DTYPES[recipe.precision] if recipe.method == "lora" else None
        self.optimizer = Optimizer(recipe, [(ratio, decay) for _, ratio, decay in groups], self.trained.group)
        with device_errors():
            self.tensors = self.trained.read()
            self.states = self.optimizer.states(self.tensors)
            self.shown: Tensors = []  # the tensors that the model computes with, outside of a step
            self._show()
            self.confirmation.settle([self.tensors, self.states])
        self.accumulated: list[mx.array] = []  # the loss and the gradients of a step that has begun

    def _show(self) -> None:
        """Have the model compute with the tensors as they are now: a step leaves others in it."""
        if self.shown is not self.tensors:
            self.trained.put(self.tensors)
            self.shown = self.tensors

    def apply_plan(self, plan: Plan) -> None:
        self.plan = plan
        self.confirmation.forget_sizes()
        checkpoint_layers(self.model, plan.gradient_checkpointing)
        self.gradient = mx.compile(mx.value_and_grad(self._training_loss))
        self.loss = mx.compile(self._loss)
        self.update = mx.compile(lambda *given: self.optimizer.update(*given))

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        if self.plan.device == "gpu" and self.model.forward_config.rope_split is None:
            self.layouts = choose_layouts(shapes())

    def _training_loss(self, tensors: Tensors, inputs: Inputs, key: mx.array) -> mx.array:
        self.dropout.begin(key)
        return self._loss(tensors, inputs)

    def _loss(self, tensors: Tensors, inputs: Inputs) -> mx.array:
        self.trained.put(tensors)
        return self.forward.loss(inputs, self.plan.loss_chunk)

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        restore = partial(self._restore_step, self.tensors, self.states)
        with self.confirmation.undoing(restore):
            computed = self._accumulate(micro_batches, weight_sum(micro_batches), step)
            total_loss, norm = self._apply(learning_rate)
            self.confirmation.wait()
            written = [self.tensors, self.states, norm]
            mx.async_eval(written)
            figures = self.confirmation.launched(computed, [total_loss, norm], written, restore)
        return StepResult.of(micro_batches, figures[0], figures[1], sum(shape.positions for shape in computed))

    def _accumulate(self, micro_batches: Sequence[Batch], weight: float, step: int) -> list[MicroBatchShape]:
        """Launch the gradients; the shapes that are computed."""
        self._train(True)
        total_loss, gradients, computed, self.accumulated = mx.array(0.0), None, [], []
        self.shown = []
        for number, batch in enumerate(micro_batches):
            key = mx.random.key(((self.recipe.seed << 32) ^ (batch.rank << 48)) + (step << 12) + number)
            for inputs in self.forward.inputs(batch, self.layouts):
                computed.append(inputs.shape)
                loss, part = self.gradient(self.tensors, inputs, key)
                gradients = part if gradients is None else [*map(mx.add, gradients, part)]
                total_loss = total_loss + loss
                mx.async_eval(total_loss, gradients)  # activations are freed as soon as possible
        self.trained.release()
        self.accumulated = [total_loss, *(gradients or map(mx.zeros_like, self.tensors))]
        self.weight = mx.array(weight)
        return computed

    def _apply(self, learning_rate: float) -> tuple[mx.array, mx.array]:
        (total_loss, *gradients), self.accumulated = self.accumulated, []
        given = self.tensors, self.states, gradients, self.weight, mx.array(learning_rate)
        self.tensors, self.states, norm = self.update(*given)
        return total_loss, norm

    def accumulate(self, micro_batches: Sequence[Batch], weight: float, step: int) -> int:
        with device_errors():
            computed = self._accumulate(micro_batches, weight, step)
            self.confirmation.settle(self.accumulated)
        return sum(shape.positions for shape in computed)

    def sum_gradients(self) -> None:
        self.accumulated = sum_over_ranks(self.accumulated)

    def accumulated_loss(self) -> float:
        return float(self.accumulated[0])

    def gradients(self) -> dict[str, np.ndarray]:
        return dict(self.trained.to_numpy([gradient / self.weight for gradient in self.accumulated[1:]]))

    def add_gradients(self, loss: float, gradients: dict[str, np.ndarray]) -> None:
        added = [mx.array(loss), *(tensor * self.weight for tensor in self.trained.to_tensors(gradients))]
        self.accumulated = [*map(mx.add, self.accumulated, added)]

    def apply_gradients(self, learning_rate: float) -> tuple[mx.array, mx.array]:
        with device_errors(last=True):
            total_loss, norm = self._apply(learning_rate)
            self.confirmation.settle([self.tensors, self.states, total_loss, norm])
        return total_loss, norm

    def _restore_step(self, tensors: Tensors, states: list[State]) -> None:
        self.tensors, self.states = tensors, states

    def _train(self, training: bool) -> None:
        if self.model.training is not training:  # it walks through all modules
            self.model.train(training)

    def _end_step(self) -> None:
        """All that was launched is computed, and what follows is no training."""
        self.confirmation.confirm()
        self._train(False)
        self.dropout.end()

    def _ready(self) -> None:
        """For anything but a step: the model has its weights."""
        self._end_step()
        self._show()

    def eval_step(self, batch: Batch) -> StepResult:
        self._end_step()
        loss, self.shown = mx.array(0.0), []
        try:
            with device_errors():
                for inputs in self.forward.inputs(batch, self.layouts):
                    loss = loss + self.loss(self.tensors, inputs)
                    mx.async_eval(loss)  # one after the other
                self.confirmation.settle(loss)  # here, where running out of memory is still caught
        except OutOfMemory:
            self.layouts = []  # in which smaller micro-batches would take as much, until others are expected
            raise
        return StepResult.of([batch], loss, 0.0, batch.input_ids.size)

    def get_adapter(self) -> Adapter:
        self.confirmation.confirm()
        arrays = self.trained.to_numpy(self.tensors)
        if self.start is None:
            return Adapter(self.recipe.model, len(self.model.layers), 0.0, {}, arrays)
        return self.start.with_arrays(arrays)

    def set_adapter(self, adapter: Adapter) -> None:
        self.confirmation.confirm()
        with device_errors():
            self.tensors = self.trained.to_tensors(adapter.arrays())
            self.confirmation.settle(self.tensors)

    def get_optimizer(self) -> OptimizerState:
        self.confirmation.confirm()
        m, v = (self.trained.to_numpy(self.optimizer.moments(self.states, which)) for which in ("m", "v"))
        with device_errors():
            return OptimizerState(int(self.states[0]["step"].item()), m, v)

    def set_optimizer(self, state: OptimizerState) -> None:
        self.confirmation.confirm()
        with device_errors():
            m, v = (self.trained.to_tensors(moments) for moments in (state.exp_avg, state.exp_avg_sq))
            self.states = self.optimizer.states_of(state.step, m, v)
            self.confirmation.settle(self.states)

    def dequantized(self) -> dict[str, Callable[[], np.ndarray]]:
        return dequantized(self.model, self.names, self.confirmation)

    def logits(self, token_ids: np.ndarray, adapter: bool = True, positions: np.ndarray | None = None) -> np.ndarray:
        self._ready()
        with device_errors(), detached(self.model, {} if adapter else self.layers):
            return self._read(self.forward.logits(token_ids, positions))

    def _read(self, array: mx.array) -> np.ndarray:
        self.confirmation.settle(array)
        return np.array(array)

    def generate(
        self,
        token_ids: np.ndarray,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: Sampler,
        adapter: bool = True,
    ) -> Iterator[int]:
        compute = self.forward.continuing()

        def forward(ids: list[int], restart: bool) -> np.ndarray:
            self._ready()  # at every token: training may continue in between
            with device_errors(), detached(self.model, {} if adapter else self.layers):
                return self._read(compute(ids, restart))

        rope_split = self.model.forward_config.rope_split
        return generate_tokens(forward, token_ids, max_new_tokens, stop_ids, sampler, rope_split)

    def expert_load(self, rows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        self._ready()
        with device_errors(), counted(self.model) as choices:
            for ids in rows:
                self.forward.logits(ids, None)  # of which only the choices are computed
        return choices.complete()

    def memory(self) -> Memory:
        return Memory(mx.get_active_memory(), self.confirmation.peak_memory(), *self.settings.memory, swap_used())

    def cpu_threads(self) -> None:
        """None: beside a busy program OpenBLAS's threads do not wait for each other for long."""

    def close(self) -> None:
        del self.model, self.forward, self.layers, self.dropout, self.trained, self.tensors, self.states, self.shown
        del self.gradient, self.loss, self.update, self.accumulated
        self.settings.restore()
