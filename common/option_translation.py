"""Options of mlx_lm.lora, TRL and Axolotl: translated where they mean the same, explained where they do not."""

from collections.abc import Callable
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
    TRACKED,
    TYPES,
)
from common.option_families import (
    LORA_PARAMETERS,
    Work,
    is_off,
    lora_parameters,
    mlx_lm_batches,
    number,
    trackers,
    trl_batches,
)

_WARMUPS = {"warmup", "warmup_steps", "warmup_ratio"}


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """`(options, notes, faults)`: foreign spellings replaced, a note for each, a fault for what cannot be."""
    work = Work(dict(values))
    mlx_lm_batches(work)
    trl_batches(work)
    lora_parameters(work)
    trackers(work)
    for key in list(work.rest):
        if rule := _rule_for(key, work.rest[key]):
            rule(work, key, work.rest.pop(key))
    for key in work.rest.keys() & work.options.keys():
        work.faults.append(f"{key} is given twice, once under another name")
    return {**work.options, **work.rest}, work.notes, work.faults


_Rule = Callable[[Work, str, Any], None]


def _rule_for(key: str, value: Any) -> _Rule | None:
    """What translates the key; None for Twintune's own options and for what nobody knows."""
    if key == "adapter":
        return _axolotl_adapter if isinstance(value, str) and value in AXOLOTL_ADAPTERS else None
    if key in _RULES:
        return _RULES[key]
    tables = ((SWITCHES, _switch), (EXPLAINED, _explained), (NEEDLESS, _needless), (AGREED, _agreed), (SAME, _rename))
    return next((rule for table, rule in tables if key in table), None)


def _num_layers(work: Work, key: str, value: Any) -> None:
    if str(value) == "-1":
        work.notes.append("num_layers -1 -> every layer, as here")
        return
    work.options["layers"] = f"last:{value}"
    work.notes.append(f"num_layers {value} -> layers last:{value}")


def _axolotl_adapter(work: Work, key: str, value: Any) -> None:
    meant = AXOLOTL_ADAPTERS[value]
    work.options |= {name: meaning for name, meaning in meant.items() if "load_in_4bit" not in work.rest}
    became = ", ".join(f"{name} {value}" for name, value in meant.items()) or "method lora, as here"
    work.notes.append(f"adapter: Axolotl's name of a method -> {became}")


def _switch(work: Work, key: str, value: Any) -> None:
    name, meaning = SWITCHES[key]
    if is_off(value):
        work.notes.append(f"{key}: off, as it is here")
    else:
        work.options[name] = meaning
        work.notes.append(f"{key} -> {name} {meaning}")


def _explained(work: Work, key: str, value: Any) -> None:
    if is_off(value):
        work.notes.append(f"{key}: off, as it is here")
    else:
        work.faults.append(f"{key}: {EXPLAINED[key]}")


def _needless(work: Work, key: str, value: Any) -> None:
    work.notes.append(f"{key}: not needed, {NEEDLESS[key]}")


def _agreed(work: Work, key: str, value: Any) -> None:
    if value in AGREED[key]:
        work.notes.append(f"{key}: that is what Twintune does")
    elif key in ("optim", "optimizer") and value in SMALLER_ADAMW:
        work.notes.append(f"{key} {value} -> AdamW with its state in float32: that of an adapter is small")
    else:
        work.faults.append(f"{key}: {value!r} is not offered, only {AGREED[key][0]!r}")


def _max_steps(work: Work, key: str, value: Any) -> None:
    if str(value) == "-1":
        work.notes.append("max_steps -1: the epochs count, as here without steps")
    else:
        _rename(work, key, value)


def _bf16(work: Work, key: str, value: Any) -> None:
    work.options["precision"] = {"true": "bf16", "false": "fp32"}.get(str(value).lower(), "auto")
    work.notes.append(f"bf16 -> precision {work.options['precision']}")


def _torch_dtype(work: Work, key: str, value: Any) -> None:
    if (name := str(value).removeprefix("torch.")) not in TYPES:
        work.faults.append(f"{key}: {value!r} is not offered, only bfloat16, float32 and auto")
        return
    work.options["precision"] = TYPES[name]
    work.notes.append(f"{key} -> precision {TYPES[name]}")


def _text_field(work: Work, key: str, value: Any) -> None:
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


def _rename(work: Work, key: str, value: Any) -> None:
    name = SAME[key]
    if name in work.options:
        work.faults.append(f"{key} means {name}, which is given already")
        return
    amount = number(value)
    if name == "schedule" and value == "constant_with_warmup":
        value = "constant"  # ours has the warm-up that `warmup` says
    elif name == "schedule" and value == "constant" and not _WARMUPS & {*work.options, *work.rest}:
        work.options["warmup"] = 0
        work.notes.append(f"{key} constant has no warm-up -> warmup 0")
    if key == "warmup_ratio" and amount is not None and amount >= 1:
        work.faults.append(f"warmup_ratio: must be below 1 (got {value!r})")
    elif key == "val_set_size" and amount is not None and amount >= 1:
        work.faults.append(f"val_set_size: Axolotl's count of rows; valid_share takes a share below 1 (got {value!r})")
    else:
        work.options[name] = value
        work.notes.append(f"{key} -> {name} {value}")


# Every key of other programs that is translated, explained or accepted.
KNOWN = {
    *(SAME.keys() | EXPLAINED.keys() | NEEDLESS.keys() | AGREED.keys() | SWITCHES.keys() | _RULES.keys()),
    *("report_to", *TRACKED),
    *(key for family in FAMILIES for key in family if key != "batch_size"),
    *(f"lora_parameters.{name}" for name in LORA_PARAMETERS),
}
