"""Contexts as cli.py makes them; in place of a backend's own creation a test may hand in an object."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from common.context import Context
from common.display import Display, Mode


def context(mode: Mode = "quiet", create: Callable[[], Any] | None = None, llama_cpp: str | None = None) -> Context:
    """create: makes the backend whatever its name; the packages' own create() unless given."""

    def package(name: str) -> Any:
        found = importlib.import_module(f"{name}_backend")
        return found if create is None else SimpleNamespace(**(vars(found) | {"create": create}))

    return Context(package, Display(mode), llama_cpp)
