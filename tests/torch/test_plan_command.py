"""`plan`: what it prints is what `train` then does."""

import json
import re
from dataclasses import replace

import pytest

import cli
from common.commands.arguments import read_flags
from common.commands.plan import _probe, estimate_run
from common.commands.prepare import prepare
from common.commands.train import run_training
from common.errors import UserError
from common.option_sources import load_options
from common.run_record import Run
from common.training.learned_memory import LearnedMemory, keep
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

pytestmark = pytest.mark.slow

FLAGS = [
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--rank",
    "4",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--backend",
    "torch",
]


@pytest.fixture
def flags(tiny_llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    return ["--model", str(tiny_llama), "--data", str(rows), *FLAGS]


def test_the_plan_that_is_printed_is_the_plan_that_is_trained_by(flags, tmp_path, capsys):
    estimate_run(load_options(read_flags(flags))[0], True, context("json"))
    event = next(e for e in map(json.loads, capsys.readouterr().out.splitlines()) if e["event"] == "plan")
    assert event["predicted_peak_bytes"] == sum(event["parts"].values())
    assert event["tokens_per_second"] > 0
    assert event["expected_seconds"] > 0
    assert event["largest_micro_batch_rows"] >= 4
    assert event["largest_row_tokens"] == 512  # the model's own limit
    options = load_options(read_flags([*flags, "--export", "none", "--output", str(tmp_path / "run")]))[0]
    run = Run(run_training(options, context("quiet")))
    plan, record = run.plan.model_dump(), run.record
    assert {**plan, "memory_budget": 0} == {**event["plan"], "memory_budget": 0}
    assert record.predicted_peak_bytes == event["predicted_peak_bytes"]
    assert {"prepare", "tokenize", "load", "train", "evaluate", "save"} <= record.stage_seconds.keys()


def test_the_probe_can_be_left_out_and_a_model_be_named_first(flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["twintune", "plan", *flags[1:], "--no-probe"])
    cli.main()
    printed = capsys.readouterr().out
    assert "estimated peak" in printed
    assert "plan: torch on cpu, fp32" in printed
    assert "measured:" not in printed


def test_a_limit_that_cannot_be_kept_is_told_before_anything_is_loaded(flags):
    options = load_options(read_flags([*flags, "--memory-limit", "3MB"]))[0]
    with pytest.raises(UserError, match=r"--memory-limit 3MB: training needs about .* at least"):
        estimate_run(options, True, context("quiet"))


@pytest.mark.parametrize(("device", "count"), [("cpu", "two"), ("cuda", "three")])
def test_the_probe_times_a_step_that_was_computed_before(flags, monkeypatch, capsys, device, count):
    """In the shapes that training would be told to expect."""
    job = prepare(load_options(read_flags([*flags, "--export", "none"]))[0], None, context())
    job = replace(job, chosen=replace(job.chosen, plan=job.plan.model_copy(update={"device": device})))
    backend, told = Bigram(), []
    backend.load(job.recipe, job.plan, job.base.training_base, job.start)
    monkeypatch.setattr("common.commands.plan.loaded", lambda *given: (backend, None))
    monkeypatch.setattr(backend, "expect", lambda shapes: told.append((len(backend.calls), shapes())))
    assert _probe(job, context("json"))["tokens_per_second"] > 0
    shapes = [[batch.shape for batch in batches] for batches in backend.calls]
    assert shapes == shapes[:1] * {"two": 2, "three": 3}[count]
    ((before, expected),) = told
    assert before == 0
    assert {*shapes[0]} <= {*expected}
    assert f"in {count} steps" in capsys.readouterr().out


def test_what_was_learned_is_forgotten_while_nothing_of_it_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.training.learned_memory.cache_folder", lambda: tmp_path)
    monkeypatch.delenv("TWINTUNE_LEARN_MEMORY", raising=False)
    keep(LearnedMemory("torch cpu", "v1", "model").observation(False, 1, 2, 3))
    monkeypatch.setenv("TWINTUNE_LEARN_MEMORY", "0")
    monkeypatch.setattr("sys.argv", ["twintune", "plan", "--forget"])
    cli.main()
    assert capsys.readouterr().out.startswith("forgotten: learned on this machine from 1 run")
    assert [*tmp_path.iterdir()] == []


def test_runs_teach_the_estimate_until_it_is_told_to_forget(flags, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "memory.jsonl"
    monkeypatch.setenv("TWINTUNE_LEARN_MEMORY", str(kept))

    def command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["twintune", *words])
        cli.main()
        return capsys.readouterr().out

    trained = [*flags, "--export", "none", "--output"]
    assert "learned" not in command("train", *trained, str(tmp_path / "first"))
    first = Run(tmp_path / "first").record
    (line,) = map(json.loads, kept.read_text().splitlines())
    assert line["peak"] == first.peak_memory_bytes
    assert line["fixed"] + line["step"] == first.predicted_peak_bytes
    assert "; learned on this machine from 1 run, the last on " in command("train", *trained, str(tmp_path / "again"))
    again = Run(tmp_path / "again").record
    assert again.predicted_parts["learned"] == again.predicted_peak_bytes - first.predicted_peak_bytes
    taken = max(first.peak_memory_bytes, first.predicted_peak_bytes / 2)  # tests before this one loaded the libraries
    assert again.predicted_peak_bytes == pytest.approx(taken, rel=0.02)
    printed = " ".join(command("plan", *flags).split())
    assert "learned on this machine from 2 runs" in printed
    assert re.search(r"peak [\d.]+ MB in two steps, by which training takes [\d.]+ MB; 3 steps would take", printed)
    assert command("plan", "--forget").startswith("forgotten: learned on this machine from 2 runs, the last on ")
    assert command("plan", "--forget") == "forgotten: nothing had been learned\n"
    assert "learned" not in command("plan", *flags, "--no-probe")
