"""JSON as the standard has it: Python's own writer puts out NaN and Infinity, which no other reader takes."""

import json
import math
from typing import Any


def dumps(content: Any, indent: int | None = None) -> str:
    """`content` as JSON text; null for a number that is not finite."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
