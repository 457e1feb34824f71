"""Options of other programs that mean something only together: batches, LoRA's parameters, trackers."""

import math
from dataclasses import dataclass, field
from typing import Any

from common.option_aliases import SAME, TRACKED
from common.option_fields import TRACKERS

LORA_PARAMETERS = ("rank", "scale", "dropout", "keys")
_TRL_BATCH = 8  # TrainingArguments.per_device_train_batch_size
_MLX_BATCH = 4  # mlx_lm.lora's batch_size


@dataclass
class Work:
    """A translation under way. rest: keys still to be looked at; options: what they came to."""

    rest: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def mlx_lm_batches(work: Work) -> None:
    """mlx_lm.lora counts micro-batches: its iters, intervals and batch size mean the same only with accumulation."""
    rest, notes = work.rest, work.notes
    if "iters" not in rest and "grad_accumulation_steps" not in rest:
        return
    parts = {
        "iters": rest.pop("iters", None),
        "batch_size": rest.pop("batch_size", _MLX_BATCH),
        "grad_accumulation_steps": rest.pop("grad_accumulation_steps", 1),
    }
    if parts["iters"] is None:
        del parts["iters"]
    numbers = whole_numbers(parts, work.faults)
    if numbers is None:
        return
    accumulate = numbers["grad_accumulation_steps"]
    work.options["batch_size"] = numbers["batch_size"] * accumulate
    written = f"batch_size {numbers['batch_size']} x grad_accumulation_steps {accumulate}"
    notes.append(f"mlx_lm's {written} -> batch_size {work.options['batch_size']} rows a step")
    if "iters" in numbers:
        work.options["steps"] = max(1, numbers["iters"] // accumulate)
        notes.append(f"mlx_lm's iters {numbers['iters']} micro-batches -> steps {work.options['steps']}")
    for key, name in (("steps_per_eval", "eval_every"), ("save_every", "save_every")):
        every = number(rest.get(key)) if accumulate > 1 else None
        if every is not None and every >= 1:
            del rest[key]
            work.options[name] = max(1, int(every) // accumulate)
            notes.append(f"mlx_lm's {key} {every:g} micro-batches -> {name} {work.options[name]}")


def trl_batches(work: Work) -> None:
    """TRL and Axolotl name the rows of a micro-batch and the accumulation; here the two are one batch size."""
    rest = work.rest
    found = next((k for k in ("per_device_train_batch_size", "micro_batch_size") if k in rest), None)
    if found is None and "gradient_accumulation_steps" not in rest:
        return
    if "batch_size" in rest or "batch_size" in work.options:
        work.faults.append(
            f"{found or 'gradient_accumulation_steps'} beside batch_size: batch_size is all rows of an optimizer step; "
            "give either batch_size, or micro batch and accumulation"
        )
        rest.pop("gradient_accumulation_steps", None)
        rest.pop(found or "", None)
        return
    name = found or "per_device_train_batch_size"
    parts = {
        name: rest.pop(name, _TRL_BATCH),
        "gradient_accumulation_steps": rest.pop("gradient_accumulation_steps", 1),
    }
    if (numbers := whole_numbers(parts, work.faults)) is None:
        return
    accumulate = numbers["gradient_accumulation_steps"]
    work.options["batch_size"] = numbers[name] * accumulate
    written = f"{name} {numbers[name]} x gradient_accumulation_steps {accumulate}"
    work.notes.append(f"{written} -> batch_size {work.options['batch_size']} rows a step")


def lora_parameters(work: Work) -> None:
    """mlx_lm's `lora_parameters: {rank, scale, dropout, keys}`; its scale multiplies, ours is alpha / rank."""
    rest, options, notes, faults = work.rest, work.options, work.notes, work.faults
    given = rest.pop("lora_parameters", None) or {}  # YAML's empty value
    if not isinstance(given, dict):
        faults.append(f"lora_parameters: must be a mapping of rank, scale, dropout, keys (got {given!r})")
        return
    nested = dict(given)
    for key in [key for key in rest if key.startswith("lora_parameters.")]:
        nested[key.removeprefix("lora_parameters.")] = rest.pop(key)
    if not nested:
        return
    for key in nested.keys() - set(LORA_PARAMETERS):
        faults.append(f"lora_parameters.{key}: unknown; mlx_lm has rank, scale, dropout, keys")
    if "rank" in nested and "rank" in rest:
        faults.append("rank is given twice, once under another name")
        return
    rank = number(nested.get("rank", rest.get("rank", 8)))
    scale = number(nested.get("scale", 20.0))
    if rank is None or scale is None:
        faults.append("lora_parameters: rank and scale must be numbers")
        return
    options["rank"] = rest.pop("rank", None) or int(rank)
    options["alpha"] = scale * rank
    notes.append(f"lora_parameters.scale {scale:g} with rank {rank:g} -> alpha {scale * rank:g}")
    if "dropout" in nested:
        options["dropout"] = nested["dropout"]
    if "keys" in nested:
        keys = nested["keys"]
        if not isinstance(keys, list) or not keys:
            faults.append(f"lora_parameters.keys: must be a list of layer names (got {keys!r})")
            return
        options["targets"] = [str(name).rsplit(".", 1)[-1] for name in keys]
        notes.append(f"lora_parameters.keys -> targets {' '.join(options['targets'])}")


def is_off(value: Any) -> bool:
    return str(value).lower() in ("false", "none", "no")


def trackers(work: Work) -> None:
    """`report_to` of transformers and mlx_lm, and `use_wandb` and its like of Axolotl and LLaMA-Factory."""
    rest, given = work.rest, work.rest.pop("report_to", None)
    named = [str(one) for one in given] if isinstance(given, list) else str(given or "").replace(",", " ").split()
    named = [name for name in named if not is_off(name)]
    askers = ["report_to"] if named else []
    for key, name in TRACKED.items():
        asked = rest.get(key) if key == "wandb_project" else rest.pop(key, None)  # the project says what it is for
        if asked and not is_off(asked) and given is None:
            named.append(name)
            askers.append(key)
    if unknown := [name for name in named if name not in TRACKERS]:
        work.faults.append(f"report_to: {unknown[0]!r} is not offered, only {', '.join(TRACKERS)} and none")
    elif named:
        work.options["track"] = list(dict.fromkeys(named))
        work.notes.append(f"{', '.join(askers)} -> track {' '.join(work.options['track'])}")
    elif given is not None:
        work.notes.append("report_to: no tracker, as it is here")
    for key in [key for key, name in SAME.items() if name == "track_project" and key in rest]:
        if not rest[key] or (given is not None and not named):
            del rest[key]
            work.notes.append(f"{key}: not needed, there is no tracker")


def number(value: object) -> float | None:
    """A finite number, else None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def whole_numbers(values: dict[str, Any], faults: list[str]) -> dict[str, int] | None:
    numbers: dict[str, int] = {}
    for name, value in values.items():
        found = number(value)
        if found is None or found < 1 or found != int(found):
            faults.append(f"{name}: must be a whole number from 1 up (got {value!r})")
        else:
            numbers[name] = int(found)
    return numbers if len(numbers) == len(values) else None
