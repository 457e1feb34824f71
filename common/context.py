"""What every command gets from cli.py besides its own options."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from common.backend_package import Backends
from common.display import Display


@dataclass(frozen=True)
class Context:
    """The backends by name, the display, and the folder of the llama.cpp build to use (None: found or built once).

    end_training: where several processes train together, ends that and gives the backends of this one alone.
    """

    backends: Backends
    display: Display
    llama_cpp: str | None = None
    end_training: Callable[[], Backends] | None = None

    def after_training(self) -> "Context":
        """What export and verification compute is computed here alone. Nothing is trained with this one any longer."""
        return replace(self, backends=self.end_training(), end_training=None) if self.end_training else self
