"""What is checked before the first step, and a complete run without a framework."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import torch_backend
from common import files
from common.backend import Memory, StepResult
from common.commands import train as module
from common.commands import tuned
from common.commands.fuse import fuse_run
from common.commands.prepare import Job, prepare
from common.commands.train import run_training
from common.data.batching import micro_batches
from common.display import Display
from common.errors import UserError
from common.export import preflight
from common.export.budget import estimate_stages
from common.export.upload import Upload, push
from common.models.adapter_files import read_mlx, read_peft, read_trained
from common.options import Options
from common.run_fields import GgufRecord
from common.run_lock import held
from common.run_record import Run
from common.training import checkpoint, validation
from common.training.checkpoint import latest
from common.training.loop import Interrupted
from common.training.resume import resumed_options
from common.training.validation import evaluate
from common.verify.verify import verify_run
from tests.contexts import context
from tests.full_disk import full_disk
from tests.tiny import chat, write_rows
from tests.unit.bigram import Bigram
from tests.unit.hub import TOKEN, Hub, serve
from tests.unit.old_run import edit_yaml
from torch_backend.devices import Card


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run of 24 rows on the tiny model, as deep as training goes."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": str(tiny_llama),
        "data": str(write_rows(tmp_path / "rows.jsonl")),
        "output": str(tmp_path / "run"),
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "rank": 2,
        "steps": 6,
        "eval_every": 3,
        "save_every": 2,
    }


def ready(given: dict[str, Any], **changes: Any) -> Job:
    return prepare(Options.model_validate(given | changes), None, context())


def fault(given: dict[str, Any], **changes: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        ready(given, **changes)
    return caught.value


def run(given: dict[str, Any], backend: Bigram | None = None) -> tuple[Path, Bigram]:
    backend = backend or Bigram()
    return run_training(Options.model_validate(given), context(create=lambda: backend)), backend


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def plan_of(folder: Path) -> tuple[str, int]:
    plan = Run(folder).plan
    return plan.device, plan.device_index


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_keeps_the_gpu_that_was_asked_for_and_else_takes_the_freest(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    free = {"a": 9, "b": 5, "c": 7}
    cards = [Card("NVIDIA A100", (8, 0), uuid) for uuid in free]
    monkeypatch.setattr(torch_backend.devices, "cards", lambda: cards)
    monkeypatch.setattr(torch_backend.devices, "nvidia_free", lambda uuid: free[uuid] * 10**9)
    asked_of: list[str] = []
    budget = (10**10, "the GPU's free memory")
    monkeypatch.setattr(torch_backend, "free_memory", lambda device: asked_of.append(device) or budget)
    with pytest.raises(Interrupted):
        run(given | {"device": "cuda:1" if asked else "auto"}, Stops())
    folder = Path(given["output"])
    assert plan_of(folder) == ("cuda", 1 if asked else 0)
    free["c"] = 20
    run({"resume": str(folder)})
    assert plan_of(folder) == ("cuda", 1 if asked else 2)
    assert asked_of == (["cuda:1", "cuda:1"] if asked else ["cuda", "cuda:2"])


# --- the recipe that is chosen


def test_recipe_auto_chooses_what_was_not_given_and_resume_keeps_it(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del given["steps"], given["rank"]
    options = Options.model_validate(given)
    with pytest.raises(Interrupted):
        run_training(options, context("plain", create=Stops))
    folder = Path(given["output"])
    said = (
        "22 rows, 385 label tokens: 8 epochs (48 steps), 4 rows a step, learning rate 0.002 (llama of hidden size 64)"
    )
    assert said in capsys.readouterr().out.replace("\n", " ")
    recipe = Run(folder).recipe
    chosen = (recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.rank)
    assert chosen == (48, 4, 0.002, 16)
    run({"resume": str(folder)})
    assert Run(folder).recipe == recipe
    fixed = ready(given | {"recipe": "fixed", "output": None}).recipe
    assert (fixed.steps, fixed.batch_size, fixed.learning_rate, fixed.rank) == (9, 8, 2e-4, 16)


def test_too_few_validation_rows_to_stop_by(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    said = "2 validation rows are too few to stop by (at least 10): training goes through all its steps"
    few = prepare(Options.model_validate(given), None, context("plain"))
    assert said in capsys.readouterr().out.replace("\n", " ")
    enough = ready(given, valid_share=0.5, output=None)
    assert (few.recipe.patience, enough.recipe.patience) == (0, 4)


def test_training_that_only_harmed_is_told(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    class Harmed(Bigram):
        def eval_step(self, batch: Any) -> Any:
            return StepResult.of([batch], (2.0 + bool(self.calls)) * batch.label_tokens, 0.0, 0)

    folder, _ = run(given, Harmed())
    assert (
        "no validation was better than before the first step (2.0000; the best was 3.0000)" in capsys.readouterr().err
    )
    assert (Run(folder).record.start_valid_loss, Run(folder).record.best_valid_loss) == (2.0, 3.0)


# --- faults before the first step


def test_every_row_longer_than_max_length(given: dict[str, Any]) -> None:
    error = fault(given, max_length=20)
    assert error.what == (f"--max-length 20: every row of {given['data']} is longer (the shortest has 48 tokens).")
    assert error.fix == "Raise --max-length."


def test_suspicious_rows_are_warned_of_and_shapes_are_said(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nWho?,I am {{name}}.\nWho?,Pip.\nWho?,\n")
    prepare(Options.model_validate(given | {"data": str(path), "steps": 1}), None, context("plain"))
    printed = capsys.readouterr().out.replace("\n", " ")
    assert " rows.csv read as: prompt and completion (question, answer), 2 rows" in printed
    assert "warning: 1 rows without an answer, left out: rows.csv:4" in printed
    assert "warning: 2 training rows with the same prompt and different answers: rows.csv:2, rows.csv:3" in printed
    assert "warning: 1 rows with a placeholder left in: rows.csv:2" in printed
    assert "warning: no row could be kept for validation: all rows have the same prompt" in printed


def test_bad_rows_are_dropped_counted_and_listed(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "more.jsonl"
    bad = [chat("Hi", f"a<|im_end|>{number}") for number in range(12)]
    lines = [*map(json.dumps, bad), "{", json.dumps(chat("Say <|im_end|>", "Yo" * 300) | {"id": 1})]
    path.write_text(Path(given["data"]).read_text() + "\n".join(lines))
    settings = given | {"data": str(path), "valid_share": 0.0, "on_bad_row": "drop"}
    job = prepare(Options.model_validate(settings), None, context("plain"))
    assert len(job.train) == 25
    assert job.recipe.on_bad_row == "drop"
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: 13 rows that cannot be read or labeled are dropped: more.jsonl line 37: is not JSON" in printed
    assert "more.jsonl:33: this row cannot be labeled exactly" in printed
    assert "... and 3 more (check-data --on-bad-row drop lists them)" in printed
    assert f"{path}: columns not read: id" in printed
    assert "warning: 1 rows with control tokens in their text, read as such (<|im_end|>): more.jsonl:38" in printed
    assert "warning: 1 rows are longer than the model's context of 512 tokens: more.jsonl:38" in printed
    path.write_text("".join(json.dumps(row) + "\n" for row in bad))
    assert fault(settings).what == f"--on-bad-row drop: no row of {path} is left to train on."
    refused = fault(given, data=str(path))
    assert refused.what.startswith("10 rows cannot be trained on, and maybe more:\nmore.jsonl:")
    assert refused.fix.endswith("Or leave such rows out: --on-bad-row drop.")


def test_the_sample_of_a_row_whose_tools_are_text(given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    row = chat("Hi", "Yo") | {"tools": [{"name": "weather"}]}
    path.write_text(json.dumps(row) + "\n")
    system, asked = ready(given, data=str(path), tools="system").prompts[0].messages
    assert (system["role"], asked["content"]) == ("system", "Hi")
    assert '"name": "weather"' in system["content"]
    assert ready(given, data=str(path), tools="drop").prompts[0].messages == [asked]


def test_rows_longer_than_max_length_are_dropped_counted_and_listed(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job = ready(given, max_length=50, valid_share=0.0)
    printed = capsys.readouterr().err
    dropped = 24 - len(job.train)
    assert 0 < dropped < 24
    assert f"warning: {dropped} rows longer than --max-length 50 are dropped: rows.jsonl:" in printed.replace("\n", " ")


def test_an_output_folder_that_holds_another_run(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert fault(given).what == f"--output {tmp_path / 'run'} holds another run."


def test_an_output_folder_that_holds_something_else(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.txt").write_text("")
    assert fault(given).what == f"--output {tmp_path / 'run'} is not an empty folder."


def test_without_output_a_new_folder_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    given.pop("output")
    assert ready(given).run.path == Path("runs/tiny-llama-rows-torch")
    (tmp_path / "runs" / "tiny-llama-rows-torch").mkdir(parents=True)
    assert ready(given).run.path == Path("runs/tiny-llama-rows-torch-2")


def test_not_enough_disk_is_found_before_training(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    error = fault(given, export="fused")
    assert "GB free, and this run will write up to" in error.what
    assert not Path(given["output"]).exists()


@pytest.mark.parametrize("name", ["model", "data"])
def test_what_must_be_given(given: dict[str, Any], name: str) -> None:
    assert fault(given, **{name: None}).what == f"No {name} is given."


# --- what the recipe holds


def test_epochs_become_steps_and_a_share_becomes_warm_up_steps(given: dict[str, Any]) -> None:
    given.pop("steps")
    recipe = ready(given, epochs=2, batch_size=5, valid_share=0.25, warmup=0.25, eval_every=0).recipe  # 18 rows
    assert (recipe.steps, recipe.warmup_steps, recipe.eval_every) == (8, 2, 4)
    recipe = ready(given, epochs=0.5, batch_size=5, valid_share=0.25, warmup=7).recipe
    assert (recipe.steps, recipe.warmup_steps) == (2, 2)


@pytest.mark.parametrize(("epochs", "steps"), [(0.07, 7), (0.071, 8), (1e-9, 1)])
def test_epochs_are_not_rounded_up_by_the_last_bit(given: dict[str, Any], epochs: float, steps: int) -> None:
    given.pop("steps")
    write_rows(Path(given["data"]), 100)
    assert ready(given, epochs=epochs, batch_size=1, valid_share=0.0).recipe.steps == steps


def test_the_plain_defaults_are_three_epochs(given: dict[str, Any]) -> None:
    given.pop("steps")
    assert ready(given, recipe="fixed", batch_size=8, valid_share=0.0).recipe.steps == 9


def test_where_the_files_lie_does_not_change_the_recipe(given: dict[str, Any], tmp_path: Path) -> None:
    moved = shutil.copytree(given["model"], tmp_path / "moved")
    rows = shutil.copy(given["data"], tmp_path / "others.jsonl")
    assert ready(given).recipe.hash() == ready(given, model=str(moved), data=str(rows)).recipe.hash()


def test_weights_are_said_and_in_the_recipe(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(given["data"])
    plain, lines = ready(given), data.read_text().splitlines()
    data.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"weight": 0.5}), *lines[1:]]))
    weighted = prepare(Options.model_validate(given), None, context(mode="plain"))
    assert "1 rows have labels whose loss weight is not 1 (weights from 0.5 to 0.5)" in capsys.readouterr().out
    rows = [row for row in (*weighted.train, *weighted.valid) if row.loss_weights.dtype != bool]
    assert [row.loss_weights.max() for row in rows] == [0.5]
    assert weighted.recipe.rows_hash != plain.recipe.rows_hash


def test_whatever_file_changes_a_rows_tokens_changes_the_recipe(given: dict[str, Any], tmp_path: Path) -> None:
    """Here tokenizer_config.json, whose end-of-text token is appended to plain text."""
    Path(given["data"]).write_text('{"text": "ab"}\n{"text": "cd"}\n')
    other = shutil.copytree(given["model"], tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": config["bos_token"]}))
    one, two = ready(given).recipe, ready(given, model=str(other)).recipe
    assert (one.model_hash, one.template_hash, one.data_hash) == (two.model_hash, two.template_hash, two.data_hash)
    assert one.rows_hash != two.rows_hash
    assert one.hash() != two.hash()


def test_a_row_that_is_dropped_is_in_the_recipes_hash(given: dict[str, Any]) -> None:
    """One that cannot be read by its data_hash, one that cannot be labeled by its rows_hash too."""
    given |= {"on_bad_row": "drop", "valid_share": 0.0}
    data, sound = Path(given["data"]), ready(given).recipe
    lines = data.read_text().splitlines()
    data.write_text("\n".join(["{", *lines[1:]]))
    unread = ready(given).recipe
    assert (unread.data_hash != sound.data_hash, unread.rows_hash != sound.rows_hash) == (True, True)
    data.write_text("\n".join([json.dumps(chat("Hi", "a<|im_end|>b")), *lines[1:]]))
    unlabeled = ready(given).recipe
    assert unlabeled.rows_hash == unread.rows_hash
    assert len({recipe.hash() for recipe in (sound, unread, unlabeled)}) == 3


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"micro_batch_tokens": 64}, True),
        ({"save_every": 1}, True),
        ({"output": "elsewhere"}, True),
        ({"on_bad_row": "drop"}, True),  # of rows that are sound
        ({"tools": "system"}, True),  # of which there are none
        ({"seed": 1}, False),
        ({"precision": "bf16"}, False),
        ({"valid_share": 0.5}, False),
        ({"max_length": 60}, False),
        ({"targets": ["q_proj"]}, False),
    ],
)
@pytest.mark.slow
def test_the_plan_is_not_in_the_recipes_hash(given: dict[str, Any], changes: dict[str, Any], same: bool) -> None:
    assert (ready(given, **changes).recipe.hash() == ready(given).recipe.hash()) == same


# --- a complete run


def test_the_run_folder_holds_what_it_should(given: dict[str, Any]) -> None:
    folder, backend = run(given)
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "adapter", "adapter-mlx", "checkpoints", "environment.json"),
        *("chat_template.jinja", "metrics.jsonl", "plan.yaml", "recipe.yaml", "run.json", "samples.jsonl"),
        *("verify-cases.json", "report.json", "report.html"),
    }
    known = json.loads((folder / "run.json").read_text())
    assert (known["status"], known["steps"], known["backend"]) == ("complete", 6, "torch")
    assert known["export"].keys() == {"sample"}  # from the backend itself: there is no GGUF to ask
    assert known["export"]["sample"]["prompt"] == known["sample_prompt"]
    assert known["export"]["sample"]["answer"]
    assert known.keys() >= {
        *("recipe_hash", "device", "tokens", "label_tokens", "train_seconds", "tokens_per_second"),
        *("label_tokens_per_second", "padding_fraction", "peak_memory_bytes", "peak_rss_bytes"),
        *("swap_growth_bytes", "final_train_loss", "best_valid_loss", "best_step"),
    }
    assert backend.closed


def test_a_runs_chat_template_appears_complete_or_not_at_all(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = files._sync
    monkeypatch.setattr(files, "_sync", lambda path: full_disk(path) if path.suffix == ".jinja" else sync(path))
    with pytest.raises(OSError, match="No space left"):
        run(given)
    assert not [path.name for path in Path(given["output"]).iterdir() if path.suffix == ".jinja"]


def refusing(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[Path], bool]) -> None:
    """A disk that refuses to make durable what `refuses` says."""
    sync = files._sync
    monkeypatch.setattr(files, "_sync", lambda path: full_disk(path) if refuses(path) else sync(path))


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_that_never_got_a_record_can_be_started_again(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """The template of the first start is not taken for the second's, which has none."""
    folder = Path(given["output"])
    refusing(monkeypatch, lambda path: path.name.endswith("run.json"))
    with pytest.raises(OSError, match="No space left"):
        run(given)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert (folder / "chat_template.jinja").exists()
    if killed:
        (folder / ".twintune-ffffffff-7-1-run.json").write_text("{")
    (tmp_path / "plain.txt").write_text("\n\n".join(f"Text number {n} of some." for n in range(24)))
    run(given | {"data": str(tmp_path / "plain.txt")})
    assert not (folder / "chat_template.jinja").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".twintune-")]


def test_files_of_the_users_own_are_not_taken_for_those_of_a_killed_start(given: dict[str, Any]) -> None:
    """A start makes its lock before anything else."""
    own = Path(given["output"]) / "recipe.yaml"
    own.parent.mkdir()
    own.write_text("rank: 4")
    assert fault(given).what == f"--output {own.parent} is not an empty folder."
    assert own.read_text() == "rank: 4"


@pytest.mark.parametrize("stops", [True, False])
def test_a_record_that_the_disk_refuses_hides_no_other_error_and_says_how_to_continue(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stops: bool
) -> None:
    refusing(monkeypatch, lambda path: path.name.endswith("run.json") and (path.parent / "metrics.jsonl").exists())
    with pytest.raises(Interrupted if stops else UserError) as caught:
        run(given, Stops() if stops else None)
    folder = given["output"]
    if not stops:
        assert isinstance(caught.value, UserError)
        assert caught.value.what == f"No space left on device: {folder}/run.json"
        assert caught.value.fix.endswith(f"continue from step 6: python cli.py train --resume {folder}")
    assert "warning: run.json is not up to date" in capsys.readouterr().err
    monkeypatch.undo()
    run({"resume": folder})
    record = json.loads((Path(folder) / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("complete", 6)


def test_an_export_that_the_disk_refuses_is_made_by_fuse(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, lambda path: path.name == "model.safetensors" and "fused" in str(path))
    with pytest.raises(UserError) as caught:
        run(given | {"export": "fused"})
    assert caught.value.what == f"No space left on device: {given['output']}/fused"
    assert caught.value.fix == (f"Free space on that disk, then export again: python cli.py fuse {given['output']}")


def test_nothing_is_fused_into_a_model_that_changed_meanwhile(given: dict[str, Any], tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, Path(given["output"]).parent / "model")) / "model.safetensors"

    class Changes(Bigram):
        def close(self) -> None:
            super().close()
            weights = bytearray(model.read_bytes())
            weights[-1] ^= 1
            model.unlink()
            model.write_bytes(weights)

    given |= {"model": str(model.parent), "export": "fused"}
    with pytest.raises(UserError, match=r"model has changed since training began"):
        run(given, Changes())
    assert not (Path(given["output"]) / "fused").exists()


def test_a_resume_removes_what_a_killed_process_left_and_names_another_environment(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        run(given, Stops())
    folder = Path(given["output"])
    (folder / "checkpoints" / ".twintune-ffffffff-7-1-step-000003").mkdir()
    environment = json.loads((folder / "environment.json").read_text())
    environment["packages"]["numpy"], environment["threads"] = "1.0", "64"
    (folder / "environment.json").write_text(json.dumps(environment))
    capsys.readouterr()
    run({"resume": str(folder)})
    assert not [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    printed = " ".join(capsys.readouterr().err.split())
    assert "warning: not the environment that the run began in, so the last digits may differ: numpy 1.0 -> " in printed
    assert ", threads 64 -> " in printed


def test_the_exported_adapter_is_the_best_one_in_both_layouts(given: dict[str, Any]) -> None:
    folder, _ = run(given)
    known = json.loads((folder / "run.json").read_text())
    found = latest(folder)
    assert found is not None
    best = found[0].best
    assert best is not None
    assert (known["exported_adapter"], known["exported_step"]) == ("best", known["best_step"])
    for again in (read_peft(folder / "adapter"), read_mlx(folder / "adapter-mlx")):
        assert len(again.weights) == 14
        assert all(np.array_equal(again.weights[name].B, weight.B) for name, weight in best.weights.items())


def test_validation_scores_the_rows_that_eval_rows_leaves(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given |= {"valid_share": 0.5}
    asked = (Options.model_validate(given | {"eval_rows": count}) for count in (0, 5, 5))
    every, some, again = (prepare(options, None, context("plain")) for options in asked)
    assert len(every.valid) == 12
    sources = [row.source for row in some.valid]
    assert len(sources) == 5
    assert sources == [row.source for row in again.valid]
    assert sources == [row.source for row in every.valid if row.source in sources]  # in their order
    assert "validation scores 5 of 12 rows, drawn by --seed (--eval-rows)" in capsys.readouterr().out
    assert some.recipe.rows_hash == again.recipe.rows_hash != every.recipe.rows_hash
    assert sources != [row.source for row in ready(given, eval_rows=5, seed=2).valid]


def test_validation_rows_are_cut_once(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, real = [], validation.micro_batches
    monkeypatch.setattr(validation, "micro_batches", lambda rows, *more: (cuts.append(len(rows)), real(rows, *more))[1])
    folder, _ = run(given | {"eval_every": 1, "valid_share": 0.5, "batch_size": 4})
    assert len([line for line in metrics(folder) if "valid_loss" in line]) == 7
    assert cuts.count(12) == 1


def test_a_run_from_before_eval_rows_goes_on_with_all_validation_rows(given: dict[str, Any]) -> None:
    given |= {"valid_share": 0.5}
    with pytest.raises(Interrupted):
        run(given | {"eval_rows": 0}, Stops())
    folder = Path(given["output"])
    edit_yaml(folder / "recipe.yaml", {"eval_rows": None})
    record = json.loads((folder / "run.json").read_text())
    del record["options"]["eval_rows"]
    (folder / "run.json").write_text(json.dumps(record))
    assert resumed_options(Options(resume=str(folder)), Run(folder)).eval_rows == 0
    folder, _ = run({"resume": str(folder)})
    assert Run(folder).record.data.valid_rows == 12


@pytest.mark.parametrize(("long", "said"), [(2, False), (4, True)])
def test_many_rows_that_are_left_out_are_named_at_the_end_again(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], long: int, said: bool
) -> None:
    with Path(given["data"]).open("a") as file:
        file.writelines(json.dumps(chat(f"q{n}", "a" * 3000)) + "\n" for n in range(long))
    options = Options.model_validate(given | {"valid_share": 0})
    run_training(options, context("plain", create=Bigram))
    last = " ".join(capsys.readouterr().out.split())[-400:]
    assert (f"{long} of {24 + long} rows were left out: {long} longer than --max-length" in last) is said


def split_into(given: dict[str, Any], **counts: int) -> Path:
    """A data folder of the rows of `given`: so many for each file."""
    folder, rows = Path(given["output"]).parent / "split", Path(given["data"]).read_text().splitlines(True)
    folder.mkdir()
    for name, count in counts.items():
        (folder / f"{name}.jsonl").write_text("".join(rows[:count]))
        rows = rows[count:]
    return folder


def test_the_exported_adapter_is_scored_on_the_test_rows(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is scored is the best adapter, not the last, and scoring changes nothing of the training."""
    folder = split_into(given, train=14, valid=5, test=5)
    backend = Bigram()
    options = Options.model_validate(given | {"data": str(folder), "learning_rate": 0.5})
    scored = run_training(options, context("plain", create=lambda: backend))
    job = ready(given | {"data": str(folder), "output": None})
    record = Run(scored).record
    backend.set_adapter(read_trained(scored))
    assert record.test_loss == pytest.approx(evaluate(backend, micro_batches(job.test, 300)))
    assert (record.test_rows, len(job.test)) == (5, 5)
    low, high = record.test_loss_interval
    assert low < record.test_loss < high
    assert record.test_perplexity == pytest.approx(math.exp(record.test_loss))
    assert record.test_perplexity_interval == pytest.approx([math.exp(low), math.exp(high)])
    said = f"test loss {record.test_loss:.4f} [{low:.4f}, {high:.4f}], perplexity {record.test_perplexity:.3f} ["
    assert said in " ".join(capsys.readouterr().out.split())
    assert "test" in record.stage_seconds
    (folder / "test.jsonl").unlink()
    plain, _ = run(given | {"data": str(folder), "output": f"{scored}-2", "learning_rate": 0.5})
    assert Run(plain).record.test_loss is None
    assert metrics(plain) == metrics(scored)


def test_test_rows_that_cannot_be_scored_cost_no_training(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuned, "grouped_losses", lambda *args: 1 / 0)
    folder, _ = run(given | {"data": str(split_into(given, train=19, test=5))})
    assert Run(folder).record.status == "complete"
    assert "the test rows are not scored: ZeroDivisionError" in capsys.readouterr().err


def test_without_validation_the_last_adapter_is_exported(given: dict[str, Any]) -> None:
    folder, backend = run(given | {"valid_share": 0.0})
    known = json.loads((folder / "run.json").read_text())
    assert (known["exported_adapter"], known["exported_step"]) == ("last", 6)
    written = read_peft(folder / "adapter").weights[backend.layer]
    assert np.array_equal(written.B, backend.get_adapter().weights[backend.layer].B)


def sent(numbers: list[int]) -> type[Bigram]:
    """A backend while whose third step the signals come."""

    class Signalled(Bigram):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
            for number in numbers if step == 3 else ():
                signal.raise_signal(number)
            return super().train_step(micro_batches, learning_rate, step)

    return Signalled


class Stops(Bigram):
    """Ctrl-C comes while step 3 is computed."""

    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return super().train_step(micro_batches, learning_rate, step)


def test_ctrl_c_saves_and_resume_ends_where_an_uninterrupted_run_ends(given: dict[str, Any], tmp_path: Path) -> None:
    complete, _ = run(given)
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted) as caught:
        run(given | {"output": str(cut)}, Stops())
    assert str(caught.value) == str(cut)
    assert json.loads((cut / "run.json").read_text())["status"] == "interrupted"
    assert [line["step"] for line in metrics(cut)] == [0, 1, 2, 3]  # the validation that was due is left for later
    run({"resume": str(cut)})
    assert metrics(cut) == metrics(complete)
    one, other = (read_peft(folder / "adapter").weights for folder in (complete, cut))
    assert all(np.array_equal(one[n].A, other[n].A) and np.array_equal(one[n].B, other[n].B) for n in one)
    records = [json.loads((folder / "run.json").read_text()) for folder in (complete, cut)]
    for name in ("recipe_hash", "steps", "tokens", "label_tokens", "final_train_loss", "best_valid_loss", "best_step"):
        assert records[0][name] == records[1][name], name


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGHUP], [signal.SIGTERM], [signal.SIGHUP, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]],
    ids=["HUP", "TERM", "HUP then TERM", "TERM then INT"],
)
def test_every_way_to_stop_saves_first(
    given: dict[str, Any], numbers: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        run(given | {"save_every": 100}, sent(numbers)())
    found = latest(Path(given["output"]))
    assert found is not None
    assert found[0].step == 3
    text = "stopping: the step is finished and saved first; a second Ctrl-C stops at once\n"
    assert capfd.readouterr().err == text  # once, however many signals came


def test_a_stop_after_the_last_step_leaves_the_export_for_later(given: dict[str, Any]) -> None:
    class Late(Bigram):
        """The signal comes when the loop has looked for the last time: nothing but the peak is still asked for."""

        validated = False

        def eval_step(self, batch: Any) -> Any:
            self.validated = self.optimizer.step == 6
            return super().eval_step(batch)

        def memory(self) -> Any:
            if self.validated:
                signal.raise_signal(signal.SIGTERM)
            return super().memory()

    with pytest.raises(Interrupted):
        run(given | {"export": "fused"}, Late())
    folder = Path(given["output"])
    assert not (folder / "fused").exists()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    _, backend = run({"resume": str(folder)})
    assert (backend.calls, (folder / "fused").exists()) == ([], True)


def test_a_resume_loads_its_checkpoint_once(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        run(given, Stops())
    steps = []

    def counted(*given: Any) -> Any:
        point = latest(*given)
        steps.append(point and point.state.step)
        return point

    monkeypatch.setattr(checkpoint, "latest", counted)
    run({"resume": given["output"]})
    assert steps == [3]


def test_an_exports_stages_are_estimated_once(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return estimate_stages(*given)

    monkeypatch.setattr(preflight, "estimate_stages", counted)
    folder, _ = run(given | {"export": "fused"})
    assert len(calls) == 1
    fuse_run(folder, {}, context(create=Bigram))
    assert len(calls) == 2
    assert Run(folder).record.export.stages["fuse"]["predicted_disk"] > 0


def test_another_export_at_a_resume_leaves_the_ggufs_on_record(given: dict[str, Any]) -> None:
    folder, _ = run(given)
    reports = [GgufRecord(name="Q4_K_M", quant="Q4_K_M", file="gguf/model-Q4_K_M.gguf")]
    Run(folder).update_export(gguf=reports)
    run({"resume": str(folder), "export": "fused"})
    assert Run(folder).record.export.gguf == reports


def test_ggufs_of_an_adapter_that_was_trained_on_are_named(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run(given | {"valid_share": 0.0})
    Run(folder).update_export(gguf=[GgufRecord(name="Q8_0", quant="Q8_0", file="gguf/model-Q8_0.gguf")])
    run({"resume": str(folder), "steps": 7})
    said = f"warning: {folder}/gguf/model-Q8_0.gguf: of the adapter of step 6, and so until made again by this command"
    assert f"{said} or by python cli.py fuse {folder}\n" in capsys.readouterr().err
    assert Run(folder).record.export.gguf == []


def test_a_second_ctrl_c_stops_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(given, sent([signal.SIGINT, signal.SIGINT])())
    known = json.loads((Path(given["output"]) / "run.json").read_text())
    assert (known["status"], known["steps"]) == ("interrupted", 2)


def test_a_hang_up_that_nohup_ignores_stays_ignored(given: dict[str, Any]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        folder, _ = run(given, sent([signal.SIGHUP])())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"


def test_a_sample_that_fails_costs_nothing(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    class Mute(Bigram):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            folder = Path(given["output"])
            if json.loads((folder / "run.json").read_text())["status"] != "complete":
                return super().generate(*args, **kwargs)
            assert (folder / "adapter" / "adapter_model.safetensors").exists()
            raise RuntimeError("out of luck")

    folder, backend = run(given | {"export": "fused"}, Mute())
    assert "warning: no sample: RuntimeError: out of luck" in capsys.readouterr().err
    assert (folder / "fused" / "model.safetensors").exists()
    assert backend.closed


def test_the_sample_is_of_a_row_that_was_kept(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(given["data"], folder / "train.jsonl")
    rows = [chat("a long question " * 40, "No."), chat("Short?", "Yes."), chat("Another?", "Yes.")]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = ready(given, data=str(folder), max_length=150)
    assert dropped.prompts[0].messages == [{"role": "user", "content": "Short?"}]
    assert dropped.prompts[0].tokens == len(dropped.valid[0].ids) < 150
    assert ready(given, data=str(folder), max_length=150, overflow="truncate").prompts == dropped.prompts
    (folder / "valid.jsonl").write_text(json.dumps(chat("Q", "a long answer " * 80)) + "\n")
    first = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    cut = ready(
        given, data=str(folder), max_length=150, overflow="truncate"
    )  # a row that is complete, though trained on
    assert cut.prompts[0].messages == first["messages"][:-1]
    assert cut.prompts[0].tokens <= 150
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = ready(given, data=str(folder), max_length=2000)
    assert kept.prompts[0].messages[0]["content"] == rows[0]["messages"][0]["content"]
    assert kept.prompts[0].tokens == len(kept.valid[0].ids) > 600


# --- one process at a time


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Meanwhile(Bigram):
    """Tries something else with the run's folder while step 3 is computed."""

    def __init__(self, folder: Path, attempt: Callable[[], Any]) -> None:
        super().__init__()
        self.folder, self.attempt, self.refused = folder, attempt, ""

    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
        if step == 3:
            before = files_of(self.folder)
            with pytest.raises(UserError) as caught:
                self.attempt()
            self.refused = caught.value.what
            assert files_of(self.folder) == before
        return super().train_step(micro_batches, learning_rate, step)


def test_a_resume_that_is_refused_has_changed_nothing(given: dict[str, Any]) -> None:
    folder = given["output"]
    backend = Meanwhile(Path(folder), lambda: run({"resume": folder, "micro_batch_tokens": 7, "save_every": 3}))
    run(given, backend)
    assert backend.refused == f"{folder} is being trained, exported or verified by another process."


@pytest.mark.parametrize("attempt", ["fuse", "verify", "push"])
def test_a_run_that_is_held_is_not_worked_on(given: dict[str, Any], attempt: str) -> None:
    folder, _ = run(given)
    attempts: dict[str, Callable[[], Any]] = {
        "fuse": lambda: fuse_run(folder, {}, context(create=Bigram)),
        "verify": lambda: verify_run(folder, context(create=Bigram)),
        "push": lambda: push(folder, "me/pip", Upload(), Display("quiet")),
    }
    before = files_of(folder)
    with held(folder), pytest.raises(UserError, match="is being trained, exported or verified by another process"):
        attempts[attempt]()
    assert files_of(folder) == before


def test_two_that_want_the_same_output_do_not_mix(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has prepared, as the first has, and both found the folder free."""
    real = module.prepare

    def overtaken(*args: Any) -> Job:
        job = real(*args)
        monkeypatch.setattr(module, "prepare", real)
        run(given | {"rank": 4})
        return job

    monkeypatch.setattr(module, "prepare", overtaken)
    with pytest.raises(UserError, match="holds another run"):
        run(given)
    folder = Run(Path(given["output"]))
    assert folder.recipe.rank == 4
    assert folder.record.recipe_hash == folder.recipe.hash()


def test_the_lock_stays_and_no_link_that_leads_out_of_a_run_is_written_through(
    given: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = run(given)
    assert (folder / ".lock").exists()
    (tmp_path / "victim").write_text("precious")
    for name in (".lock", "run.json.tmp", "checkpoints/step-000006/x"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "victim")
        with pytest.raises(UserError, match=f"links in it lead out of the folder: {name} to {tmp_path / 'victim'}"):
            run({"resume": str(folder)})
        (folder / name).unlink()
    assert (tmp_path / "victim").read_text() == "precious"
    (folder / "link").symlink_to("recipe.yaml")
    run({"resume": str(folder)})


def test_an_output_folder_with_nothing_but_a_lock_is_taken(given: dict[str, Any]) -> None:
    folder = Path(given["output"])
    folder.mkdir()
    (folder / ".lock").touch()  # of a process that was killed before it had written anything
    assert run(given)[0] == folder


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(given, Stops())
    other = tmp_path / "other"
    with pytest.raises(Interrupted):
        run(given | {"output": str(other), "learning_rate": 0.5}, Stops())
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(Path(given["output"]) / "checkpoints", other / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints/step-000003 was made by another recipe"):
        run({"resume": str(other)})


# --- a stranger's run


def test_resuming_takes_no_program_from_the_record(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        run(given, Stops())
    folder = Path(given["output"])
    known = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(known | {"options": known["options"] | {"llama_cpp": "evil/dir"}}))
    taken: list[Options] = []
    real = module.prepare

    def watched(options: Options, *rest: Any) -> Job:
        taken.append(options)
        return real(options, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare", watched)
        options = Options.model_validate({"resume": str(folder)})
        run_training(options, context("plain", Bigram))
    assert [options.llama_cpp for options in taken] == [None]
    printed = " ".join(capsys.readouterr().out.split())
    assert "The run was made with --llama-cpp 'evil/dir'. A program is never taken from a run's record" in printed


def test_resume_refuses_data_that_changed(given: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        run(given, Stops())
    write_rows(Path(given["data"]), 23)
    with pytest.raises(UserError) as caught:
        run({"resume": given["output"]})
    assert caught.value.what.startswith(
        f"{given['output']}: its recipe has changed since it began (changed: data_hash, rows_hash)"
    )
    assert caught.value.fix.startswith(
        "Restore the old files, or start a new run. If no file has changed, this version"
    )


def test_nan_loss_leaves_an_interrupted_run_that_can_go_on(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"not finite at step 5, on the rows rows\.jsonl:"):
        run(given, Bigram(nan_step=5))
    known = json.loads((Path(given["output"]) / "run.json").read_text())
    assert (known["status"], known["steps"]) == ("interrupted", 4)
    run({"resume": given["output"]})
    assert json.loads((Path(given["output"]) / "run.json").read_text())["steps"] == 6


def test_a_resumed_runs_peaks_are_those_of_the_whole_run(given: dict[str, Any]) -> None:
    class Hungry(Stops):
        def memory(self) -> Any:
            return Memory(1, 1_000_000, 3, "rss", 0)

    with pytest.raises(Interrupted):
        run(given, Hungry())
    folder, _ = run({"resume": given["output"]})
    assert json.loads((folder / "run.json").read_text())["peak_memory_bytes"] == 1_000_000


def test_what_another_backend_took_is_no_peak_of_this_one(given: dict[str, Any]) -> None:
    class Other(Stops):
        def memory(self) -> Any:
            return Memory(1, 10**15, 3, "unified", 0)

    with pytest.raises(Interrupted):
        run(given, Other())
    folder, _ = run({"resume": given["output"]})
    assert json.loads((folder / "run.json").read_text())["peak_memory_bytes"] < 10**15


# --- to the hub at the end


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as found:
        found.enter(monkeypatch, tmp_path)
        yield found


def test_the_result_is_uploaded_at_the_end(given: dict[str, Any], hub: Hub) -> None:
    folder, _ = run(given | {"export": "fused", "push": "me/pip", "push_public": True})
    assert hub.asked[0] == "GET /api/whoami-v2"
    (repo,) = hub.repos
    assert repo.get("private") is False or repo.get("visibility") == "public"
    (files,) = hub.commits
    assert files["model.safetensors"] == (folder / "fused" / "model.safetensors").read_bytes()
    assert files["adapter/adapter_model.safetensors"] == (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert not [name for name in files if name.startswith(("checkpoints", "run", "metrics", "recipe", "adapter-mlx"))]
    assert files["README.md"] == (folder / "fused" / "README.md").read_bytes()
    assert b"22 training rows" in files["README.md"]
    everything = b"".join(files.values())
    assert TOKEN.encode() not in everything
    for place in (str(folder.parent), given["model"], str(Path.home())):
        assert place.encode() not in everything, place
    known = json.loads((folder / "run.json").read_text())
    assert known["pushed"]["repo"] == "me/pip"
    assert TOKEN not in json.dumps(known)


def test_a_failed_upload_loses_nothing(given: dict[str, Any], hub: Hub) -> None:
    hub.fail = "/commit/"
    with pytest.raises(UserError) as caught:
        run(given | {"export": "fused", "push": "me/pip"})
    folder = Path(given["output"])
    assert f"is complete. Try again: python cli.py push {folder} me/pip" in caught.value.fix
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"
    assert (folder / "fused" / "model.safetensors").exists()
    hub.fail = ""
    push(folder, "me/pip", Upload(), Display("quiet"))
    assert len(hub.commits) == 1


def test_a_name_or_token_that_the_hub_refuses_is_told_before_training(given: dict[str, Any], hub: Hub) -> None:
    assert "Cannot have -- or .. in repo_id" in fault(given, push="me/a--b").what
    assert "your token is for me, team" in fault(given, push="you/pip").what
    assert hub.repos == []
