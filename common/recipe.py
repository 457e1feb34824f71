"""Recipe and Plan: what changes the result, and what changes only speed and memory."""

import hashlib
import json
from typing import Literal

from pydantic import ConfigDict

from common.option_fields import PlanFields, RecipeFields

# A group means those of its names that the model has: Phi-3 keeps q, k and v in one matrix, gate and up in another.
TARGET_GROUPS = {
    "attention": ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "gate_up_proj", "down_proj"],
}
TARGET_GROUPS["all-linear"] = TARGET_GROUPS["attention"] + TARGET_GROUPS["mlp"]


class Recipe(RecipeFields):
    """Everything that changes the result, with every `auto` resolved. Names are kept but do not enter the hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str  # not hashed
    data: str  # not hashed
    model_hash: str  # contents of weights, config and tokenizer
    data_hash: str  # contents of training and validation rows
    template_hash: str
    precision: Literal["bf16", "fp32"]
    targets: list[str]  # the layers by name
    adapter_hash: str = ""  # contents of the adapter that training started from
    quantization: str = "none"  # the scheme: mlx-4bit-64, nf4, ...
    steps: int
    warmup_steps: int
    eval_every: int

    def hash(self) -> str:
        """SHA-256 over the canonical JSON of every field but the names; 64 hex digits."""
        content = self.model_dump(exclude={"model", "data"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Plan(PlanFields):
    """Everything that changes only speed and memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["mlx", "torch"]
    device: Literal["cpu", "gpu", "cuda", "mps"]
    device_index: int = 0  # of several NVIDIA GPUs the one that torch counts by this number
    micro_batch_tokens: int
    gradient_checkpointing: bool = False
    loss_chunk: int = 128  # label positions whose logits are held at once
    memory_budget: int = 0  # bytes that training may take; 0: not known
    save_every: int

    @property
    def device_name(self) -> str:
        """The device as --device names it: cuda:1 where it is not the first."""
        return f"{self.device}:{self.device_index}" if self.device_index else self.device

    def on(self, device_name: str) -> "Plan":
        """The same plan on the device of this name."""
        device, _, index = device_name.partition(":")
        return self.model_copy(update={"device": device, "device_index": int(index or 0)})
