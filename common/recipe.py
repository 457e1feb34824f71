"""Recipe and Plan: what changes the result, and what changes only speed and memory."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from common.option_fields import PlanFields, RecipeFields

# A group means those of its names that the model has: Phi-3 keeps q, k and v in one matrix, gate and up in another.
TARGET_GROUPS = {
    "attention": [
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),  # of linear attention
        "in_proj",  # of an LFM2's convolution, whose attention and convolution have an out_proj too
    ],
    "mlp": [
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
        *("input_linear", "output_linear"),  # Granite 4's
        *("w1", "w3", "w2"),  # LFM2's
    ],
}
TARGET_GROUPS["all-linear"] = TARGET_GROUPS["attention"] + TARGET_GROUPS["mlp"]
# How the names of such parameters end.
_NOT_DECAYED = ("norm.weight", ".bias", "embed_tokens.weight", ".magnitude", ".A_log", ".dt_bias")


VERSION = 4  # of recipes; raised where the same fields come to give another result
# Fields that older recipes lack, by the version that brought them.
SINCE = {2: {"version", "rows_hash", "on_bad_row", "tools"}, 4: {"patience", "min_delta"}}
OPTIONAL = {"parent", "eval_rows", "weights"}  # fields that a recipe of any version may lack
# Names; and options whose whole effect is in data_hash and rows_hash.
_NOT_HASHED = {"model", "data", "weights", "on_bad_row", "tools", "eval_rows"}


def lacking(version: int) -> set[str]:
    """The fields that a recipe of this version has not got."""
    return {name for since, names in SINCE.items() if version < since for name in names}


class Parent(BaseModel):
    """The recipe that another one continues, and the step after which it does; 0 where that began again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str  # its hash
    step: int

    def __str__(self) -> str:
        return f"{self.recipe[:12]} from step {self.step}"


class Recipe(RecipeFields):
    """Everything that changes the result, with every `auto` resolved. Some are kept but do not enter the hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = VERSION
    eval_rows: int = 0  # all of them, in a recipe from before this option
    patience: int = 0  # so too
    min_delta: float = 0.0
    model: str  # not hashed
    data: str  # not hashed
    model_hash: str  # contents of weights, config and tokenizer
    data_hash: str  # contents of training and validation rows
    template_hash: str
    rows_hash: str = ""  # ids and loss weights of the training and validation rows, as encoded
    precision: Literal["bf16", "fp32"]
    targets: list[str]  # the layers by name
    adapter_hash: str = ""  # contents of the adapter that training started from
    quantization: str = "none"  # the scheme: mlx-4bit-64, nf4, ...
    steps: int
    warmup_steps: int
    eval_every: int
    parent: Parent | None = None  # of a run that was lengthened or rolled back; hashed only there

    def hash(self) -> str:
        """SHA-256 over the canonical JSON of `hashed()`; 64 hex digits."""
        return hashlib.sha256(json.dumps(self.hashed(), sort_keys=True).encode()).hexdigest()

    def hashed(self) -> dict[str, Any]:
        """Every field that the recipe's version has, but names and those whose effect other fields hold."""
        return {name: value for name, value in self.content().items() if name not in _NOT_HASHED}

    def content(self) -> dict[str, Any]:
        """Every field that the recipe's version has; `parent` only where there is one."""
        left_out = lacking(self.version)
        return self.model_dump(exclude=left_out if self.parent else left_out | {"parent"})

    def optimizer_groups(self, names: Iterable[str]) -> list[tuple[list[str], float, float]]:
        """`(names, ratio of their learning rate to the recipe's, weight decay)` of each group of trained parameters.

        With LoRA+ the B matrices have a rate of their own. Weight decay spares norms, biases, embeddings and DoRA's
        magnitudes, as is usual: drawing these towards 0 does not regularize.
        """
        groups: dict[tuple[float, float], list[str]] = {}
        for name in names:
            ratio = self.lora_plus if name.endswith(".lora_B") else 1.0
            decay = 0.0 if name.endswith(_NOT_DECAYED) else self.weight_decay
            groups.setdefault((ratio, decay), []).append(name)
        return [(members, *settings) for settings, members in groups.items()]


class Plan(PlanFields):
    """Everything that changes only speed and memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["mlx", "torch"]
    device: Literal["cpu", "gpu", "cuda", "mps"]
    device_index: int = 0  # of several NVIDIA GPUs the one that torch counts by this number
    ranks: int = 1  # processes that train together, each on a device of its own
    sharded: bool = False  # each rank holds a part of every weight, and not the complete model
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
        return Plan.model_validate(self.model_dump() | {"device": device, "device_index": int(index or 0)})
