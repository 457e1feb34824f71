"""Options of mlx_lm.lora, TRL and Axolotl: translated where they mean the same, explained where they do not."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.option_aliases import (
    AGREED,
    AXOLOTL_ADAPTERS,
    EXPLAINED,
    FAMILIES,
    NEEDLESS,
    SAME,
    SMALLER_ADAMW,
    SWITCHES,
    TYPES,
)

_LORA_PARAMETERS = ("rank", "scale", "dropout", "keys")
_WARMUPS = {"warmup", "warmup_steps", "warmup_ratio"}
_TRL_BATCH = 8  # TrainingArguments.per_device_train_batch_size
_MLX_BATCH = 4  # mlx_lm.lora's batch_size


@dataclass
class _Work:
    """A translation under way. rest: keys still to be looked at; options: what they came to."""

    rest: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """`(options, notes, faults)`: foreign spellings replaced, a note for each, a fault for what cannot be."""
    work = _Work(dict(values))
    _mlx_lm_batches(work)
    _trl_batches(work)
    _lora_parameters(work)
    for key in list(work.rest):
        if rule := _rule_for(key, work.rest[key]):
            rule(work, key, work.rest.pop(key))
    for key in work.rest.keys() & work.options.keys():
        work.faults.append(f"{key} is given twice, once under another name")
    return {**work.options, **work.rest}, work.notes, work.faults


_Rule = Callable[[_Work, str, Any], None]


def _rule_for(key: str, value: Any) -> _Rule | None:
    """What translates the key; None for Twintune's own options and for what nobody knows."""
    if key == "adapter":
        return _axolotl_adapter if isinstance(value, str) and value in AXOLOTL_ADAPTERS else None
    if key in _RULES:
        return _RULES[key]
    tables = ((SWITCHES, _switch), (EXPLAINED, _explained), (NEEDLESS, _needless), (AGREED, _agreed), (SAME, _rename))
    return next((rule for table, rule in tables if key in table), None)


def _num_layers(work: _Work, key: str, value: Any) -> None:
    if str(value) == "-1":
        work.notes.append("num_layers -1 -> every layer, as here")
        return
    work.options["layers"] = f"last:{value}"
    work.notes.append(f"num_layers {value} -> layers last:{value}")


def _axolotl_adapter(work: _Work, key: str, value: Any) -> None:
    meant = AXOLOTL_ADAPTERS[value]
    work.options |= {name: meaning for name, meaning in meant.items() if "load_in_4bit" not in work.rest}
    work.notes.append(f"adapter: Axolotl's name of a method -> {meant or 'method lora, as here'}")


def _is_off(value: Any) -> bool:
    return str(value).lower() in ("false", "none", "no")


def _switch(work: _Work, key: str, value: Any) -> None:
    name, meaning = SWITCHES[key]
    if _is_off(value):
        work.notes.append(f"{key}: off, as it is here")
    else:
        work.options[name] = meaning
        work.notes.append(f"{key} -> {name} {meaning}")


def _explained(work: _Work, key: str, value: Any) -> None:
    if _is_off(value):
        work.notes.append(f"{key}: off, as it is here")
    else:
        work.faults.append(f"{key}: {EXPLAINED[key]}")


def _needless(work: _Work, key: str, value: Any) -> None:
    work.notes.append(f"{key}: not needed, {NEEDLESS[key]}")


def _agreed(work: _Work, key: str, value: Any) -> None:
    if value in AGREED[key]:
        work.notes.append(f"{key}: that is what Twintune does")
    elif key in ("optim", "optimizer") and value in SMALLER_ADAMW:
        work.notes.append(f"{key} {value} -> AdamW with its state in float32: that of an adapter is small")
    else:
        work.faults.append(f"{key}: {value!r} is not offered, only {AGREED[key][0]!r}")


def _max_steps(work: _Work, key: str, value: Any) -> None:
    if str(value) == "-1":
        work.notes.append("max_steps -1: the epochs count, as here without steps")
    else:
        _rename(work, key, value)


def _bf16(work: _Work, key: str, value: Any) -> None:
    work.options["precision"] = {"true": "bf16", "false": "fp32"}.get(str(value).lower(), "auto")
    work.notes.append(f"bf16 -> precision {work.options['precision']}")


def _torch_dtype(work: _Work, key: str, value: Any) -> None:
    if (name := str(value).removeprefix("torch.")) not in TYPES:
        work.faults.append(f"{key}: {value!r} is not offered, only bfloat16, float32 and auto")
        return
    work.options["precision"] = TYPES[name]
    work.notes.append(f"{key} -> precision {TYPES[name]}")


def _text_field(work: _Work, key: str, value: Any) -> None:
    if value != "text":
        work.options["field"] = {"text": value}
    work.notes.append(f"{key} -> field text={value}")


_RULES: dict[str, _Rule] = {
    "num_layers": _num_layers,
    "max_steps": _max_steps,
    "bf16": _bf16,
    "torch_dtype": _torch_dtype,
    "dataset_text_field": _text_field,
}


def _rename(work: _Work, key: str, value: Any) -> None:
    name = SAME[key]
    if name in work.options:
        work.faults.append(f"{key} means {name}, which is given already")
        return
    number = _number(value)
    if name == "schedule" and value == "constant_with_warmup":
        value = "constant"  # ours has the warm-up that `warmup` says
    elif name == "schedule" and value == "constant" and not _WARMUPS & {*work.options, *work.rest}:
        work.options["warmup"] = 0
        work.notes.append(f"{key} constant has no warm-up -> warmup 0")
    if key == "warmup_ratio" and number is not None and number >= 1:
        work.faults.append(f"warmup_ratio: must be below 1 (got {value!r})")
    elif key == "val_set_size" and number is not None and number >= 1:
        work.faults.append(f"val_set_size: Axolotl's count of rows; valid_share takes a share below 1 (got {value!r})")
    else:
        work.options[name] = value
        work.notes.append(f"{key} -> {name} {value}")


def _mlx_lm_batches(work: _Work) -> None:
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
    numbers = _whole_numbers(parts, work.faults)
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
        every = _number(rest.get(key)) if accumulate > 1 else None
        if every is not None and every >= 1:
            del rest[key]
            work.options[name] = max(1, int(every) // accumulate)
            notes.append(f"mlx_lm's {key} {every:g} micro-batches -> {name} {work.options[name]}")


def _trl_batches(work: _Work) -> None:
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
    if (numbers := _whole_numbers(parts, work.faults)) is None:
        return
    accumulate = numbers["gradient_accumulation_steps"]
    work.options["batch_size"] = numbers[name] * accumulate
    written = f"{name} {numbers[name]} x gradient_accumulation_steps {accumulate}"
    work.notes.append(f"{written} -> batch_size {work.options['batch_size']} rows a step")


def _lora_parameters(work: _Work) -> None:
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
    for key in nested.keys() - set(_LORA_PARAMETERS):
        faults.append(f"lora_parameters.{key}: unknown; mlx_lm has rank, scale, dropout, keys")
    if "rank" in nested and "rank" in rest:
        faults.append("rank is given twice, once under another name")
        return
    rank = _number(nested.get("rank", rest.get("rank", 8)))
    scale = _number(nested.get("scale", 20.0))
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


def _number(value: object) -> float | None:
    """A finite number, else None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole_numbers(values: dict[str, Any], faults: list[str]) -> dict[str, int] | None:
    numbers: dict[str, int] = {}
    for name, value in values.items():
        number = _number(value)
        if number is None or number < 1 or number != int(number):
            faults.append(f"{name}: must be a whole number from 1 up (got {value!r})")
        else:
            numbers[name] = int(number)
    return numbers if len(numbers) == len(values) else None


# Every key of other programs that is translated, explained or accepted.
KNOWN = {
    *(SAME.keys() | EXPLAINED.keys() | NEEDLESS.keys() | AGREED.keys() | SWITCHES.keys() | _RULES.keys()),
    *(key for family in FAMILIES for key in family if key != "batch_size"),
    *(f"lora_parameters.{name}" for name in _LORA_PARAMETERS),
}
