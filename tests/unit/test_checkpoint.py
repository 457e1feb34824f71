"""Checkpoints: complete or skipped, the marker last, two kept."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from common import files
from common.backend import Adapter, LoraWeight, OptimizerState
from common.errors import UserError
from common.export.fused_folder import checkpoints_disk, trained_bytes
from common.lazy_arrays import LazyArrays
from common.training import checkpoint
from common.training.checkpoint import State, _folder, add_evaluation, discard, latest, latest_step, save
from tests import ROOT

LAYER = "model.layers.0.self_attn.q_proj"
RECIPE = "5b9469e38a2c" * 5


def adapter(seed: int) -> Adapter:
    random = np.random.default_rng(seed)
    A, B = (random.normal(size=shape).astype(np.float32) for shape in ((2, 6), (4, 2)))
    return Adapter("some/model", 1, 0.25, {LAYER: LoraWeight(A, B, 8.0)})


def optimizer(seed: int, step: int) -> OptimizerState:
    random = np.random.default_rng(seed)
    shapes = {f"{LAYER}.lora_A": (2, 6), f"{LAYER}.lora_B": (4, 2)}
    first, second = ({n: random.random(shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(2))
    return OptimizerState(step, first, second)


def put(run: Path, step: int) -> Path:
    return save(run, State(step=step, tokens=10 * step), adapter(step), optimizer(step, step), RECIPE, 2)


def same(one: Adapter, other: Adapter) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        np.array_equal(w.A, other.weights[n].A) and np.array_equal(w.B, other.weights[n].B)
        for n, w in one.weights.items()
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    state = State(
        step=40,
        tokens=1,
        label_tokens=2,
        padded_tokens=3,
        train_seconds=4.5,
        timed_seconds=5.5,
        timed_tokens=6,
        timed_label_tokens=7,
        micro_batch_tokens=8,
        train_loss=0.1 + 0.2,
        best_valid_loss=1 / 3,
        best_step=20,
        best=adapter(1),
    )
    assert save(tmp_path, state, adapter(2), optimizer(3, 39), RECIPE, 2) == tmp_path / "checkpoints" / "step-000040"
    found = latest(tmp_path)
    assert found is not None
    again, current, moments = found
    assert {**asdict(again), "best": 0} == {**asdict(state), "best": 0}
    assert again.best is not None
    assert same(again.best, adapter(1))
    assert same(current, adapter(2))
    assert (current.base_model, current.layers, current.weights[LAYER].alpha, current.dropout) == (
        "some/model",
        1,
        8.0,
        0.25,
    )
    assert moments.step == 39
    for part, wanted in (("exp_avg", optimizer(3, 39).exp_avg), ("exp_avg_sq", optimizer(3, 39).exp_avg_sq)):
        got = getattr(moments, part)
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_every_field_of_the_state_is_written(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text()).keys() == (asdict(State()).keys() - {"best"}) | {
        "optimizer_step",
        "layers",
        "recipe_hash",
    }


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest_step(tmp_path) is None


def test_the_newest_step_is_found_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    put(tmp_path, 12)
    monkeypatch.setattr(checkpoint, "file_digest", lambda path: pytest.fail("read"))
    assert latest_step(tmp_path) == 12
    (tmp_path / "checkpoints" / "step-000012" / "COMPLETE").unlink()
    assert latest_step(tmp_path) == 1


def test_the_marker_lists_every_file(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    assert sorted(json.loads((folder / "COMPLETE").read_text())) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unnamed, real = _folder(tmp_path, 1), [], files._sync
    monkeypatch.setattr(files, "_sync", lambda path: (folder.exists() or unnamed.append(path), real(path)))
    put(tmp_path, 1)
    assert {path.name for path in unnamed} >= {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_were_asked_for(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 10, 3000):
        save(tmp_path, State(step=step), adapter(step), optimizer(step, step), RECIPE, keep)
    assert names(tmp_path) == ["step-000002", "step-000010", "step-003000"][-keep:]


def test_from_the_millionth_step_on_they_are_found_and_removed(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        put(tmp_path, step)
    assert names(tmp_path) == ["step-1000000", "step-1000001"]
    assert latest_step(tmp_path) == 1_000_001
    found = latest(tmp_path)
    assert found is not None
    assert found[0].step == 1_000_001


def test_one_that_was_damaged_and_passed_over_is_not_counted(tmp_path: Path) -> None:
    flip(put(tmp_path, 40) / "state.json")
    save(tmp_path, State(step=30), adapter(3), optimizer(3, 30), RECIPE, 1)
    assert names(tmp_path) == ["step-000030"]


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = put(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()} == {"0o640"}


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """The file that safetensors writes by itself, and not the temporary one."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from tests.unit.test_checkpoint import put\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "try: put(Path(sys.argv[1]), 1)\n"
        "except OSError as error: sys.exit(error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == str(tmp_path / "checkpoints/step-000001/adapter/adapter_model.safetensors")
    assert names(tmp_path) == []


def test_the_disk_that_checkpoints_take_is_counted(tmp_path: Path) -> None:
    """Two that are kept and one that is being written, and at the end the adapter in two layouts."""
    wide = LoraWeight(np.ones((64, 4096), np.float32), np.ones((4096, 64), np.float32), 8.0)
    large = Adapter("some/model", 1, 0.0, {LAYER: wide})
    moments = OptimizerState(1, large.arrays(), large.arrays())
    folder = save(tmp_path, State(step=1, best=large), large, moments, RECIPE, 2)
    one = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    size = trained_bytes(large, tmp_path)
    assert 4 * size <= one < 1.01 * 4 * size
    assert checkpoints_disk(size, 2) == 3 * 4 * size + 2 * size


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    put(tmp_path, 5)
    save(tmp_path, State(step=5, tokens=99), adapter(7), optimizer(7, 5), RECIPE, 2)
    found = latest(tmp_path)
    assert found is not None
    assert found[0].tokens == 99
    assert names(tmp_path) == ["step-000005"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [Path.unlink, truncate, flip])
@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "best/adapter/adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    put(tmp_path, 1)
    folder = save(tmp_path, State(step=2, best=adapter(9)), adapter(2), optimizer(2, 2), RECIPE, 2)
    harm(folder / name)
    heard: list[str] = []
    found = latest(tmp_path, warn=heard.append)
    assert found is not None
    assert found[0].step == 1
    assert same(found[1], adapter(1))
    assert heard == [f"{folder} is damaged: training continues from step 1, and at least 1 steps are done again"]


def test_a_damaged_checkpoint_with_none_before_it_is_said_to_begin_again(tmp_path: Path) -> None:
    folder, heard = put(tmp_path, 2), []
    flip(folder / "state.json")
    assert latest(tmp_path, warn=heard.append) is None
    assert heard == [f"{folder} is damaged: training continues from the start, and at least 2 steps are done again"]


@pytest.mark.parametrize("text", ["", "{}", "{", "[1]", "\udcff", None])
def test_a_checkpoint_without_a_complete_marker_is_passed_over(tmp_path: Path, text: str | None) -> None:
    put(tmp_path, 1)
    marker = put(tmp_path, 2) / "COMPLETE"
    marker.unlink()
    if text is not None:
        marker.write_bytes(text.encode(errors="surrogateescape"))
    found = latest(tmp_path)
    assert found is not None
    assert found[0].step == 1


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    shutil.copytree(folder, folder.with_name("step-000002.tmp"))
    found = latest(tmp_path)
    assert found is not None
    assert found[0].step == 1


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path, 2)
    monkeypatch.undo()
    found = latest(tmp_path)
    assert found is not None
    assert found[0].step == 1
    put(tmp_path, 2)  # the rest of the failed one is not in the way
    assert names(tmp_path) == ["step-000001", "step-000002"]


# --- the validation after a step, and whose checkpoint it is


def evaluated(run: Path, step: int, best: int) -> None:
    add_evaluation(run, State(step=step, evaluated=step, best_valid_loss=0.5, best_step=best), 2)


def test_a_validation_after_the_save_is_added_to_the_checkpoint(tmp_path: Path) -> None:
    save(
        tmp_path,
        State(step=8, best_valid_loss=0.7, best_step=4, best=adapter(4)),
        adapter(8),
        optimizer(8, 8),
        RECIPE,
        2,
    )
    before = latest(tmp_path)
    assert before is not None
    assert (before[0].evaluated, before[0].best_step) == (0, 4)
    evaluated(tmp_path, 8, best=8)
    found = latest(tmp_path)
    assert found is not None
    assert (found[0].evaluated, found[0].best_valid_loss, found[0].best_step) == (8, 0.5, 8)
    assert found[0].best is not None
    assert same(found[0].best, adapter(8))  # the checkpoint's own: it was not written twice
    assert found[0].best.weights[LAYER].A is not found[1].weights[LAYER].A


def test_a_validation_that_was_not_the_best_leaves_the_best_as_it_was(tmp_path: Path) -> None:
    save(
        tmp_path,
        State(step=8, best_valid_loss=0.5, best_step=4, best=adapter(4)),
        adapter(8),
        optimizer(8, 8),
        RECIPE,
        2,
    )
    evaluated(tmp_path, 8, best=4)
    found = latest(tmp_path)
    assert found is not None
    assert found[0].evaluated == 8
    assert found[0].best is not None
    assert same(found[0].best, adapter(4))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"evaluated": 8}'])
def test_an_evaluation_that_cannot_be_read_is_one_that_was_not_done(tmp_path: Path, text: str) -> None:
    folder = put(tmp_path, 8)
    (folder / "evaluation.json").write_text(text)
    found = latest(tmp_path)
    assert found is not None
    assert (found[0].step, found[0].evaluated) == (8, 0)


def test_a_discarded_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    discard(tmp_path, 2)
    discard(tmp_path, 3)
    assert names(tmp_path) == ["step-000001"]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    assert latest(tmp_path, RECIPE) is not None
    with pytest.raises(UserError) as caught:
        latest(tmp_path, "7bd55ee9" * 8)
    assert caught.value.what == (f"{folder} was made by another recipe (5b9469e38a2c) than the run's (7bd55ee97bd5).")
    assert str(folder) in str(caught.value)


def test_a_checkpoint_of_an_older_version_knows_no_recipe_and_is_taken(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    changed(folder, lambda state: [state.pop(name) for name in ("recipe_hash", "evaluated")])
    found = latest(tmp_path, RECIPE)
    assert found is not None
    assert (found[0].step, found[0].evaluated) == (1, 1)  # that version had validated before it saved


def changed(folder: Path, change: Callable[[dict], object]) -> None:
    """As another version of Twintune would have written the checkpoint's state.json, with the files' hashes."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    files = [path for path in folder.rglob("*") if path.is_file()]
    hashes = {str(path.relative_to(folder)): checkpoint.file_digest(path) for path in files}
    del hashes["COMPLETE"]
    (folder / "COMPLETE").write_text(json.dumps(hashes))


def test_fields_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    changed(put(tmp_path, 1), lambda state: state.update(ema_decay=0.9, best="x"))
    found = latest(tmp_path, RECIPE)
    assert found is not None
    assert (found[0].step, found[0].tokens, found[0].best) == (1, 10, None)


@pytest.mark.parametrize("name", ["step", "optimizer_step", "layers"])
def test_a_checkpoint_without_a_field_that_is_needed_is_refused(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path, 1)
    changed(folder, lambda state: state.pop(name))
    with pytest.raises(UserError) as caught:
        latest(tmp_path)
    assert caught.value.what == f"{folder / 'state.json'} has no {name}: another version of Twintune wrote it."
    assert str(folder) in str(caught.value)


def test_a_state_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    (folder / "state.json").write_text("[]")
    hashes = {"state.json": checkpoint.file_digest(folder / "state.json")}
    (folder / "COMPLETE").write_text(json.dumps(hashes))
    with pytest.raises(UserError, match=r"state\.json is not a JSON object"):
        latest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "40"}, "step: Input should be a valid integer"),
        ({"best_valid_loss": [1]}, "best_valid_loss: Input should be a valid number"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing: Input should be a valid boolean"),
        ({"recipe_hash": 7}, "recipe_hash: Input should be a valid string"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, change: dict, words: str) -> None:
    folder = put(tmp_path, 40)
    changed(folder, lambda state: state.update(change))
    with pytest.raises(UserError, match=r"state\.json cannot be read by this version") as caught:
        checkpoint.latest(tmp_path)
    assert words in caught.value.what


def test_an_optimizer_state_that_is_no_safetensors(tmp_path: Path) -> None:
    folder = put(tmp_path, 40)
    (folder / "optimizer.safetensors").write_bytes(b"<html>")
    changed(folder, lambda state: None)
    with pytest.raises(UserError, match=r"optimizer\.safetensors is damaged: "):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1)
    found, start = latest(tmp_path), adapter(0)
    found.require_fit(start)
    found.require_fit(None)
    found.require_fit(replace(start, weights={LAYER: replace(start.weights[LAYER], magnitude=None)}))
    wide = replace(start.weights[LAYER], A=np.zeros((4, 6), np.float32), B=np.zeros((4, 4), np.float32))
    moments = found.optimizer
    for other, begun in (
        (found, replace(start, weights={LAYER: wide})),
        (found, replace(start, weights={"model.layers.0.mlp.up_proj": start.weights[LAYER]})),
        (found._replace(optimizer=replace(moments, exp_avg={})), start),
        (found._replace(optimizer=replace(moments, exp_avg_sq={**moments.exp_avg_sq, "more": np.zeros(1)})), None),
    ):
        with pytest.raises(UserError, match=r"step 1 holds other tensors than the recipe trains") as caught:
            other.require_fit(begun)
        assert "Remove its folder" in str(caught.value)


def test_a_checkpoint_without_a_state(tmp_path: Path) -> None:
    folder = put(tmp_path, 40)
    (folder / "state.json").unlink()
    marker = folder / "COMPLETE"
    hashes = json.loads(marker.read_text())
    marker.write_text(json.dumps({name: digest for name, digest in hashes.items() if name != "state.json"}))
    for read in (checkpoint.latest, lambda run: checkpoint.latest_recipe(run, "")):
        with pytest.raises(UserError, match=r"step-000040 has no state\.json"):
            read(tmp_path)


def test_a_marker_opens_no_file_outside(tmp_path: Path) -> None:
    folder = put(tmp_path, 40)
    (folder / "COMPLETE").write_text('{"/dev/zero": "00", "../../x": "00"}')
    assert checkpoint.latest(tmp_path) is None


def test_what_every_weight_became_is_read_from_its_checkpoint_and_else_copied(tmp_path: Path) -> None:
    asked: list[str] = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return np.full(3, len(asked), np.float32)

    trained = Adapter("some/model", 2, 0.0, {}, LazyArrays({"w": (3,)}, read))
    assert checkpoint.outlasting(tmp_path, 4, trained).full["w"][0] == 1  # copied: nothing was saved
    moments = OptimizerState(4, *(LazyArrays({"w": (3,)}, read) for _ in range(2)))
    checkpoint.save(tmp_path, State(4), trained, moments, "hash", 1)
    before = len(asked)
    kept = checkpoint.outlasting(tmp_path, 4, trained)
    assert kept.full["w"].tolist() == [2, 2, 2]
    assert (kept.layers, kept.base_model, len(asked)) == (2, "some/model", before)
    assert checkpoint.outlasting(tmp_path, 5, trained).full["w"][0] == before + 1
