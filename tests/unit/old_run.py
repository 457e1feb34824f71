"""A run folder as version 0.1 wrote it (commit 4f2636b), made of one that this version wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from common.data.facts import data_hash
from common.data.load import load_data
from common.models.adapter_files import read_peft, write_mlx
from common.recipe import lacking
from common.run_record import Run
from common.training import checkpoint

# Keys of its run.json; later versions have added others.
RECORD = (
    *("status", "recipe_hash", "model_hash", "plans", "deterministic", "stop_ids", "sample_prompt", "data", "options"),
    *("backend", "device", "steps", "tokens", "label_tokens", "train_seconds", "tokens_per_second"),
    *("label_tokens_per_second", "padding_fraction", "final_train_loss", "best_valid_loss", "best_step"),
    *("predicted_peak_bytes", "predicted_parts", "memory_kind", "peak_memory_bytes", "peak_rss_bytes"),
    *("swap_growth_bytes", "export", "exported_adapter", "exported_step", "base", "verify", "stage_seconds"),
)
NEWER = (  # of options and plan
    *("save_minutes", "keep_checkpoints", "device_index", "eval_rows", "rehash"),
    *("patience", "min_delta", "recipe", "weights", "devices", "ranks", "shard", "sharded", "try_model"),
    *("lang", "live", "imatrix_file", "split_size", "track", "track_project", "track_text", "track_artifacts"),
    *("mlx_bits", "install"),
)


def make_old(run: Path) -> Path:
    """Rewrite everything of `run` whose layout has changed since."""
    record = json.loads((run / "run.json").read_text())
    record = {key: record[key] for key in RECORD if key in record}
    record["options"] = {key: value for key, value in record["options"].items() if key not in NEWER}
    record["plans"] = [{key: value for key, value in plan.items() if key not in NEWER} for plan in record["plans"]]
    if "stage_seconds" in record:
        record["stage_seconds"]["tokenise"] = record["stage_seconds"].pop("tokenize")
    given = record["options"]
    (given["data"],) = given["data"]
    data = load_data(given["data"], given["valid_share"], given["seed"], given["field"], given["on_bad_row"])
    changes = dict.fromkeys(lacking(1) | {"eval_rows", "weights"}) | {"data_hash": data_hash(data, 1)}
    edit_yaml(run / "recipe.yaml", changes)
    record["recipe_hash"] = Run(run).recipe.hash()
    (run / "run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    edit_yaml(run / "plan.yaml", dict.fromkeys(NEWER))
    for name in (".lock", "verify-cases.json"):
        (run / name).unlink()
    for folder in (run / "checkpoints").iterdir():
        _old_checkpoint(folder)
    return run


def _old_checkpoint(folder: Path) -> None:
    """Both layouts; written after the validation, of no known recipe."""
    state = json.loads((folder / "state.json").read_text())
    if (folder / "evaluation.json").exists():
        state |= json.loads((folder / "evaluation.json").read_text())
        (folder / "evaluation.json").unlink()
        if state["best_step"] == state["step"]:
            shutil.copytree(folder / "adapter", folder / "best" / "adapter", dirs_exist_ok=True)
    del state["recipe_hash"], state["evaluated"]
    (folder / "state.json").write_text(json.dumps(state))
    write_mlx(folder / "adapter-mlx", read_peft(folder / "adapter", state["layers"]))
    (folder / "COMPLETE").unlink()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): checkpoint.file_digest(path) for path in files}
    (folder / "COMPLETE").write_text(json.dumps(hashes))


def edit_yaml(path: Path, changes: dict[str, Any]) -> None:
    """Fields of a recipe or plan changed; those of None are removed."""
    content = yaml.safe_load(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None or key not in changes}
    path.write_text(yaml.safe_dump(kept))


def edit_record(run: Path, **changes: Any) -> None:
    record = json.loads((run / "run.json").read_text()) | changes
    (run / "run.json").write_text(json.dumps(record))
