"""The built-in example's last table: answers that follow the form, before and after, as llama.cpp gives them."""

import json
from pathlib import Path
from typing import Any

from common.cache import cache_folder, cache_lock
from common.config import ROOT
from common.gguf import convert, quantize
from common.llamacpp import LlamaCpp
from common.progress import Display
from common.record import read_run
from common.server import Server
from common.sources import read_rows

FOLDER = ROOT / "examples" / "data"
_ANSWER_TOKENS = 64  # the longest right answer has fewer
_SHOWN = 10


def is_example(data: str | None) -> bool:
    return data is not None and Path(data).resolve() == FOLDER


def score(run: Path, base: Path, report: dict[str, Any], llama: LlamaCpp, display: Display) -> dict[str, int]:
    """Ask base and tuned GGUF of the same type the test rows' prompts, check, print; details in `example.jsonl`.

    report: the tuned one's, of run.json.
    """
    quant = report["quant"]
    from examples.check import check, nearest_train_row

    def raw(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]

    prompts = [[dict(m) for m in row.messages[:-1]] for row in read_rows(FOLDER / "test.jsonl")]
    tests, trained = raw("test.jsonl"), raw("train.jsonl")
    answers = {}
    for when, gguf in (
        ("before", base_gguf(base, read_run(run)["model_hash"], quant, llama, display)),
        ("after", run / report["file"]),
    ):
        with display.stage(f"answers {when} tuning") as progress, Server(llama, gguf, context=512) as server:
            answers[when] = server.chat_many(prompts, _ANSWER_TOKENS, progress, enable_thinking=False)
    lines = []
    for number, prompt in enumerate(prompts):
        index, similarity = nearest_train_row(tests[number], trained)
        line: dict[str, Any] = {"prompt": prompt[-1]["content"]}
        for when in ("before", "after"):
            line[when] = answers[when][number]
            line[f"faults_{when}"] = check(prompt, answers[when][number])
        line["nearest_train_row"] = trained[index]["messages"][-2]["content"]
        line["similarity"] = round(similarity, 3)
        lines.append(line)
    (run / "example.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    counts = {"total": len(lines)} | {
        when: sum(not line[f"faults_{when}"] for line in lines) for when in ("before", "after")
    }
    every = max(1, len(lines) // _SHOWN)
    display.table(
        f"Ten raw answers of the tuned {quant} GGUF, and the train prompt nearest to each test prompt",
        ["prompt", "answer", "form", "nearest train prompt", "similarity"],
        [
            [
                line["prompt"],
                line["after"],
                "ok" if not line["faults_after"] else "; ".join(line["faults_after"]),
                line["nearest_train_row"],
                f"{line['similarity']:.2f}",
            ]
            for line in lines[::every][:_SHOWN]
        ],
    )
    display.say(f"All {len(lines)} answers, faults and nearest train rows: {run / 'example.jsonl'}")
    total = counts["total"]
    display.table(
        f"Test answers that follow the form ({quant} GGUF in llama.cpp)",
        ["", "follow", "of", "share"],
        [[when, str(counts[when]), str(total), f"{counts[when] / total:.0%}"] for when in ("before", "after")],
    )
    return counts


def base_gguf(base: Path, model_hash: str, quant: str, llama: LlamaCpp, display: Display) -> Path:
    """The untuned model as the same kind of GGUF, made once for each model and cached."""
    folder = cache_folder() / "base-gguf" / model_hash[:16]
    target = folder / f"{quant}.gguf"
    with cache_lock():
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with display.stage("base GGUF") as progress:
            whole = folder / "BF16.gguf"
            convert(base, whole, "base", llama, progress)
            quantize(whole, target, quant, llama, progress)
            if quant != "BF16":
                whole.unlink()
    return target
