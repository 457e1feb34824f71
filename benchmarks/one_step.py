"""One configuration in a process of its own: load, one micro-batch a step, one step by default; prints JSON.

python -m benchmarks.one_step '{"backend": "torch", "model": "gemma-3-1b", "rows": 4, "width": 512}'
"""

import importlib
import json
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_model import random_model
from common.backend import Adapter, Backend, Batch
from common.memory_terms import MicroBatchShape
from common.models.lora_init import initial_adapter, layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.recipe import Plan, Recipe
from common.training.memory_estimate import MemoryEstimate, TrainingMemory, model_dims


def recipe_of(case: dict[str, Any]) -> Recipe:
    names = {name: "" for name in ("model", "data", "model_hash", "data_hash", "template_hash")}
    numbers = {"weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "max_grad_norm": 1.0}
    return Recipe(
        **names,
        **numbers,
        method=case.get("method", "lora"),
        precision=case.get("precision", "bf16"),
        quantization=case.get("quantization", "none"),
        rank=case.get("rank", 16),
        dropout=case.get("dropout", 0.0),
        alpha=32.0,
        targets=["all-linear"],
        batch_size=case["rows"],
        max_length=case["width"] + 1,
        learning_rate=1e-4,
        schedule="constant",
        steps=1,
        warmup_steps=0,
        eval_every=1,
        seed=0,
    )


def batch_of(case: dict[str, Any], vocabulary: int) -> Batch:
    """Rows of equal length; the share `labeled` of each, at its end, carries loss."""
    shape = (case["rows"], case["width"])
    ids = np.random.default_rng(0).integers(3, vocabulary, (2, *shape)).astype(np.int32)
    loss_weights = np.ones(shape, np.float32)
    loss_weights[:, : round(case["width"] * (1 - case.get("labeled", 0.5)))] = 0
    return Batch(ids[0], ids[1], loss_weights, np.full(case["rows"], case["width"], np.int32))


def job_of(case: dict[str, Any]) -> tuple[Path, Recipe, Plan, Adapter, dict[str, Any]]:
    """`(model folder, recipe, plan, adapter, text config)`; a model of random weights is made where none is there."""
    folder = random_model(case["model"], case.get("layers"), vocabulary=case.get("vocabulary"))
    recipe, config = recipe_of(case), ModelFolder(folder).config
    plan = Plan(
        backend=case["backend"],
        device=case.get("device", "cpu"),
        micro_batch_tokens=case["rows"] * case["width"],
        gradient_checkpointing=case.get("gradient_checkpointing", False),
        memory_budget=_budget(case),
        loss_chunk=case.get("loss_chunk", 32 if case["backend"] == "mlx" else 64),
        save_every=1,
    )
    if plan.device != "cpu":  # the backend's own, as `train` has it
        chunk = package_of(case).memory_terms.loss_chunk(config["vocab_size"], plan.device)
        plan = plan.model_copy(update={"loss_chunk": chunk})
    shapes = linear_shapes(ModelFolder(folder), ["all-linear"])
    return folder, recipe, plan, initial_adapter(shapes, layer_count(shapes), recipe), config


def _budget(case: dict[str, Any]) -> int:
    """On MLX's GPU the share of what is free that `train` takes, so that the wired limit is set; elsewhere none."""
    return round(0.85 * package_of(case).free_memory("gpu")[0]) if case.get("device") == "gpu" else 0


def package_of(case: dict[str, Any]) -> Any:
    return importlib.import_module(f"{case['backend']}_backend")


def estimate(case: dict[str, Any], batch: Batch) -> MemoryEstimate:
    _, recipe, plan, adapter, config = job_of(case)
    shape = MicroBatchShape(len(batch.lengths), batch.input_ids.shape[1], batch.tokens, batch.label_tokens)
    return TrainingMemory(package_of(case), model_dims(config), recipe, adapter).estimate(plan, [shape])


def backend_of(case: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """`(a loaded backend, text config)`"""
    folder, recipe, plan, adapter, config = job_of(case)
    backend = package_of(case).create()
    backend.load(recipe, plan, folder, adapter)
    return backend, config


def measure(case: dict[str, Any]) -> dict[str, Any]:
    batch = batch_of(case, job_of(case)[-1]["vocab_size"])
    if case.get("predict_only"):
        return {"predicted": estimate(case, batch).peak}
    with closing(backend_of(case)[0]) as backend:
        steps = case.get("steps", 1)
        backend.expect(lambda: Counter({batch.shape: steps}))
        loaded = backend.memory().peak
        for step in range(1, steps + 1):
            started = time.perf_counter()
            result = backend.train_step([batch], 1e-4, step)
            loss = float(result.loss_sum) / result.weight_sum
        memory = backend.memory()
        seconds = time.perf_counter() - started
    found = estimate(case, batch)
    extra = {}
    if case.get("device") == "cuda":
        import torch

        extra["reserved"] = torch.cuda.max_memory_reserved()
    return extra | {
        "case": case,
        "loaded": loaded,
        "peak": memory.peak,
        "predicted": found.peak,
        "parts": found.parts,
        "seconds": seconds,
        "loss": loss,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
