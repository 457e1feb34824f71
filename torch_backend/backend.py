"""The PyTorch backend: a transformers model with PEFT's LoRA layers behind `common.backend.Backend`."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from common.backend import (
    Adapter,
    Batch,
    Memory,
    ModelInfo,
    OptimizerState,
    OutOfMemory,
    StepResult,
    weight_sum,
)
from common.lazy_arrays import LazyArrays
from common.memory_terms import MicroBatchShape
from common.models.families import forward_config, is_known
from common.models.model_folder import ModelFolder
from common.recipe import Plan, Recipe
from common.sampling import Sampler, generate_tokens
from torch_backend.cuda_graphs import Graphs, can_graph
from torch_backend.device_errors import device_errors
from torch_backend.device_settings import DeviceSettings
from torch_backend.experts import counted
from torch_backend.forward import Forward, PackedForward, PlainForward
from torch_backend.group import sum_over_ranks
from torch_backend.host_memory import TRIM_EVERY, malloc_trim, return_large_blocks
from torch_backend.kernel_check import check_kernels
from torch_backend.layers import mlp_of
from torch_backend.lora import set_arrays
from torch_backend.loss import PackedBatch, loss_of
from torch_backend.mlp import recomputing
from torch_backend.model import DTYPES, check_checkpointing, import_libraries, load_model
from torch_backend.optimizer import MOMENTS, Optimizer, to_numpy
from torch_backend.quantize import dequantized
from torch_backend.shards import together
from torch_backend.trained import Trained

_T = TypeVar("_T")


class TorchBackend:
    """See `common.backend.Backend` for the contract of every method."""

    graphs: Graphs | None
    forward: Forward

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        import_libraries()
        return_large_blocks()
        self.device = torch.device(plan.device_name)
        self.settings = DeviceSettings(self.device, plan.memory_budget)
        try:
            return self._load(recipe, plan, ModelFolder(folder), adapter)
        except BaseException:  # nobody closes what was never loaded
            self.settings.restore()
            raise

    def _load(self, recipe: Recipe, plan: Plan, base: ModelFolder, adapter: Adapter | None) -> ModelInfo:
        config, self.names, self.known = base.config, base.full_names, is_known(base.config)
        self.rope_split = forward_config(config).rope_split
        with device_errors():
            self.model: Any = load_model(base, recipe, self.device, plan.sharded)
            warning = check_kernels(self.model, self.device, DTYPES[recipe.precision]) if self.known and adapter else ""
        if self.device.type == "cpu" and self.known:
            for layer in self.model.model.layers[::TRIM_EVERY]:
                mlp_of(layer).register_forward_pre_hook(self._trim)
        self.total, self.share = torch.zeros(2, device=self.device)
        packed = partial(PackedForward, self.model, config, plan, recipe.precision)
        self.forward = packed() if self.known else PlainForward(self.model, self.device)
        if self.forward.flash:
            self.settings.make_deterministic()
        self._begin(recipe, plan, adapter)
        return ModelInfo(
            layers=self.model.config.num_hidden_layers,
            trainable=sum(p.numel() for p in self.parameters.values()),
            total=sum(p.numel() for p in self.outer.parameters()),
            architecture=type(self.model).__name__,
            warning=warning,
        )

    def _begin(self, recipe: Recipe, plan: Plan, adapter: Adapter | None) -> None:
        """Have the loaded model train this, from the start."""
        self.recipe, self.start = recipe, adapter
        with device_errors():
            self.outer, self.parameters, self.shards, groups = Trained.of(
                self.model, self.names, recipe, adapter, self.device.type if plan.sharded else "", self.known
            )
            self.outer.to(self.device)
        graphed = self.forward.flash and can_graph(self.model, recipe.method, recipe.dropout, recipe.quantization)
        self.graphs = Graphs(self._micro_step, self.device) if graphed and not plan.sharded else None
        self.apply_plan(plan)
        with device_errors():
            self.optimizer = Optimizer(self.parameters, recipe, groups, join=adapter is not None)

    def exchange(self, recipe: Recipe, plan: Plan, adapter: Adapter) -> None:
        if self.model.is_gradient_checkpointing:  # or PEFT has the embeddings' output take part in the backward pass
            self.model.gradient_checkpointing_disable()
        self.outer.unload()
        del self.optimizer, self.graphs, self.parameters  # before there are others
        self._begin(recipe, plan, adapter)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Around what a device computes, and with a sharded model all ranks together."""
        with together() if self.shards else nullcontext(), device_errors():
            yield

    def _with_memory(self, compute: Callable[[], _T]) -> _T:
        """The result of `compute`, repeated without graphs where memory runs out: only they can use what they hold."""
        held = self.graphs is not None and bool(self.graphs.graphs)
        try:
            with self._errors():
                return compute()
        except OutOfMemory:
            if self.graphs is not None:
                self.graphs.drop()
            if not held:
                raise
        return self._with_memory(compute)

    def apply_plan(self, plan: Plan) -> None:
        self.plan = plan
        if self.graphs is not None:
            self.graphs.drop()
        if plan.gradient_checkpointing:
            check_checkpointing(self.model)
            settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": bool(self.recipe.dropout)}
            if self.known:
                settings["context_fn"] = lambda: (nullcontext(), recomputing())
            self.model.gradient_checkpointing_enable(settings)
        elif self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()

    def _trim(self, *_: Any) -> None:
        """With checkpointing, or shards, which leave gaps; else a step took 5 to 12 % longer for 17 % less memory."""
        if self.plan.sharded or (self.model.training and self.plan.gradient_checkpointing):
            malloc_trim()

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        if self.graphs is not None:
            self.graphs.expect(shapes())

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        padded = self.accumulate(micro_batches, weight_sum(micro_batches), step)
        return StepResult.of(micro_batches, *self.apply_gradients(learning_rate), padded)

    def accumulate(self, micro_batches: Sequence[Batch], weight: float, step: int) -> int:
        self.outer.train()
        if self.recipe.dropout:
            rank = micro_batches[0].rank if micro_batches else 0
            mixed = np.random.SeedSequence([self.recipe.seed, rank, step])
            torch.manual_seed(int(mixed.generate_state(1)[0]))  # 32 bits: a CPU's generator reads no others

        def compute() -> None:
            self.total.zero_()
            self.share.fill_(1 / weight)
            self.optimizer.zero_grad()  # also those of a step that ran out of memory
            for batch in chain.from_iterable(map(self.forward.parts, micro_batches)):
                self.settings.adapt_threads()
                if self.graphs is not None:
                    self.graphs.run(batch)
                else:
                    self._accumulate(self._loss(batch))

        self._with_memory(compute)
        return sum(map(self._padded_tokens, micro_batches))

    def sum_gradients(self) -> None:
        summed = self.shards is not None and self.start is None  # by FSDP2, in the backward pass
        sum_over_ranks([self.total, *(() if summed else self.optimizer.gradients())])

    def accumulated_loss(self) -> float:
        with device_errors():
            return float(self.total)

    def gradients(self) -> dict[str, np.ndarray]:
        self.optimizer.gradients()
        return {name: to_numpy(parameter.grad) for name, parameter in self.parameters.items()}

    def add_gradients(self, loss: float, gradients: dict[str, np.ndarray]) -> None:
        self.total += loss
        self.optimizer.gradients()
        for name, parameter in self.parameters.items():
            parameter.grad += torch.from_numpy(gradients[name]).to(self.device)

    def apply_gradients(self, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        with together() if self.shards else nullcontext():
            norm = self.optimizer.step(learning_rate, self.recipe.max_grad_norm)
        return self.total.clone(), norm

    def _padded_tokens(self, batch: Batch) -> int:
        return self.forward.padded_tokens(batch) if self.graphs is None else self.graphs.layout(batch).tokens

    def _loss(self, batch: Batch) -> torch.Tensor:
        return self._computed(lambda: self.forward.loss(batch, self.plan.loss_chunk))

    def _computed(self, compute: Callable[[], _T]) -> _T:  # which calls the model
        return compute() if self.shards is None else self.shards.compute(compute)

    def _micro_step(self, packed: PackedBatch) -> None:
        self._accumulate(loss_of(self.model, packed, self.plan.loss_chunk))

    def _accumulate(self, loss: torch.Tensor) -> None:
        """Add to the step's loss and gradients."""
        (loss * self.share).backward()
        self.total += loss.detach()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        self.outer.eval()
        self.settings.adapt_threads()
        loss = self._with_memory(lambda: self._loss(batch))
        return StepResult.of([batch], loss, 0.0, self.forward.padded_tokens(batch))

    def get_adapter(self) -> Adapter:
        arrays = self._arrays(self.parameters.__getitem__)
        if self.start is None:
            return Adapter(self.recipe.model, self.model.config.num_hidden_layers, 0.0, {}, arrays)
        return self.start.with_arrays(arrays)

    def _arrays(self, get: Callable[[str], torch.Tensor]) -> LazyArrays:
        """What `get` gives for each trained parameter's name."""

        def read(name: str) -> np.ndarray:
            with self._errors():
                return to_numpy(get(name))

        return LazyArrays({name: tuple(parameter.shape) for name, parameter in self.parameters.items()}, read)

    def set_adapter(self, adapter: Adapter) -> None:
        set_arrays(self.parameters, adapter)
        self.optimizer.copies.refresh()

    def get_optimizer(self) -> OptimizerState:
        with device_errors():
            step = self.optimizer.steps
        return OptimizerState(step, *(self._arrays(partial(self.optimizer.moment, kind)) for kind in MOMENTS))

    def set_optimizer(self, state: OptimizerState) -> None:
        self.optimizer.set(state)

    def dequantized(self) -> dict[str, Callable[[], np.ndarray]]:
        return dequantized(self.model, self.names)

    @torch.no_grad()
    def logits(self, token_ids: np.ndarray, adapter: bool = True, positions: np.ndarray | None = None) -> np.ndarray:
        self.outer.eval()
        self.settings.adapt_threads()
        kept = np.arange(len(token_ids)) if positions is None else positions

        def compute() -> np.ndarray:
            with nullcontext() if adapter else self.outer.disable_adapter():
                return self.forward.logits(token_ids, kept).float().cpu().numpy()

        return self._with_memory(lambda: self._computed(compute))

    def generate(
        self,
        token_ids: np.ndarray,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: Sampler,
        adapter: bool = True,
    ) -> Iterator[int]:
        compute = self.forward.continuing()

        @torch.no_grad()
        def forward(ids: list[int], restart: bool) -> np.ndarray:
            self.outer.eval()  # at every token: training may continue in between
            self.settings.adapt_threads()
            with device_errors(), nullcontext() if adapter else self.outer.disable_adapter():
                return compute(ids, restart).float().cpu().numpy()

        return generate_tokens(forward, token_ids, max_new_tokens, stop_ids, sampler, self.rope_split)

    @torch.no_grad()
    def expert_load(self, rows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        self.outer.eval()

        def compute() -> dict[int, np.ndarray]:
            with counted(self.model) as choices:
                for ids in rows:
                    self.settings.adapt_threads()
                    self.forward.logits(ids, np.array([len(ids) - 1]))
            return choices.complete()

        return self._with_memory(lambda: self._computed(compute))

    def memory(self) -> Memory:
        return self.settings.memory()

    def cpu_threads(self) -> tuple[int, int] | None:
        return self.settings.threads()

    def close(self) -> None:
        del self.model, self.forward, self.outer, self.parameters, self.optimizer, self.graphs, self.shards
        gc.collect()  # layers whose forward is replaced refer to themselves
        self.settings.restore()
