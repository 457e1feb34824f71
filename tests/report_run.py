"""Run folders with all that a page shows, written without training anything."""

import json
from pathlib import Path
from typing import Any

from common.recipe import Plan, Recipe
from common.run_fields import DataFacts, PartRecord, ReportFacts, RowRecord
from common.run_record import Run

VALIDATED = 10  # steps between validations


def write_run(folder: Path, steps: int = 40, hostile: str = "", **changes: Any) -> Path:
    """hostile: stands in every text that a stranger may have written. changes: of the record."""
    folder.mkdir(parents=True)
    run = Run(folder)
    recipe = {"model": "some/base", "data": "rows.jsonl", "model_hash": "f00d", "data_hash": "beef"}
    recipe |= {"template_hash": "", "precision": "fp32", "steps": steps, "warmup_steps": 2, "eval_every": VALIDATED}
    recipe |= {"rows_hash": "cafe", "adapter_hash": "", "quantization": "none", "targets": ["q_proj"]}
    plan = {"backend": "torch", "device": "cpu", "micro_batch_tokens": 256, "gradient_checkpointing": False}
    plan |= {"loss_chunk": 160, "memory_budget": 2_000_000_000, "save_every": 100}
    run.write_recipe(Recipe.model_validate(recipe))
    run.write_plan(Plan.model_validate(plan))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics(steps)))
    run.samples.write_text("".join(json.dumps(line) + "\n" for line in samples(hostile)))
    run.write_report_facts(facts(hostile))
    environment = {"python": "3.11.7", "processor": f"A chip{hostile}", "memory_bytes": 8e9, "packages": {"torch": "2"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    run.update(**record(steps, hostile) | changes)
    return folder


def metrics(steps: int) -> list[dict[str, Any]]:
    """The loss of step n is 4 / n."""
    lines: list[dict[str, Any]] = [{"step": 0, "valid_loss": 4.5}]
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "loss": 4 / step, "label_tokens": 10, "tokens": 100, "learning_rate": 1e-3 / step}
            | {"grad_norm": 1.0 + step % 3, "seconds": 0.5, "memory": 900_000_000 + step, "swap": 0}
        )
        if step % VALIDATED == 0:
            lines.append({"step": step, "valid_loss": 4.4 / step})
    return lines


def samples(hostile: str) -> list[dict[str, Any]]:
    texts = {"prompt": f"the prompt's words{hostile}", "reference": f"the row's answer{hostile}"}
    return [
        texts | {"step": step, "number": 0, "answer": f"an answer at {step}{hostile}", "ended": True}
        for step in (0, 10, 20)
    ]


def facts(hostile: str) -> ReportFacts:
    part = PartRecord(rows=90, tokens=4000, label_tokens=1200, left_out=3, median=40, longest=64)
    row = RowRecord(
        source="rows.jsonl:1",
        tokens=30,
        label_tokens=9,
        parts=[(False, f"what is read{hostile}"), (True, f"what is learned{hostile}")],
    )
    data = DataFacts(
        parts={"train": part},
        edges=[30, 40, 50, 65],
        counts=[20, 60, 10],
        scripts={"Latin": 70, "Japanese": 20},
        warnings=[f"7 rows that are repeated{hostile}"],
        rows=[row],
    )
    return ReportFacts(data=data, reasons={"device": f"no GPU{hostile}"})


def record(steps: int, hostile: str) -> dict[str, Any]:
    link = {"p99_kl": 0.1, "same_top": 0.98, "positions": 400}
    files = (("Q4_K_M", 110_000_000, 6.17, 0.004), ("Q8_0", 150_000_000, 8.5, 0.0002))
    ggufs = [
        {"file": f"gguf/model-{name}.gguf", "name": name, "quant": name, "bytes": size, "bits_per_weight": bits}
        | {"tensors": {"Q4_K": 16}, "fallbacks": 3}
        for name, size, bits, _ in files
    ]
    return {
        "status": "complete",
        "recipe_hash": "495753538bab",
        "model_hash": "f00d",
        "stop_ids": [2],
        "options": {
            "model": f"some/base{hostile}",
            "data": ["my rows.jsonl"],
            "steps": steps,
            "rank": 4,
            "rslora": True,
            "sample_prompt": ["a prompt of the user"],
        },
        "backend": "torch",
        "device": "cpu",
        "steps": steps,
        "tokens": 100 * steps,
        "train_seconds": 0.5 * steps,
        "tokens_per_second": 200.0,
        "label_tokens_per_second": 20.0,
        "start_valid_loss": 4.5,
        "best_valid_loss": 4.4 / steps,
        "test_loss": 0.3,
        "test_perplexity": 1.35,
        "test_rows": 60,
        "predicted_peak_bytes": 1_000_000_000,
        "peak_memory_bytes": 950_000_000,
        "alarms": [{"name": "x", "seen": f"it repeats itself{hostile}", "quote": "quoted words"}],
        "export": {"gguf": ggufs, "sample": {"prompt": [], "answer": "an answer of the GGUF"}},
        "verify": {
            "verdict": "sound",
            "checks": [{"name": "prompt", "state": "ok", "text": f"a row's own words{hostile}"}],
            "divergence": {name: {"mean_kl": kl} | link for name, _, _, kl in files},
            "rows": 32,
        },
    }
