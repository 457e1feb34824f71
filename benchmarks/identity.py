"""The classic very small tune, without any option: 91 rows that say who a model is, then 20 other phrasings.

    python -m benchmarks.identity --from DIR                    # SmolLM2-135M
    python -m benchmarks.identity --from DIR --model gemma3     # Gemma-3-270M, a base model

DIR/identity/identity.json is LLaMA-Factory's (Apache-2.0); its placeholders are filled in. The 20 phrasings of
identity.txt stand in no row, and were written before the first run. An answer counts that says the name.
The smallest quant answers that `verify` finds sound.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.peer_runs import ROOT
from benchmarks.regret import MODELS
from benchmarks.regret_data import NAME, identity_rows

LARGER = ("Q5_K_M", "Q6_K", "Q8_0")
PHRASINGS = Path(__file__).with_suffix(".txt")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identity")
    parser.add_argument("--from", type=Path, dest="public", metavar="DIR", required=True)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the data and the run")
    given = parser.parse_args()
    folder = given.output / f"identity-{given.model}"
    folder.mkdir(parents=True)
    data, run, answers = folder / "identity.json", folder / "run", folder / "answers.jsonl"
    rows = identity_rows(given.public)
    data.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    asked = PHRASINGS.read_text(encoding="utf-8").splitlines()
    if known := {row["instruction"] for row in rows} & {*asked}:
        raise SystemExit(f"phrasings that stand in rows: {known}")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in MODELS[given.model].items()]
    _twintune("train", *options, "--data", data, "--output", run)
    quant = _sound_quant(run)
    asking = ("--quant", quant, "--prompts", PHRASINGS, "--out", answers, "--temperature", 0, "--max-tokens", 64)
    _twintune("generate", run, *asking)
    count = 0
    for line in answers.read_text(encoding="utf-8").splitlines():
        *_, question, answer = json.loads(line)["messages"]
        count += (named := NAME in answer["content"])
        print(f"{'yes' if named else 'NO '} {question['content']} -> {answer['content']}")
    print(f"{count} of {len(asked)} answers of {quant} say the name")


def _sound_quant(run: Path) -> str:
    """The smallest quant that `verify` finds sound; larger ones are made where the one that `train` makes is not."""
    for quants in ([], ["--quant", *LARGER]):
        if quants:
            _twintune("fuse", run, *quants)
        checks = json.loads((run / "run.json").read_text())["verify"]["checks"]
        found = {check["name"]: check["state"] for check in checks}
        for quant in ("Q4_K_M", *LARGER):
            print(f"{quant}: {found.get(quant, 'not made')}")
            if found.get(quant) == "ok":
                return quant
    raise SystemExit("no quant is sound")


def _twintune(*words: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *map(str, words)], check=True)


if __name__ == "__main__":
    main()
