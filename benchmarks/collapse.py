"""Collapse alarms against planted faults and good runs: what was observed is kept, the alarms are computed from it.

    python -m benchmarks.collapse                        # runs that are not done yet; two hours a model on a core
    python -m benchmarks.collapse --models smollm2 --minutes 30
    python -m benchmarks.collapse --table                # planted fault x alarm, and the good runs, as Markdown

Every run is written to benchmarks/results/collapse-MODEL.jsonl as soon as it ends: its steps, validations, answers and
drift. So a threshold can be changed without training again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.regret import MODELS, backend_named, environment
from benchmarks.regret_data import data_set, write_set
from benchmarks.regret_results import RESULTS
from common.backend import Memory
from common.commands.prepare import choose_hardware
from common.context import Context
from common.data.encode import TEMPLATES, Encoded, load_tokenizer
from common.data.encoded_rows import EncodedRows
from common.data.sample_prompts import row_prompts, trained_answers
from common.data.training_rows import encode_data, read_data
from common.display import Display
from common.documents import read_json_lines
from common.errors import UserError
from common.evaluation.alarms import Alarms
from common.evaluation.drift import Quiz
from common.evaluation.samples import Samples
from common.inference.backend_chat import ChatFormat, backend_chat_model
from common.models.training_base import find_base
from common.options import Options
from common.training.auto_recipe import auto_recipe
from common.training.metrics import Metrics
from common.training.trials import Trials


@dataclass(frozen=True)
class Case:
    """A training, with the automatic recipe where its options say nothing else.

    fault: what was planted; empty in a good run. rate: times the automatic learning rate. change: of every training
    row. same: every row has the first row's answer. asked_by: another template than that of training.
    """

    name: str
    data: str
    fault: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    rows: int | None = None
    change: Callable[[Encoded], Encoded] = lambda row: row
    same: bool = False
    asked_by: str | None = None


def _no_end(row: Encoded) -> Encoded:
    """Without its labels where a turn ends: the last label of each run of labels."""
    ends = row.mask & ~np.append(row.mask[1:], False)
    before = row.mask & np.append(ends[1:], False)  # a newline may follow the end token
    return replace(row, loss_weights=row.loss_weights * ~(ends | before))


def _on_the_prompt(row: Encoded) -> Encoded:
    weights = (~row.mask).astype(np.float32)
    weights[0] = 0
    return replace(row, loss_weights=weights)


_DATA = "example-60"  # short rows of the built-in example
_LONG = {"epochs": 30, "patience": 0}
_SHORT = {"epochs": 4, "patience": 0}
_FAULTS: dict[str, dict[str, Any]] = {
    "rate x10": {"options": _SHORT, "rate": 10},
    "rate x100": {"options": _SHORT, "rate": 100},
    "30 epochs on 50 rows": {"options": _LONG, "rows": 50},
    "no end token": {"change": _no_end},
    "every answer the same": {"same": True},
    "another template": {"asked_by": "llama3"},
    "labels on the prompt": {"change": _on_the_prompt},
}
CASES = [
    *(Case(f"{name}, {_DATA}", _DATA, name, **how) for name, how in _FAULTS.items()),
    *(
        Case(f"good, {data}, seed {seed}", data, options={"seed": seed})
        for data, seeds in {_DATA: 3, "identity": 2, "kinds": 1, "chat": 2}.items()
        for seed in range(seeds)
    ),
]


class _Recorder:
    """The loop's observer: keeps what a training shows."""

    def __init__(self, trials: Trials, case: Case, template: str | None, folder: Path) -> None:
        self.trials, self.lines, self.asked = trials, list[dict[str, Any]](), list[Samples]()
        self.case, self.template, self.file = case, template, Metrics(folder / "samples.jsonl", 0, False, print)
        self.quiz = Quiz.of(trials.rows.encoder.tokenizer, "off")

    def step(self, line: dict, memory: Memory) -> None:
        self.lines.append({name: line[name] for name in ("step", "loss", "grad_norm")})

    def evaluation(self, line: dict) -> None:
        self.lines.append(dict(line))
        if not self.asked:
            rows = self.trials.rows
            form = ChatFormat(self.trials.base.model.path, self.template, rows.stops, False, 2048)
            model = backend_chat_model(self.trials.model, form, "", True)
            trained = trained_answers(rows.train.rows, rows.encoder.tokenizer)
            self.asked.append(Samples(model, row_prompts(rows, 3), self.file, seconds=1e9, trained=trained))
        self.asked[0].ask(line["step"], Display("quiet"), lambda: False)
        drift = self.quiz.ask(self.trials.model)
        self.lines.append({"step": line["step"], "drift": drift.nats, "quiz_loss": drift.loss})

    def say(self, text: str) -> None:
        """Of no interest here."""

    def warn(self, text: str) -> None:
        print(f"warning: {text}")

    def stop_requested(self) -> bool:
        return False


def run(model: str, case: Case, public: Path | None) -> dict[str, Any]:
    """What the case's training showed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = data_set(case.data, public)
        rows["train"] = rows["train"][: case.rows]
        if case.same:
            rows["train"] = [_answered(row, rows["train"][0]) for row in rows["train"]]
        write_set(rows, Path(folder))
        context = Context(backend_named, Display("quiet"))
        options = Options(**MODELS[model] | {"precision": "fp32", "data": folder} | case.options)
        hardware = choose_hardware(options, context)
        base = find_base(options, hardware.backend.value, "none", context.display)
        encoder = load_tokenizer(base.model.path, options.chat_template)
        encoded = encode_data(options, read_data(options, context.display), encoder, lambda share, text: None)
        options, _ = auto_recipe(options, base, encoded.train.rows)
        options = options.model_copy(update={"learning_rate": options.learning_rate * case.rate})
        changed = EncodedRows.of([case.change(row) for row in encoded.train.rows])
        encoded = replace(encoded, train=replace(encoded.train, every=changed, rows=changed))
        trials = Trials(context, base, encoded, hardware.backend.value, hardware.device.value, "fp32")
        template = (TEMPLATES / f"{case.asked_by}.jinja").read_text() if case.asked_by else encoded.template
        recorder, began = _Recorder(trials, case, template, Path(folder)), time.perf_counter()
        ended = ""
        try:
            trials.train(options, Path(folder) / "run", recorder)
        except UserError as error:  # a loss that is not finite
            ended = error.what
        found = {
            **{"case": case.name, "fault": case.fault, "ended": ended, "warmup": trials.recipe(options).warmup_steps},
            **{"lines": recorder.lines, "answers": read_json_lines(recorder.file.path, "")},
            **{"seconds": round(time.perf_counter() - began), "environment": environment(trials)},
        }
        trials.close()
        return found


def _answered(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The row with the last answer of the other."""
    return {"messages": [*row["messages"][:-1], other["messages"][-1]]}


def alarms_of(found: dict[str, Any], seldom: bool = False) -> list[str]:
    """The names of the alarms that the run raises, in order.

    seldom: with the answers and the drift of the first and the last validation alone, as in `train` of a few minutes.
    """
    options = next(case.options for case in CASES if case.name == found["case"])
    patience = options.get("patience", Options.model_fields["patience"].default)
    alarms = Alarms(found["warmup"], overfitting=not patience)
    last = max((line["step"] for line in found["lines"] if "drift" in line), default=0)
    for line in found["lines"]:
        if "loss" in line:
            alarms.step(line)
        elif "valid_loss" in line:
            alarms.validation(line)
        elif not seldom or line["step"] in (0, last):
            answers = [answer for answer in found["answers"] if answer["step"] == line["step"]]
            alarms.answers(line["step"], answers, line["step"] == last)
            alarms.drift(line["step"], line["drift"], line["quiz_loss"])
    names = [alarm.name for alarm in alarms.raised]
    return ["not finite", *names] if found["ended"] else names


def results(model: str) -> list[dict[str, Any]]:
    path = RESULTS / f"collapse-{model}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(models: list[str], seldom: bool) -> str:
    lines = ["| run | " + " | ".join(models) + " |", f"|{' --- |' * (1 + len(models))}"]
    found = {
        model: {one["case"]: ", ".join(alarms_of(one, seldom)) or "none" for one in results(model)} for model in models
    }
    for case in CASES:
        lines.append(f"| {case.name} | {' | '.join(found[model].get(case.name, 'not run') for model in models)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--from", type=Path, dest="public", metavar="DIR", help="folder of the public sets")
    parser.add_argument("--minutes", type=float, default=np.inf, help="begin no run after so long")
    parser.add_argument("--table", action="store_true", help="print the alarms of what was observed")
    parser.add_argument("--seldom", action="store_true", help="as if asked at the first and the last validation alone")
    given = parser.parse_args()
    ends = time.monotonic() + 60 * given.minutes
    for model, case in product(given.models, CASES):
        done = any(one["case"] == case.name for one in results(model))
        if not given.table and not done and time.monotonic() < ends:
            found = run(model, case, given.public)
            with (RESULTS / f"collapse-{model}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found, ensure_ascii=False) + "\n")
            print(f"{model}, {case.name}: {', '.join(alarms_of(found)) or 'none'}; {found['seconds']} s", flush=True)
    print(table(given.models, given.seldom))


if __name__ == "__main__":
    main()
