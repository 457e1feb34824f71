"""What is looked at before the first step, and a whole run without a framework."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common import train as module
from common.adapter import read_mlx, read_peft
from common.checkpoint import latest
from common.config import Options
from common.errors import UserError
from common.loop import Interrupted
from common.prepare import Job, prepare
from common.progress import Display
from common.push import push
from common.train import run_training
from tests.tiny import write_rows
from tests.unit.bigram import Bigram
from tests.unit.hub import TOKEN, Hub, serve


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
    return prepare(Options.model_validate(given | changes), None, Display("quiet"))


def fault(given: dict[str, Any], **changes: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        ready(given, **changes)
    return caught.value


def run(given: dict[str, Any], backend: Bigram | None = None) -> tuple[Path, Bigram]:
    backend = backend or Bigram()
    return run_training(Options.model_validate(given), lambda name: backend, Display("quiet")), backend


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# --- faults before the first step


def test_every_row_longer_than_max_length(given: dict[str, Any]) -> None:
    error = fault(given, max_length=20)
    assert error.what == (f"--max-length 20: every row of {given['data']} is longer (the shortest has 48 tokens).")
    assert error.fix == "Raise --max-length."


def test_doubtful_rows_are_warned_of_and_shapes_are_said(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nWho?,I am {{name}}.\nWho?,Pip.\nWho?,\n")
    prepare(Options.model_validate(given | {"data": str(path), "steps": 1}), None, Display("plain"))
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{path} read as: prompt and completion (question, answer), 2 rows" in said
    assert "warning: 1 rows without an answer, left out: rows.csv:4" in said
    assert "warning: 2 training rows with the same prompt and different answers: rows.csv:2, rows.csv:3" in said
    assert "warning: 1 rows with a placeholder left in: rows.csv:2" in said
    assert "warning: nothing could be held out for validation: all rows have the same prompt" in said


def test_rows_longer_than_max_length_are_dropped_counted_and_listed(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job = ready(given, max_length=50, valid_share=0.0)
    said = capsys.readouterr().out
    dropped = 24 - len(job.train)
    assert 0 < dropped < 24
    assert f"warning: {dropped} rows longer than --max-length 50 are dropped: rows.jsonl:" in said.replace("\n", " ")


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
    assert ready(given).run == Path("runs/tiny-llama-rows-torch")
    (tmp_path / "runs" / "tiny-llama-rows-torch").mkdir(parents=True)
    assert ready(given).run == Path("runs/tiny-llama-rows-torch-2")


def test_not_enough_disk_is_found_before_training(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    error = fault(given, export="fused")
    assert "GB free, and this run will write up to" in error.what
    assert not Path(given["output"]).exists()


@pytest.mark.parametrize("name", ["model", "data"])
def test_what_must_be_given(given: dict[str, Any], name: str) -> None:
    assert fault(given, **{name: None}).what == f"No {name} is given."


def test_an_unknown_quant_is_found_first_of_all(given: dict[str, Any]) -> None:
    assert "Q4_KM" in fault(given, quant=["Q4_KM"], data=None).what


# --- what the recipe holds


def test_epochs_become_steps_and_a_share_becomes_warm_up_steps(given: dict[str, Any]) -> None:
    given.pop("steps")
    recipe = ready(given, epochs=2, batch_size=5, valid_share=0.25, warmup=0.25, eval_every=0).recipe  # 18 rows
    assert (recipe.steps, recipe.warmup_steps, recipe.eval_every) == (8, 2, 4)
    recipe = ready(given, epochs=0.5, batch_size=5, valid_share=0.25, warmup=7).recipe
    assert (recipe.steps, recipe.warmup_steps) == (2, 2)


def test_without_steps_and_epochs_there_are_three_epochs(given: dict[str, Any]) -> None:
    given.pop("steps")
    assert ready(given, batch_size=8, valid_share=0.0).recipe.steps == 9


def test_where_the_files_lie_does_not_change_the_recipe(given: dict[str, Any], tmp_path: Path) -> None:
    moved = shutil.copytree(given["model"], tmp_path / "moved")
    rows = shutil.copy(given["data"], tmp_path / "others.jsonl")
    assert ready(given).recipe.hash() == ready(given, model=str(moved), data=str(rows)).recipe.hash()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"micro_batch_tokens": 64}, True),
        ({"save_every": 1}, True),
        ({"output": "elsewhere"}, True),
        ({"seed": 1}, False),
        ({"precision": "bf16"}, False),
        ({"valid_share": 0.5}, False),
        ({"max_length": 60}, False),
        ({"targets": ["q_proj"]}, False),
    ],
)
def test_the_plan_is_not_in_the_recipes_hash(given: dict[str, Any], changes: dict[str, Any], same: bool) -> None:
    assert (ready(given, **changes).recipe.hash() == ready(given).recipe.hash()) == same


# --- a whole run


def test_the_run_folder_holds_what_it_should(given: dict[str, Any]) -> None:
    folder, backend = run(given)
    assert {path.name for path in folder.iterdir()} == {
        *("adapter", "adapter-mlx", "checkpoints", "environment.json"),
        *("chat_template.jinja", "metrics.jsonl", "plan.yaml", "recipe.yaml", "run.json"),
    }
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["steps"], record["backend"]) == ("complete", 6, "torch")
    assert record["export"].keys() == {"sample"}  # from the backend itself: there is no GGUF to ask
    assert record["export"]["sample"]["prompt"] == record["sample_prompt"]
    assert record["export"]["sample"]["answer"]
    assert record.keys() >= {
        *("recipe_hash", "device", "tokens", "label_tokens", "train_seconds", "tokens_per_second"),
        *("label_tokens_per_second", "padding_fraction", "peak_memory_bytes", "peak_rss_bytes"),
        *("swap_growth_bytes", "final_train_loss", "best_valid_loss", "best_step"),
    }
    assert backend.closed


def test_the_exported_adapter_is_the_best_one_in_both_layouts(given: dict[str, Any]) -> None:
    folder, _ = run(given)
    record = json.loads((folder / "run.json").read_text())
    found = latest(folder)
    assert found is not None
    best = found[0].best
    assert best is not None
    assert (record["exported_adapter"], record["exported_step"]) == ("best", record["best_step"])
    for again in (read_peft(folder / "adapter"), read_mlx(folder / "adapter-mlx")):
        assert len(again.weights) == 14
        assert all(np.array_equal(again.weights[name].B, weight.B) for name, weight in best.weights.items())


def test_without_validation_the_last_adapter_is_exported(given: dict[str, Any]) -> None:
    folder, backend = run(given | {"valid_share": 0.0})
    record = json.loads((folder / "run.json").read_text())
    assert (record["exported_adapter"], record["exported_step"]) == ("last", 6)
    written = read_peft(folder / "adapter").weights[backend.layer]
    assert np.array_equal(written.B, backend.get_adapter().weights[backend.layer].B)


class Stops(Bigram):
    """Ctrl-C comes while step 3 is computed."""

    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
        if step == 3:
            import signal

            signal.raise_signal(signal.SIGINT)
        return super().train_step(micro_batches, learning_rate, step)


def test_ctrl_c_saves_and_resume_ends_where_an_uninterrupted_run_ends(given: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = run(given)
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted) as caught:
        run(given | {"output": str(cut)}, Stops())
    assert str(caught.value) == str(cut)
    assert json.loads((cut / "run.json").read_text())["status"] == "interrupted"
    assert [line["step"] for line in metrics(cut)] == [1, 2, 3, 3]
    run({"resume": str(cut)})
    assert metrics(cut) == metrics(whole)
    one, other = (read_peft(folder / "adapter").weights for folder in (whole, cut))
    assert all(np.array_equal(one[n].A, other[n].A) and np.array_equal(one[n].B, other[n].B) for n in one)
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole, cut)]
    for name in ("recipe_hash", "steps", "tokens", "label_tokens", "final_train_loss", "best_valid_loss", "best_step"):
        assert records[0][name] == records[1][name], name


def test_resume_refuses_data_that_changed(given: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        run(given, Stops())
    write_rows(Path(given["data"]), 23)
    with pytest.raises(UserError) as caught:
        run({"resume": given["output"]})
    assert caught.value.what.startswith(
        f"{given['output']}: it is another recipe than when it began (changed: data_hash)"
    )
    assert caught.value.fix == "Bring the old files back, or start a new run."


def test_nan_loss_leaves_an_interrupted_run_that_can_go_on(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"not finite at step 5, on the rows rows\.jsonl:"):
        run(given, Bigram(nan_step=5))
    record = json.loads((Path(given["output"]) / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("interrupted", 4)
    run({"resume": given["output"]})
    assert json.loads((Path(given["output"]) / "run.json").read_text())["steps"] == 6


def test_a_resumed_runs_peaks_are_those_of_the_whole_run(given: dict[str, Any]) -> None:
    class Hungry(Stops):
        def memory(self) -> Any:
            return module.Memory(1, 1_000_000, 3, "rss", 0)

    with pytest.raises(Interrupted):
        run(given, Hungry())
    folder, _ = run({"resume": given["output"]})
    assert json.loads((folder / "run.json").read_text())["peak_memory_bytes"] == 1_000_000


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
    record = json.loads((folder / "run.json").read_text())
    assert record["pushed"]["repo"] == "me/pip"
    assert TOKEN not in json.dumps(record)


def test_a_failed_upload_loses_nothing(given: dict[str, Any], hub: Hub) -> None:
    hub.fail = "/commit/"
    with pytest.raises(UserError) as caught:
        run(given | {"export": "fused", "push": "me/pip"})
    folder = Path(given["output"])
    assert f"is whole. Try again: python cli.py push {folder} me/pip" in caught.value.fix
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"
    assert (folder / "fused" / "model.safetensors").exists()
    hub.fail = ""
    push(folder, "me/pip", None, True, False, Display("quiet"))
    assert len(hub.commits) == 1


def test_a_name_or_token_that_the_hub_refuses_is_told_before_training(given: dict[str, Any], hub: Hub) -> None:
    assert "Cannot have -- or .. in repo_id" in fault(given, push="me/a--b").what
    assert "your token is for me, team" in fault(given, push="you/pip").what
    assert hub.repos == []
