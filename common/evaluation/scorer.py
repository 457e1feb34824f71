"""A Python file of the user's that scores answers. It is code: only the command line may name it."""

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib.machinery import SourceFileLoader
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from common.errors import UserError, first_line
from common.evaluation.metrics import Metric
from common.evaluation.rows import JudgedRow

_FORM = "It must define score(row, answer), which returns a number, or True or False."


def scorer(path: Path) -> Metric:
    """The metric of the file's `score(row, answer)`. Raises UserError where it cannot be loaded, or has none.

    row: the row as its file has it. Scoring raises UserError that names the row where `score` fails.
    """
    function, where = _loaded(path), f"--scorer {path}"

    def statistics(row: JudgedRow, answer: str) -> Sequence[float]:
        given = deepcopy(row.raw)
        try:
            found = function(given, answer)
        except Exception as error:
            raise UserError(
                f"{where}: score() failed on {row.source}: {_described(error, path)}",
                "Correct it and give the same command again: the answers are kept, and none is asked for again.",
            ) from None
        if not isinstance(found, Real | np.bool_) or not math.isfinite(found):
            raise UserError(f"{where}: score() returned {found!r} for {row.source}, which is not a number.", _FORM)
        return float(found), 1.0

    return Metric("score", False, statistics)


def _loaded(path: Path) -> Callable[[Any, str], Any]:
    where = f"--scorer {path}"
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{where}: no such Python file.", f"Give a file that ends in .py. {_FORM}")
    module = ModuleType(f"scorer_{path.stem}")
    sys.modules[module.__name__] = module  # dataclasses look there
    loader = SourceFileLoader(module.__name__, str(path))
    try:
        loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{where} cannot be loaded: {_described(error, path)}", f"Correct it. {_FORM}") from None
    function = getattr(module, "score", None)
    if not callable(function):
        raise UserError(f"{where} has no function score.", _FORM)
    return function  # type: ignore[no-any-return]


def _described(error: Exception, path: Path) -> str:
    """`line 7: ZeroDivisionError: division by zero`; the line is the last in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return (f"line {line}: " if line else "") + f"{type(error).__name__}: {first_line(error)}"
