"""What every command gets from cli.py besides its own options."""

from dataclasses import dataclass, replace

from common.backend_package import Backends
from common.display import Display


@dataclass(frozen=True)
class Context:
    """The backends by name, the display, and the folder of the llama.cpp build to use (None: found or built once).

    local: the backends of this process alone, where `backends` are those of several that train together.
    """

    backends: Backends
    display: Display
    llama_cpp: str | None = None
    local: Backends | None = None

    def after_training(self) -> "Context":
        """What export and verification compute is computed here alone."""
        return replace(self, backends=self.local or self.backends, local=None)
