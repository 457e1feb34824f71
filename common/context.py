"""What every command gets from cli.py besides its own options."""

from dataclasses import dataclass

from common.backend_package import Backends
from common.display import Display


@dataclass(frozen=True)
class Context:
    """The backends by name, the display, and the folder of the llama.cpp build to use (None: found or built once)."""

    backends: Backends
    display: Display
    llama_cpp: str | None = None
