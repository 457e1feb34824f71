"""A configuration of another program as one of Twintune's: each option with what it was, and all that is left out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.config_values import named, short, without_secrets
from common.errors import UserError, masked
from common.goals import Setting, comment, written
from common.migration_tools import NAMES, READERS, Migration, defaults
from common.option_translation import translate
from common.options import Options, by_flag
from common.other_configs import best_fitting, where
from common.other_scripts import Unread
from common.other_trainings import ANOTHER_TRAINING, ONLY_SFT, asks_for_another

# Keys that mean the same only together: where one is given, the default of the others is not.
_TOGETHER = (
    {"num_train_epochs", "max_steps", "num_epochs"},
    {"warmup_steps", "warmup_ratio", "lr_schedule"},
    {"max_length", "max_seq_length", "max_seq_len"},
    {"seed", "random_state"},
    {"lora_r", "r", "lora_rank"},
    {"num_layers", "lora_layers"},
    {"batch_size", "micro_batch_size"},
)
_NOT_IN_A_FILE = ("config", "resume", "llama_cpp")
_OF_ADAPTERS = ("rank", "alpha", "dropout", "targets", "layers", "rslora", "lora_plus")
_OTHERS_CHECKPOINT = "a checkpoint of the other program; give a finished adapter of it by adapter"


def migrated(path: Path, values: dict[str, Any], tool: str, unread: Unread) -> str:
    """The text of a file for --config that trains as the other program's file does, as far as that can be.

    unread: keys whose values could not be read. Raises UserError where nothing of it can be an option.
    """
    left = [line for _, line in unread]
    given = {str(key).replace("-", "_"): value for key, value in without_secrets(values, "", left).items()}
    work = Migration(given, frozenset(given), frozenset(key for key, _ in unread if key), left=left)
    if (key := asks_for_another(tool, given)) is not None:
        raise UserError(f"{where(path, key)}: {_told(key, given[key])} is {ANOTHER_TRAINING}.", ONLY_SFT)
    if other := _meant(path, work, tool):
        work.beware.append(other)
    _one_of_two(work)
    _fill(work, tool)
    READERS[tool](work, path)
    _common(work, tool)
    options, notes, faults = translate(work.values)
    taken = {setting.name for setting in work.settings}
    for name in [name for name in options if name not in by_flag() or name in _NOT_IN_A_FILE]:
        work.left.append(f"{named(name, options.pop(name))}: not known here; look whether it matters")
    for name, value in options.items():
        if name not in taken and value is not None:
            why = [note for note in notes if f"-> {name} " in f"{note} "]
            work.put(name, value, "; ".join(why) or _as_it_is(name, work))
    meant = [f"-> {name} " for name in options]
    needless = [note for note in notes if not any(part in f"{note} " for part in meant)]
    settings = _accepted(work, path, tool)
    return _text(path, tool, settings, work, [*work.left, *faults], needless)


def _told(key: str, value: Any) -> str:
    return f"{key} {value!r}" if isinstance(value, str) and value.isidentifier() else key


def _as_it_is(name: str, work: Migration) -> str:
    if name in work.given:
        return f"{name}: taken as it is"
    if name in ("rank", "dropout") and "lora_parameters" in work.given:
        return f"lora_parameters.{name}: taken as it is"
    if work.computed:
        return f"{name}: not read in the script; the other program's default"
    return f"{name}: not in the file; the other program's default"


def _one_of_two(work: Migration) -> None:
    """Of two keys that exclude each other, the one that counts in transformers."""
    values = work.values
    if _above_0(values.get("max_steps")):
        for key in ("num_train_epochs", "num_epochs"):
            work.drop(key, "max_steps counts, as it does there")
    if "warmup_steps" in values and "warmup_ratio" in values:
        work.drop("warmup_ratio" if _above_0(values["warmup_steps"]) else "warmup_steps", "the other one counts there")


def _above_0(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _fill(work: Migration, tool: str) -> None:
    """Add the other program's defaults for what the file leaves out, and say so."""
    for key, value in defaults(tool, work.values).items():
        group = next((group for group in _TOGETHER if key in group), {key})
        if not group & work.values.keys():
            work.values[key] = value
            computed = ", ".join(sorted(work.computed & {*group, "**"}))
            default = f"{key} {short(value)} is the default of {NAMES[tool]}: set it yourself"
            asked = f"{key} is not in the file: {NAMES[tool]} takes {short(value)}, and so does this file"
            work.beware.append(f"{computed}: computed in the script; {default}" if computed else asked)


def _common(work: Migration, tool: str) -> None:
    """What every program does otherwise than Twintune, and keys of which a training here makes nothing."""
    for key in ("resume_from_checkpoint", "lora_model_dir", "adapter_name_or_path", "resume_adapter_file"):
        if work.values.get(key):
            work.drop(key, _OTHERS_CHECKPOINT)
        else:
            work.values.pop(key, None)
    for key in ("deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters"):
        work.drop(key, "several devices train with devices: all, in every setting to the same result")
    for key in (
        "max_samples",
        "max_train_samples",
        "eval_dataset",
        "dataset_config",
        "dataset_train_split",
    ):
        work.drop(key, "name the rows as a file or folder under data")
    for key in (
        "special_tokens",
        "tokens",
        "added_tokens_overrides",
        "resize_vocab",
        "modules_to_save",
        "lora_modules_to_save",
    ):
        if work.values.get(key):
            work.drop(key, "embeddings are not trained with LoRA here; without it the result is another")
    if work.values.get("hub_model_id") and not work.values.get("push_to_hub"):
        work.drop("hub_model_id", "nothing is uploaded unless push says so")
    for key, value in list(work.values.items()):
        if value is None or (key.startswith("wandb_") and not value):
            del work.values[key]
    work.put("recipe", "fixed", "the values of the other program; auto would choose those that are missing")
    work.put("patience", 0, f"{NAMES[tool]} goes through all its steps; Twintune would stop when validation gets worse")
    if tool != "axolotl":
        work.put(
            "overflow", "truncate", "rows that are too long lose their end there; here the default leaves them out"
        )
    work.beware.append("the seed draws other rows first: curves of the two programs are alike, not equal")


def _accepted(work: Migration, path: Path, tool: str) -> list[Setting]:
    """The settings without those whose values Twintune does not take, which are left out. Raises UserError."""
    settings = {setting.name: setting for setting in reversed(work.settings)}
    if "method" in settings and settings["method"].value == "full":
        for name in [name for name in _OF_ADAPTERS if name in settings]:
            work.left.append(f"{name} {short(settings.pop(name).value)}: method full has no adapter")
        if "precision" in settings and settings["precision"].value == "bf16":
            del settings["precision"]
            work.left.append("precision bf16: with method full weights are kept in float32, so that no update is lost")
    while True:
        try:
            Options.model_validate({name: setting.value for name, setting in settings.items()})
            order = list(by_flag())
            return sorted(settings.values(), key=lambda setting: order.index(setting.name))
        except ValidationError as error:
            wrong = {str(item["loc"][0]): item["msg"] for item in error.errors() if item["loc"]}
            if not wrong:
                fault = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise _at_odds(fault, list(settings.values()), work, path, tool) from None
            for name, why in wrong.items():
                value = short(settings.pop(name).value)
                work.left.append(f"{name} {value}: not taken: {why.removeprefix('Value error, ')}")


def _at_odds(fault: str, settings: list[Setting], work: Migration, path: Path, tool: str) -> UserError:
    """For options that exclude each other: where each of them comes from, and which program the file may be for."""
    lines = [f"{path}: {fault}."]
    for setting in settings:
        if re.search(rf"\b{setting.name}\b", fault):
            keys = re.findall(r"\w+", setting.why)
            key = next((key for key in keys if key in work.given), None)
            place = where(path, key) if key else path
            lines.append(f"{place}: {setting.name} {short(setting.value)}: {masked(setting.why)}")
    return UserError("\n".join(lines), _meant(path, work, tool) or "Change one of these in the file.")


def _meant(path: Path, work: Migration, tool: str) -> str:
    """What to do where the file's keys are those of another program; else empty."""
    best = best_fitting(path, work.given)
    told = len(best) == 1 and best != [tool]
    return f"The file's keys are those of {NAMES[best[0]]}: give --from {best[0]}." if told else ""


def _text(path: Path, tool: str, settings: list[Setting], work: Migration, left: list[str], needless: list[str]) -> str:
    head = [f"From {path.name}, a configuration of {NAMES[tool]}, by `migrate`. Each option stands below what it was."]
    parts = ["".join(map(comment, head))]
    parts += [written(replace(setting, why=masked(setting.why))) for setting in settings]
    if not any(setting.name == "data" for setting in settings):
        parts.append(comment("data: the file has no rows that can be found; add a file or a folder here, or --data"))
    for title, lines in (
        ("Look at these before you train:", work.beware),
        ("Left out, as there is no counterpart:", left),
        ("Not needed here:", needless),
    ):
        if lines:
            parts.append(comment(title) + "".join(comment(masked(f"- {line}")) for line in dict.fromkeys(lines)))
    return "\n".join(parts)
