"""The run folder's record, and what `compare` says of two runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from common import files
from common.commands.compare import compare
from common.display import Display
from common.errors import UserError
from common.recipe import Parent, Recipe
from common.run_record import Run
from common.system.environment import write_environment
from common.training.checkpoint import State
from common.training.metrics import figures
from tests.full_disk import full_disk
from tests.unit.bigram import PLAN, RECIPE, recipe

FIGURES = {
    "status": "complete",
    "backend": "torch",
    "device": "cpu",
    "memory_kind": "rss",
    "tokens_per_second": 100.0,
    "label_tokens_per_second": 40.0,
    "train_seconds": 20.0,
    "peak_memory_bytes": 2_000_000_000,
    "peak_rss_bytes": 4_000_000_000,
    "padding_fraction": 0.05,
    "final_train_loss": 1.5,
    "best_valid_loss": 1.25,
    "best_step": 8,
}


def write_run(folder: Path, the_recipe: Recipe = RECIPE, **changes: Any) -> Path:
    folder.mkdir()
    run = Run(folder)
    run.write_recipe(the_recipe)
    run.write_plan(PLAN)
    begun = {"recipe_hash": the_recipe.hash(), "model_hash": "m", "options": {"model": "x/y"}, "stop_ids": [2]}
    run.update(**(FIGURES | begun | changes))
    return folder


def compared(capsys: pytest.CaptureFixture[str], *runs: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The table's rows by their first cell, and the notes under it."""
    compare(list(runs), Display("json"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (table,) = (event for event in events if event["event"] == "table")
    assert table["columns"] == ["", *(run.name for run in runs)]
    assert [row[0] for row in table["rows"]][:2] == ["recipe", "agrees"]
    return {row[0]: row[1:] for row in table["rows"]}, [e["text"] for e in events if e["event"] == "note"]


# --- compare


def test_a_path_that_is_no_utf_8_survives_the_record(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe())
    Run(run).update(options={"model": "\udcff/base", "data": "rows"})
    assert Run(run).record.options["model"] == "\udcff/base"


def test_runs_of_one_recipe_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mac = write_run(tmp_path / "mac", backend="mlx", tokens_per_second=50.0, peak_memory_bytes=1_000_000_000)
    cuda = write_run(tmp_path / "cuda", recipe(model="elsewhere", data="other.jsonl"), tokens_per_second=200.0)
    rows, notes = compared(capsys, mac, cuda)
    assert rows["recipe"] == [RECIPE.hash()[:12]] * 2
    assert rows["agrees"] == ["-", "yes"]
    assert rows["backend"] == ["mlx", "torch"]
    assert rows["tokens/s"] == ["50.0", "200.0  (4.00x)"]
    assert rows["label tokens/s"] == ["40.0", "40.0  (1.00x)"]
    assert rows["train time, s"] == ["20.0", "20.0  (1.00x)"]
    assert rows["peak memory"] == ["1.00 GB", "2.00 GB  (2.00x)"]
    assert rows["padding (in attention only)"] == ["5.00%", "5.00%  (1.00x)"]
    assert rows["final train loss"] == ["1.5000", "1.5000  (1.00x)"]
    assert rows["best step"] == ["8", "8"]
    assert notes == ["cuda: the same recipe as mac: the same curve up to rounding, so speeds compare."]


def test_runs_of_two_recipes_say_in_which_field_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", recipe(precision="bf16", rank=4, model="elsewhere"))
    rows, notes = compared(capsys, one, other)
    assert rows["agrees"] == ["-", "NO"]
    assert rows["precision"] == ["fp32", "bf16"]
    assert notes == ["other: NOT the same recipe as one, the losses do not compare: rank 2 / 4; precision fp32 / bf16"]


def test_a_run_that_continues_another_recipe_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = Parent(recipe="1a2b3c4d5e6f7a8b", step=200)
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", recipe(parent=parent, steps=9))
    _, notes = compared(capsys, one, other)
    assert notes == [
        "other: NOT the same recipe as one, the losses do not compare: steps 8 / 9; "
        "parent None / 1a2b3c4d5e6f from step 200",
        "other continues 1a2b3c4d5e6f from step 200: its curve until then is of that recipe.",
    ]


def test_of_two_versions_only_the_fields_of_both_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", recipe(version=1))
    other = write_run(tmp_path / "other", recipe(rows_hash="6d2f", rank=4))
    _, notes = compared(capsys, one, other)
    assert notes == [
        "other: NOT the same recipe as one, the losses do not compare: rank 2 / 4; "
        "a recipe of version 1 does not state its rows' hash"
    ]


def test_only_a_run_whose_length_was_changed_has_a_parent_in_its_hash_and_file(tmp_path: Path) -> None:
    """The hashes of all others stay what they were before there was such a field."""
    fields = RECIPE.model_dump(exclude={"model", "data", "weights", "parent", "on_bad_row", "tools", "eval_rows"})
    assert RECIPE.hash() == hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    assert "parent" not in (write_run(tmp_path / "one") / "recipe.yaml").read_text()
    longer = recipe(parent=Parent(recipe="1a2b", step=200))
    assert longer.hash() != RECIPE.hash()
    assert Run(write_run(tmp_path / "other", longer)).resumable_recipe() == longer


def test_dropout_is_told_even_where_recipes_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, recipe(dropout=0.1)) for name in ("one", "other")]
    _, (note,) = compared(capsys, *runs)
    assert note.endswith("Dropout masks differ between frameworks, so the curves agree only statistically.")


def test_three_runs_are_held_against_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, recipe(seed=seed)) for name, seed in (("one", 1), ("two", 2), ("three", 1))]
    rows, notes = compared(capsys, *runs)
    assert rows["agrees"] == ["-", "NO", "yes"]
    assert [note.split(":")[0] for note in notes] == ["two", "three"]


def test_a_figure_that_a_run_lacks_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", best_valid_loss=None, tokens_per_second=None)
    rows, _ = compared(capsys, one, write_run(tmp_path / "other"))
    assert rows["best valid loss"] == ["-", "1.2500"]
    assert rows["tokens/s"] == ["-", "100.0"]


def test_memory_that_is_counted_in_two_ways_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", memory_kind="unified")
    _, notes = compared(capsys, one, write_run(tmp_path / "other"))
    assert notes[-1].startswith("peak memory was measured in different ways (rss, unified)")


def test_a_run_that_has_not_finished_is_not_compared(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", status="interrupted")
    with pytest.raises(UserError) as caught:
        compare([one, other], Display("quiet"))
    assert caught.value.what == f"{other} has not finished training."
    assert caught.value.fix == f"Finish it, or add --finish to export what it has: python cli.py train --resume {other}"


# --- the folder


@pytest.mark.parametrize("name", ["empty", "nowhere", "file"])
def test_a_folder_without_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        _ = Run(tmp_path / name).record
    assert caught.value.what == f"{tmp_path / name} holds no run (no run.json)."
    assert caught.value.fix == "Give a folder that `train` made."


def test_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": ')
    with pytest.raises(UserError, match=r"run\.json is not JSON: Expecting value: line 1"):
        _ = Run(tmp_path).record


@pytest.mark.parametrize(
    "export",
    [{"gguf": [{"file": "/etc/passwd"}]}, {"fused": "../other"}, {"mmproj": "gguf/../../x"}, {"lora_gguf": "/x.gguf"}],
)
def test_a_record_names_no_file_outside_its_run(tmp_path: Path, export: dict) -> None:
    run = write_run(tmp_path / "run", export=export)
    with pytest.raises(
        UserError, match=r"run\.json is not the record of a run: export\..*a file outside the run folder"
    ):
        Run(run).require_complete()


def test_a_recipe_that_is_gone_is_told(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    (one / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        compare([one, write_run(tmp_path / "other")], Display("quiet"))


def test_facts_join_the_record(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", steps=1, status="training"))
    run.update(status="complete")
    assert (run.record.steps, run.record.status) == (1, "complete")
    assert sorted(path.name for path in run.path.iterdir()) == ["plan.yaml", "recipe.yaml", "run.json"]


def test_recipe_and_plan_come_back_as_they_were(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "one"))
    assert (run.recipe, run.resumable_recipe(), run.plan) == (RECIPE, RECIPE, PLAN)


def test_speeds_leave_out_first_steps() -> None:
    state = State(
        step=9,
        tokens=900,
        label_tokens=450,
        padded_tokens=1000,
        train_seconds=30.0,
        timed_seconds=10.0,
        timed_tokens=800,
        timed_label_tokens=400,
        train_loss=1.0,
        best_valid_loss=2.0,
        best_step=6,
    )
    got = figures(state, RECIPE, PLAN)
    assert (got["tokens_per_second"], got["label_tokens_per_second"], got["train_seconds"]) == (80.0, 40.0, 30.0)
    assert got["padding_fraction"] == pytest.approx(0.1)
    assert (got["recipe_hash"], got["steps"], got["best_step"]) == (RECIPE.hash(), 9, 6)


def test_a_run_of_one_step_has_no_speed() -> None:
    got = figures(State(step=1, tokens=9, padded_tokens=9), RECIPE, PLAN)
    assert (got["tokens_per_second"], got["padding_fraction"]) == (None, 0.0)


def test_the_environment_names_versions_and_no_person_or_place(tmp_path: Path) -> None:
    write_environment(tmp_path)
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content.keys() == {
        "python",
        "system",
        "machine",
        "processor",
        "cores",
        "threads",
        "memory_bytes",
        "packages",
    }
    assert content["packages"]["numpy"]
    assert content["memory_bytes"] > 0


def test_the_environment_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_environment(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_records_program_is_never_among_its_options(tmp_path: Path) -> None:
    options = {"model": "x/y", "llama_cpp": "runs/theirs/llama"}
    run = write_run(tmp_path / "run", options=options)
    record = Run(run).record
    assert record.options == {"model": "x/y"}
    assert record.named_llama_cpp == "runs/theirs/llama"
    Run(run).update(steps=1)
    assert json.loads((run / "run.json").read_text())["options"] == options  # how it was made stays on record


def test_numbers_that_are_not_finite_are_null_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", verify={"kl": float("nan"), "all": [1.0, float("inf"), (2, -float("inf"))]})
    strict = json.loads((run / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["verify"] == {"kl": None, "all": [1.0, None, [2, None]]}
    Display("json").event("x", kl=float("nan"))
    assert capsys.readouterr().out == '{"event": "x", "kl": null}\n'


def test_a_name_can_be_pasted_into_a_shell_with_its_command(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run;touch marker", status="training"))
    with pytest.raises(UserError) as caught:
        run.require_complete()
    assert caught.value.fix.endswith(f"train --resume '{run.path}'")
    assert str(Run(Path("runs/mac"))) == "runs/mac"


def test_a_chat_template_that_is_not_utf_8(tmp_path: Path) -> None:
    assert Run(tmp_path).read_template() is None
    (tmp_path / "chat_template.jinja").write_bytes(b"\x82")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8 text"):
        Run(tmp_path).read_template()


def test_test_losses_compare_over_the_same_rows_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for other, cell in (("a", "1.0000  (0.50x)"), ("b", "1.0000"), (None, "1.0000")):
        runs = [
            write_run(tmp_path / f"{other}-{number}", test_loss=loss, test_rows=5, test_hash=digest)
            for number, (loss, digest) in enumerate(((2.0, "a"), (1.0, other)))
        ]
        assert compared(capsys, *runs)[0]["test loss"][-1] == cell
