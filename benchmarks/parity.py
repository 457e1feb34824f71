"""PyTorch and MLX on the tiny model of every family: the largest differences, into common/verify/parity_measured.json.

    python -m benchmarks.parity                  # some seconds a family
    python -m benchmarks.parity --only qwen3     # the others stay as they are

`doctor --parity FAMILY` computes the same. `attest` states it of a run's family, and docs/board.md shows it.
"""

import argparse
import importlib
import json

from benchmarks.commit import now
from common.models.admitted import versions
from common.verify.parity import BOUNDS, MEASURED, tiny_parity
from common.verify.tiny_models import TINY


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity")
    parser.add_argument("--only", nargs="+", choices=TINY, default=[*TINY], metavar="FAMILY")
    known, when = json.loads(MEASURED.read_text(encoding="utf-8")), now()
    for family in parser.parse_args().only:
        differences = tiny_parity(family, lambda name: importlib.import_module(f"{name}_backend"))
        known[family] = {"differences": differences, "versions": versions()} | when
        MEASURED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        within = all(value < BOUNDS[what] for what, value in differences.items())
        shown = ", ".join(f"{what} {value:.1e}" for what, value in differences.items())
        print(f"{family}: {shown}{'' if within else ': OUT OF BOUNDS'}", flush=True)


if __name__ == "__main__":
    main()
