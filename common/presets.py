"""The presets in `configs/`, by name, and the configs of the models that they name: nothing of it needs the hub."""

import difflib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError

PRESETS = Path(str(resources.files("configs")))
_FIX = "Install Twintune again."


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The YAML file of a preset. Raises UserError naming those of similar names."""
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        similar = f"; similar: {', '.join(near)}" if near else ""
        raise UserError(
            f"--config {name}: there is no such file, and no preset of this name{similar}.",
            "Give a YAML file, or one of the names that `python cli.py init --list` shows.",
        )
    return PRESETS / f"{name}.yaml"


def preset_head(name: str) -> dict[str, str]:
    """What the comments at the top of a preset say: `about`, and `memory` where it is estimated."""
    lines = preset_file(name).read_text(encoding="utf-8").splitlines()
    memory = next((line for line in lines if line.startswith("# memory: ")), "")
    return {"about": lines[0].lstrip("# "), "memory": memory.removeprefix("# memory: ")}


@cache
def published_configs() -> dict[str, dict[str, Any]]:
    """Of models on the hub, by name, what matters of config.json of the language model; do not change them."""
    return read_json(PRESETS / "models.json", _FIX)
