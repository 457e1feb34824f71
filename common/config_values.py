"""Values of another program's file as they may be shown: without secrets, and short."""

import re
from typing import Any

from common.errors import masked

KEPT = "keys stay in the environment"
# A key whose value is a secret. A tokenizer's tokens are none, nor is the name of a column or of a module.
_SECRET = re.compile(
    r"secret|passw|webhook|credential|(?:api|access|private)_?key"
    r"|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!image_)token$"
    r"|^key$|(?<!query)(?<!thinking)(?<!prompt)(?<!messages)(?<!text)(?<!state)_keys?$"
)
_NEW_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


def is_secret(key: str) -> bool:
    return bool(_SECRET.search(_NEW_WORD.sub("_", key).lower().replace("-", "_")))


def without_secrets(value: Any, name: str, left: list[str]) -> Any:
    """`value` without the secret keys in its mappings, a line for each in `left`. name: the key that has the value."""
    if isinstance(value, list | tuple):
        return [without_secrets(part, name, left) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, part in value.items():
        inner = f"{name}.{key}" if name else str(key)
        if is_secret(str(key)):
            left.append(f"{inner}: {KEPT}")
        else:
            kept[key] = without_secrets(part, inner, left)
    return kept


def named(key: str, value: Any) -> str:
    """A key that nobody knows, with its value only where that is no text and has no parts: these may be a secret."""
    return f"{key} {value!r}" if plain(value) else key


def plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)


def short(value: Any) -> str:
    text = masked(value if isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
