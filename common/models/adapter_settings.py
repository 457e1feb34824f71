"""What an adapter's config may say: a stranger's numbers are finite, and its patterns end."""

import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError

_LARGEST = 1e30  # of an alpha or a scale: the products with it stay finite in float32
_PATTERN_SECONDS = 5.0  # for all patterns of an adapter: a stranger's expression can be made to take forever
# Compiling one cannot be stopped: its time grows with its length times the product of its repeats.
_PATTERN_CHARACTERS = 1000
_PATTERN_COST = 20_000
_REPEAT = re.compile(r"\{([\d,\s]*)|\+")
_VERBOSE = re.compile(r"\(\?[\w-]*x")  # such a pattern could hide repeats between comments
# PEFT settings that change what the same weights compute: a file that sets one is refused.
_PEFT_OTHER = (
    *("loftq_config", "lora_ga_config", "eva_config", "corda_config", "velora_config", "monteclora_config"),
    *("modules_to_save", "trainable_token_indices", "layer_replication", "megatron_config", "lora_bias"),
    *("fan_in_fan_out", "use_qalora", "alora_invocation_tokens"),
)


def check_peft_settings(where: Path, config: dict[str, Any]) -> None:
    """Raises UserError for a setting of PEFT's that Twintune does not compute."""
    if strange := [key for key in _PEFT_OTHER if config.get(key)]:
        raise refused(where, f"{strange[0]} is set")
    if (start := config.get("init_lora_weights", True)) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise refused(where, f"its init_lora_weights is {start}, which changes the base model's own weights")
    if config.get("peft_type", "LORA") != "LORA":
        raise refused(where, f"its peft_type is {config['peft_type']}, not LORA")
    if config.get("bias", "none") != "none":
        raise refused(where, f"biases were trained (bias: {config['bias']})")


def by_pattern(where: Path, key: str, config: dict[str, Any], names: Iterable[str], otherwise: Any) -> dict[str, Any]:
    """For each name the value of the first pattern that matches its end, as a regular expression: PEFT's own rule."""
    names, given = [*names], config.get(key)
    if isinstance(given, dict) and {*given} <= {*names}:  # as Twintune writes them: names of modules, one of each
        return {name: given.get(name, otherwise) for name in names}
    import regex  # unlike Python's own, it can be stopped

    end = time.monotonic() + _PATTERN_SECONDS
    try:
        given = {rf"(.*\.)?({pattern})$": value for pattern, value in (config.get(key) or {}).items()}
        patterns = []
        for pattern, value in given.items():
            if _costly(pattern) or time.monotonic() > end:
                raise TimeoutError(f"{pattern[:60]!r} would take too long to compile")
            re.compile(pattern)  # what Python's own does not take, PEFT does not either
            patterns.append((regex.compile(pattern), value))
        return {
            name: next((v for p, v in patterns if p.match(name, timeout=max(0.01, end - time.monotonic()))), otherwise)
            for name in names
        }
    except (AttributeError, re.error, regex.error, RecursionError, OverflowError, TimeoutError) as error:
        raise refused(where, f"its {key} cannot be used ({error})") from None


def _costly(pattern: str) -> bool:
    """Whether compiling the pattern could take seconds or much memory. regex writes `x+` as `xx*`: it counts twice."""
    if len(pattern) > _PATTERN_CHARACTERS or _VERBOSE.search(pattern):
        return True
    repeats = ([int(n) for n in re.findall(r"\d+", found[1] or "2")] for found in _REPEAT.finditer(pattern))
    return len(pattern) * math.prod(max([1, *counts]) for counts in repeats) > _PATTERN_COST


def number(where: Path, what: str, value: Any) -> float:
    """Raises UserError for text, NaN, or what is too large to compute with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise refused(where, f"its {what} is {value!r}")
    return float(value)


def dropout_of(where: Path, value: Any) -> float:
    """Raises UserError for what is not a share of 1."""
    share = number(where, "dropout", value)
    if not 0 <= share < 1:
        raise refused(where, f"its dropout is {share:g}")
    return share


def refused(where: Path, why: str) -> UserError:
    return UserError(f"{where}: this adapter cannot be read: {why}.", "Give a LoRA or DoRA adapter of linear layers.")
