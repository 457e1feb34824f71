"""The PyTorch backend: a transformers model with PEFT's LoRA layers behind `common.seam.Backend`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import Plan, Recipe
from common.families import text_name
from common.memory import ResidentSet, swap_used
from common.seam import Adapter, Batch, LoraWeight, Memory, ModelInfo, OptimizerState, OutOfMemory, StepResult
from torch_backend.base import load_base
from torch_backend.loss import loss_sum

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TorchBackend:
    """See `common.seam.Backend` for the contract of every method."""

    def load(self, recipe: Recipe, plan: Plan, folder: Path, targets: Sequence[str]) -> ModelInfo:
        from peft import LoraConfig, get_peft_model
        from transformers.utils import logging

        logging.disable_progress_bar()  # ours is the only display
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self.resident = ResidentSet()
        self.recipe = recipe
        self.device = torch.device(plan.device)
        with _memory_errors():
            base = load_base(folder, _DTYPES[recipe.precision]).to(self.device)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is right
            lora_dropout=recipe.dropout,
            target_modules=[text_name(name) for name in targets],
        )
        self.peft = get_peft_model(base, config).to(self.device)
        self.model: Any = self.peft.get_base_model()
        modules = dict(self.model.named_modules())
        self.layers = {name: modules[text_name(name)] for name in sorted(targets)}
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name, layer in self.layers.items():
            self.parameters[f"{name}.lora_A"] = layer.lora_A["default"].weight
            self.parameters[f"{name}.lora_B"] = layer.lora_B["default"].weight
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        return ModelInfo(
            device=str(self.device),
            dtype=recipe.precision,
            layers=self.model.config.num_hidden_layers,
            trainable=sum(p.numel() for p in self.parameters.values()),
            total=sum(p.numel() for p in self.peft.parameters()),
            architecture=type(self.model).__name__,
        )

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        self.peft.train()
        if self.recipe.dropout:
            torch.manual_seed((self.recipe.seed << 32) + step)
        count = sum(batch.label_tokens for batch in micro_batches)
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)  # of a step that ran out of memory
        with _memory_errors():
            for batch in micro_batches:
                loss = loss_sum(self.model, batch, self.device)
                (loss / count).backward()
                total += loss.detach()
        limit = self.recipe.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return StepResult(total, norm, count, sum(batch.tokens for batch in micro_batches))

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        self.peft.eval()
        with _memory_errors():
            return StepResult(loss_sum(self.model, batch, self.device), 0.0, batch.label_tokens, batch.tokens)

    def get_adapter(self) -> Adapter:
        recipe = self.recipe
        weights = {
            name: LoraWeight(
                _numpy(self.parameters[f"{name}.lora_A"]), _numpy(self.parameters[f"{name}.lora_B"]), recipe.alpha
            )
            for name in self.layers
        }
        return Adapter(recipe.model, recipe.rank, recipe.alpha, recipe.dropout, weights)

    @torch.no_grad()
    def set_adapter(self, adapter: Adapter) -> None:
        for name, weight in adapter.weights.items():
            self.parameters[f"{name}.lora_A"].copy_(torch.from_numpy(weight.A))
            self.parameters[f"{name}.lora_B"].copy_(torch.from_numpy(weight.B))

    def get_optimizer(self) -> OptimizerState:
        states = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return OptimizerState(
            step=int(next(iter(states.values()))["step"]),
            exp_avg={name: _numpy(state["exp_avg"]) for name, state in states.items()},
            exp_avg_sq={name: _numpy(state["exp_avg_sq"]) for name, state in states.items()},
        )

    def set_optimizer(self, state: OptimizerState) -> None:
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=self.device),
                "exp_avg": torch.from_numpy(state.exp_avg[name].copy()).to(self.device),
                "exp_avg_sq": torch.from_numpy(state.exp_avg_sq[name].copy()).to(self.device),
            }

    @torch.no_grad()
    def logits(self, token_ids: np.ndarray, adapter: bool = True) -> np.ndarray:
        self.peft.eval()
        inputs = torch.from_numpy(np.asarray(token_ids, np.int64))[None].to(self.device)
        if adapter:
            return self.model(input_ids=inputs, use_cache=False).logits[0].float().cpu().numpy()
        with self.peft.disable_adapter():
            return self.model(input_ids=inputs, use_cache=False).logits[0].float().cpu().numpy()

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
        del self.model, self.peft, self.layers, self.parameters, self.optimizer
        if cuda:
            torch.cuda.empty_cache()


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


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()
