"""The built-in example's last table: answers that follow the form, before and after, as llama.cpp gives them."""

import json
from pathlib import Path
from typing import Any

from common.data.load import read_rows
from common.display import Display
from common.llama_cpp.convert import base_gguf
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions
from common.options import EXAMPLE
from common.run_record import read_run

_ANSWER_TOKENS = 64  # the longest right answer has fewer
_SHOWN = 10


def score(run: Path, base: Path, report: dict[str, Any], llama: LlamaCpp, display: Display) -> dict[str, int]:
    """Ask base and tuned GGUF of the same type the test rows' prompts, check, print; details in `example.jsonl`.

    report: the tuned one's, of run.json.
    """
    quant = report["quant"]
    from examples.check import check, nearest_train_row

    def raw(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]

    prompts = [[dict(m) for m in row.messages[:-1]] for row in read_rows(EXAMPLE / "test.jsonl")]
    tests, trained = raw("test.jsonl"), raw("train.jsonl")
    answers = {}
    for when, gguf in (
        ("before", base_gguf(base, read_run(run)["model_hash"], quant, llama, display)),
        ("after", run / report["file"]),
    ):
        with display.stage(f"answers {when} tuning") as progress, Server(llama, gguf, ServerOptions(512)) as server:
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
