"""Count the built-in example: answers that follow Pip's form, before and after tuning, as llama.cpp gives them.

    python -m examples.score RUN
    python -m examples.score RUN --at-least 50      exits with status 1 where fewer follow it after tuning
    python -m examples.score --trained OPTIONS      the run that `train OPTIONS` has just made

The answers and their faults are kept in RUN/example.jsonl.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from common.commands.arguments import read_flags
from common.context import Context
from common.data.load import read_rows
from common.display import Display
from common.errors import UserError
from common.inference.chat_models import choose, llama_of
from common.llama_cpp.convert import base_gguf
from common.llama_cpp.server import Server, ServerOptions
from common.models.load import base_of
from common.option_sources import load_options
from common.options import EXAMPLE
from common.run_record import Run
from examples.check import check, nearest_train_row

_ANSWER_TOKENS = 64  # the longest right answer has fewer
_SHOWN = 10


def main(words: list[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser("examples.score", description="Count the built-in example's answers.")
    parser.add_argument("run", type=Path, nargs="?", help="run folder; the newest in runs/ unless given")
    parser.add_argument("--at-least", type=int, default=0, help="answers that must follow the form after tuning")
    parser.add_argument("--llama-cpp", help="folder of a llama.cpp build to use")
    parser.add_argument(
        "--trained", nargs=argparse.REMAINDER, default=[], help="the options of `train`, which name a run"
    )
    given = parser.parse_args(words)
    options = load_options(read_flags(given.trained))[0]
    folder = given.run or options.resume or options.output or _newest()
    context = Context(_backend, Display(options.mode()), given.llama_cpp or options.llama_cpp)
    counts = score(Run(Path(folder)), context)
    return int(counts["after"] < given.at_least)


def _is_example(data: object) -> bool:
    """data: as a run's record has it, a list of sources; in older ones the source alone."""
    sources = data if isinstance(data, list) else [data]
    return [Path(str(source)).resolve() for source in sources] == [EXAMPLE.resolve()]


def score(run: Run, context: Context) -> dict[str, int]:
    """`{"total", "before", "after"}`, printed too; all 0 where the run is not of the example, or has no GGUF."""
    record, display = run.require_complete(), context.display
    if not _is_example(record.options.get("data")) or not record.export.gguf:
        what = "has no GGUF" if not record.export.gguf else "is not of the built-in example"
        display.say(f"Nothing to count: {run} {what}.")
        return {"total": 0, "before": 0, "after": 0}
    target = choose(run.path, "gguf", None)
    llama = llama_of(target, context)
    base = base_gguf(base_of(run, display).path, record.model_hash, target.quant, llama, display)
    prompts = [[dict(message) for message in row.messages[:-1]] for row in read_rows(EXAMPLE / "test.jsonl")]
    answers = {}
    for when, gguf in (("before", base), ("after", target.path)):
        with display.stage(f"answers {when} tuning") as progress, Server(llama, gguf, ServerOptions(512)) as server:
            answers[when] = server.chat_many(prompts, _ANSWER_TOKENS, progress, enable_thinking=False)
    lines = _checked(prompts, answers)
    out = run.path / "example.jsonl"
    out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    counts = {"total": len(lines)} | {when: sum(not line[f"faults_{when}"] for line in lines) for when in answers}
    _show(lines, counts, target.quant, display)
    display.say(f"All {len(lines)} answers, faults and nearest train rows: {out}")
    return counts


def _checked(prompts: list[list[dict[str, Any]]], answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Of each test row its prompt, answers, their faults, and the training prompt that is most like it."""
    tests, trained = (
        [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]
        for name in ("test.jsonl", "train.jsonl")
    )
    lines = []
    for number, prompt in enumerate(prompts):
        index, similarity = nearest_train_row(tests[number], trained)
        line: dict[str, Any] = {"prompt": prompt[-1]["content"]}
        for when, given in answers.items():
            line[when] = given[number]
            line[f"faults_{when}"] = check(prompt, given[number])
        line["nearest_train_row"] = trained[index]["messages"][-2]["content"]
        line["similarity"] = round(similarity, 3)
        lines.append(line)
    return lines


def _show(lines: list[dict[str, Any]], counts: dict[str, int], quant: str, display: Display) -> None:
    every = max(1, len(lines) // _SHOWN)
    display.table(
        f"Ten raw answers of the tuned {quant} GGUF, and the train prompt nearest to each test prompt",
        ["prompt", "answer", "form", "nearest train prompt", "similarity"],
        [
            [
                line["prompt"],
                line["after"],
                "; ".join(line["faults_after"]) or "ok",
                line["nearest_train_row"],
                f"{line['similarity']:.2f}",
            ]
            for line in lines[::every][:_SHOWN]
        ],
    )
    total = counts["total"]
    display.table(
        f"Test answers that follow the form ({quant} GGUF in llama.cpp)",
        ["", "follow", "of", "share"],
        [[when, str(counts[when]), str(total), f"{counts[when] / total:.0%}"] for when in ("before", "after")],
    )


def _newest() -> Path:
    records = sorted(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise UserError("There is no run in runs/.", "Give the run folder.")
    return records[-1].parent


def _backend(name: str) -> Any:
    return importlib.import_module(f"{name}_backend")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error.what}\nfix:   {error.fix}")
