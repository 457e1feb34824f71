"""docs/board.md: which family was checked on which backend, by what, when and at which commit.

    python -m benchmarks.board        # writes the page; a test holds that it is fresh

It measures nothing. Its figures are those of `python -m benchmarks.parity`, `python -m benchmarks.verified --record`
and `python -m benchmarks.architectures`, which lie in the repository; what none of them has measured is not recorded.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

from common.models.families import is_known
from common.verify.parity import BOUNDS, MEASURED, TINY_STEPS
from common.verify.tiny_models import TINY

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "board.md"
NONE = "not recorded"
_BACKENDS = {"torch": "PyTorch", "mlx": "MLX"}
_FILES = ("bf16 GGUF", "Q8_0", "Q4_K_M")
_TRIED = ("logits", "step losses", "adapters", "fused, torch", "fused, mlx")


def board() -> str:
    """The page."""
    parity, verified = (
        _read(MEASURED),
        {(one["family"], one["backend"]): one for one in _read(RESULTS / "verified.json")},
    )
    tried = _read(RESULTS / "architectures.json")
    bounds = ", ".join(f"{what} {bound:.0e}" for what, bound in BOUNDS.items())
    parts = [
        "# Board",
        "What was checked, of which model family, on which backend, when and at which commit. `python -m "
        "benchmarks.board` writes this page from results that lie in the repository.",
        "## Families",
        "Each is a tiny random model, its constants away from their defaults, on CPUs.",
        _table(["family", "PyTorch and MLX", "GGUF after PyTorch", "GGUF after MLX"], _summary(parity, verified)),
        "## PyTorch and MLX side by side",
        f"The largest differences of the first row's logits and, after {TINY_STEPS} training steps in float32, of "
        f"losses and adapters. The bounds: {bounds}. `python -m benchmarks.parity` measures them.",
        _table(["family", *BOUNDS, "date", "commit"], (_parity(family, parity.get(family)) for family in TINY)),
        "## GGUF",
        "The KL divergence of each file from the one before, in llama.cpp. `python -m benchmarks.verified --record` "
        "trains, exports and [verifies](verify.md) each model.",
        _table(
            ["family", "backend", "verdict", *_FILES, "date", "commit"],
            (_verified(family, name, verified.get((family, name))) for family in TINY for name in _BACKENDS),
        ),
        "## Other architectures",
        "Those that `--try-model` computes by the libraries' own layers: what its check found on a tiny model, by "
        "`python -m benchmarks.architectures`. Supported families are left out.",
        _table(
            ["architecture", "admitted", *_TRIED, "date", "commit"],
            (
                _tried(name, one)
                for name, one in tried.items()
                if not is_known({"architectures": [one["architecture"]]})
            ),
        ),
    ]
    return "\n\n".join(part if part.startswith("|") else fill(part, 120) for part in parts) + "\n"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _summary(parity: dict[str, Any], verified: dict[tuple[str, str], Any]) -> Iterable[list[str]]:
    for family in TINY:
        one = parity.get(family)
        within = one and all(value < BOUNDS[what] for what, value in one["differences"].items())
        cells = [f"{'within' if within else 'OUT OF'} bounds, {_when(one)}" if one else NONE]
        for backend in _BACKENDS:
            found = verified.get((family, backend))
            cells.append(f"{found['verdict']}, {_when(found)}" if found else NONE)
        yield [family, *cells]


def _when(one: dict[str, str]) -> str:
    return f"{one['date']}, {one['commit']}"


def _parity(family: str, one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return [family, *[NONE] * (len(BOUNDS) + 2)]
    return [family, *(f"{one['differences'][what]:.1e}" for what in BOUNDS), one["date"], one["commit"]]


def _verified(family: str, backend: str, one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return [family, _BACKENDS[backend], *[NONE] * (len(_FILES) + 3)]
    found = (one["checks"].get(file, NONE) for file in _FILES)
    return [family, _BACKENDS[backend], one["verdict"], *found, one["date"], one["commit"]]


def _tried(name: str, one: dict[str, Any]) -> list[str]:
    checks = one.get("checks", {})
    found = (checks.get(what, "-") for what in _TRIED)
    return [name, "yes" if one["admitted"] else "no", *found, one["date"], one["commit"]]


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    PAGE.write_text(board(), encoding="utf-8")


if __name__ == "__main__":
    main()
