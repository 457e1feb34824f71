"""The PyTorch backend: a transformers model with PEFT's LoRA layers behind `common.backend.Backend`."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

from common.backend import Adapter, Batch, Memory, ModelInfo, OptimizerState, OutOfMemory, StepResult
from common.models.families import end_to_end, forward_config
from common.models.model_folder import ModelFolder
from common.recipe import Plan, Recipe
from common.sampling import Pick, grow
from common.system.memory import GAPS_EVERY, ResidentSet, give_back_blocks, malloc_trim, swap_used
from torch_backend.attention import has_flash
from torch_backend.autograd import again, install
from torch_backend.cuda_graphs import Graphs, can_graph, sizes
from torch_backend.lora import attach, set_arrays
from torch_backend.loss import PackedBatch, loss_of, loss_sum
from torch_backend.matmul import multiple
from torch_backend.model import convert, load_base
from torch_backend.optimizer import Optimizer, to_numpy
from torch_backend.quantize import dequantized, quantization_config, quantize_nf4

_T = TypeVar("_T")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TorchBackend:
    """See `common.backend.Backend` for the contract of every method."""

    graphs: Graphs | None

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        import peft  # noqa: F401  # before memory is counted: the libraries' own is no model's
        from transformers import AutoModelForCausalLM  # noqa: F401
        from transformers.utils import logging

        logging.disable_progress_bar()  # ours is the only display
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        give_back_blocks()
        self.resident = ResidentSet()
        self.recipe = recipe
        self.device = torch.device(plan.device)
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # two threads of one core wait for each other in a product
            torch.set_num_threads(
                min(torch.get_num_threads(), psutil.cpu_count(logical=False) or torch.get_num_threads())
            )
        dtype = _DTYPES[recipe.precision]
        base = ModelFolder(folder)
        config = base.config
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        quantization = quantization_config(recipe.quantization)
        with _memory_errors():
            on_device = {"device_map": {"": self.device}, "quantization_config": quantization} if quantization else {}
            self.model: Any = load_base(base, dtype, **on_device)
            if recipe.quantization == "nf4":
                quantize_nf4(self.model, dtype, self.device)
            if not quantization:
                lora = adapter is not None and not adapter.dora  # PEFT would round DoRA's magnitudes to the held type
                convert(self.model, dtype, hold=lora and self.device.type == "cpu" and dtype == torch.float32)
                self.model.to(self.device)
            self.names = base.full_names
            self.rope_split = forward_config(config).rope_split
            if adapter is None:
                # transformers marks the pad token's row, and torch gives it no gradient: where pad is the token that
                # ends a turn, its embedding would never learn
                self.model.get_input_embeddings().padding_idx = None
                self.outer = self.model
                self.parameters = {self.names[name]: p for name, p in self.model.named_parameters()}
            else:
                self.outer, self.parameters = attach(self.model, adapter)
                self.outer.to(self.device)
                install(self.model, adapter)
        if self.device.type == "cpu":
            for layer in self.model.model.layers[::GAPS_EVERY]:
                layer.mlp.register_forward_pre_hook(self._give_back_gaps)
        self.multiple = multiple(self.device, dtype)
        self.total, self.share = torch.zeros(2, device=self.device)
        self.flash = end_to_end(config, plan.device, recipe.precision) and has_flash(self.device)
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )
        if self.flash:  # the same run twice, to the last bit; other kernels have no such way
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for, and older torch insists
            _deterministic(True, False)  # filling is for debugging
        self.graphed = self.flash and can_graph(self.model, recipe.method, recipe.dropout, recipe.quantization)
        self.apply_plan(plan)
        self.start = adapter
        with _memory_errors():
            self.optimizer = Optimizer(self.parameters, recipe, join=adapter is not None)
        return ModelInfo(
            device=str(self.device),
            dtype=recipe.precision,
            layers=self.model.config.num_hidden_layers,
            trainable=sum(p.numel() for p in self.parameters.values()),
            total=sum(p.numel() for p in self.outer.parameters()),
            architecture=type(self.model).__name__,
        )

    def _fitting(self, compute: Callable[[], _T]) -> _T:
        """What `compute` gives. Out of memory it is done again without graphs: their memory nothing else can use."""
        held = self.graphs is not None and bool(self.graphs.graphs)
        try:
            with _memory_errors():
                return compute()
        except OutOfMemory:
            if self.graphs is not None:
                self.graphs = Graphs(self._micro_step, self.device)
                torch.cuda.empty_cache()
            if not held:
                raise
        return self._fitting(compute)

    def apply_plan(self, plan: Plan) -> None:
        self.plan = plan
        self.graphs = Graphs(self._micro_step, self.device) if self.graphed else None
        if plan.gradient_checkpointing:
            how = {
                "use_reentrant": False,
                "context_fn": lambda: (nullcontext(), again()),
                "preserve_rng_state": bool(self.recipe.dropout),
            }
            self.model.gradient_checkpointing_enable(how)
        elif self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()

    def _give_back_gaps(self, *_: Any) -> None:
        """Only where memory is short: without checkpointing a step took 5 to 12 % longer for up to 17 % less memory."""
        if self.model.training and self.plan.gradient_checkpointing:
            malloc_trim()

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        self.outer.train()
        if self.recipe.dropout:
            torch.manual_seed((self.recipe.seed << 32) + step)
        count = sum(batch.label_tokens for batch in micro_batches)

        def compute() -> None:
            self.total.zero_()
            self.share.fill_(1 / count)
            self.optimizer.zero()  # also of a step that ran out of memory
            for batch in micro_batches:
                if self.graphs is not None:
                    self.graphs.run(batch)
                else:
                    self._add(self._loss(batch))

        self._fitting(compute)
        norm = self.optimizer.step(learning_rate, self.recipe.max_grad_norm)
        tokens, positions = sum(b.tokens for b in micro_batches), sum(map(self._positions, micro_batches))
        return StepResult(self.total.clone(), norm, count, tokens, positions)

    def _positions(self, batch: Batch) -> int:
        if self.graphs is not None:
            return sizes(batch)[0]
        rows, width = batch.input_ids.shape
        return batch.tokens if self.flash else rows * -(-width // self.multiple) * self.multiple

    def _loss(self, batch: Batch) -> torch.Tensor:
        return loss_sum(self.model, batch, self.device, self.plan.loss_chunk, self.flash, self.multiple)

    def _micro_step(self, laid: PackedBatch) -> None:
        self._add(loss_of(self.model, laid, self.plan.loss_chunk))

    def _add(self, loss: torch.Tensor) -> None:
        """To the step's loss and gradients."""
        (loss * self.share).backward()
        self.total += loss.detach()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        self.outer.eval()
        loss = self._fitting(lambda: self._loss(batch))
        return StepResult(loss, 0.0, batch.label_tokens, batch.tokens, self._positions(batch))

    def get_adapter(self) -> Adapter:
        arrays = {name: to_numpy(parameter) for name, parameter in self.parameters.items()}
        if self.start is None:
            return Adapter(self.recipe.model, self.model.config.num_hidden_layers, 0.0, {}, arrays)
        return self.start.with_arrays(arrays)

    def set_adapter(self, adapter: Adapter) -> None:
        set_arrays(self.parameters, adapter)

    def get_optimizer(self) -> OptimizerState:
        return self.optimizer.get()

    def set_optimizer(self, state: OptimizerState) -> None:
        self.optimizer.set(state)

    def dequantized(self) -> dict[str, Callable[[], np.ndarray]]:
        return dequantized(self.model, self.names)

    @torch.no_grad()
    def logits(self, token_ids: np.ndarray, adapter: bool = True, positions: np.ndarray | None = None) -> np.ndarray:
        self.outer.eval()
        kept = torch.from_numpy(np.asarray(range(len(token_ids)) if positions is None else positions, np.int64))
        inputs = torch.from_numpy(np.asarray(token_ids, np.int64))[None].to(self.device)
        with nullcontext() if adapter else self.outer.disable_adapter():
            found = self.model(input_ids=inputs, use_cache=False, logits_to_keep=kept.to(self.device))
            return found.logits[0].float().cpu().numpy()

    def generate(
        self, token_ids: np.ndarray, max_new_tokens: int, stop_ids: Sequence[int], pick: Pick, adapter: bool = True
    ) -> Iterator[int]:
        from transformers import DynamicCache

        cache: Any = None

        @torch.no_grad()
        def forward(ids: list[int], again: bool) -> np.ndarray:
            nonlocal cache
            if again:
                cache = DynamicCache()  # keeps every key; `attend` cuts the windows
            self.outer.eval()  # at every token: training may go on in between
            inputs = torch.tensor([ids], device=self.device)
            with _memory_errors(), nullcontext() if adapter else self.outer.disable_adapter():
                found = self.model(input_ids=inputs, cache=cache, use_cache=True, logits_to_keep=1)
            return found.logits[0, -1].float().cpu().numpy()

        return grow(forward, token_ids, max_new_tokens, stop_ids, pick, self.rope_split)

    def memory(self) -> Memory:
        if self.device.type != "cuda":
            return self.resident.memory()
        return Memory(
            used=torch.cuda.memory_allocated(self.device),
            peak=torch.cuda.max_memory_allocated(self.device),
            total=torch.cuda.get_device_properties(self.device).total_memory,
            kind="cuda",
            swap=swap_used(),
        )

    def close(self) -> None:
        cuda = self.device.type == "cuda"
        del self.model, self.outer, self.parameters, self.optimizer, self.graphs
        gc.collect()  # layers whose call is replaced refer to themselves
        if cuda:
            _deterministic(*self.before)
            torch.cuda.empty_cache()


def _deterministic(algorithms: bool, fill: bool) -> None:
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def _memory_errors() -> Iterator[None]:
    """OutOfMemory for what torch raises on a GPU (OutOfMemoryError) and on a CPU (a plain RuntimeError)."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemory(text.split("\n")[0]) from None
        raise
