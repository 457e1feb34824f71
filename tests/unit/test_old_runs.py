"""Runs of another version: those of 0.1 continue, and a field that this version does not know loses none."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.commands.compare import compare
from common.commands.fuse import fuse_run
from common.commands.prepare import Job, prepare
from common.commands.train import run_training
from common.data.sources import data_of, encoder_of
from common.display import Display
from common.errors import UserError
from common.inference.chat_models import choose
from common.llama_cpp.imatrix import calibration_of
from common.option_sources import options_over
from common.options import Options
from common.recipe import VERSION, Parent
from common.run_record import Run
from common.verify import cases
from common.verify.cases import cases_of
from tests.contexts import context
from tests.tiny import chat, write_rows
from tests.unit.bigram import Bigram
from tests.unit.old_run import edit_record, edit_yaml, make_old


class Stops(Bigram):
    """Fails at step 5, which is as good as a kill."""

    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return super().train_step(micro_batches, learning_rate, step)


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama),
        "data": str(write_rows(tmp_path / "rows.jsonl")),
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "rank": 2,
        "steps": 6,
        "eval_every": 2,
        "save_every": 2,
    }


def run(given: dict[str, Any], output: Path, backend: Bigram | None = None) -> Path:
    options = Options.model_validate(given | {"output": str(output)})
    return run_training(options, context(create=lambda: backend or Bigram()))


def prepared(given: dict[str, Any]) -> Job:
    return prepare(Options.model_validate(given), None, context())


def resume(folder: Path, backend: Bigram | None = None, **length: int) -> None:
    options = Options.model_validate({"resume": str(folder)} | length)
    run_training(options, context(create=lambda: backend or Bigram()))


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def half_trained(given: dict[str, Any], output: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(given, output, Stops())
    return output


def test_a_half_trained_run_of_version_0_1_goes_on_to_the_last_bit(given: dict[str, Any], tmp_path: Path) -> None:
    complete = run(given | {"min_delta": 0.0}, tmp_path / "complete")
    cut = make_old(half_trained(given, tmp_path / "cut"))
    assert (cut / "checkpoints" / "step-000004" / "adapter-mlx").is_dir()
    resume(cut)
    assert metrics(cut) == metrics(complete)
    assert (cut / "adapter" / "adapter_model.safetensors").read_bytes() == (
        complete / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert not (cut / "checkpoints" / "step-000006" / "adapter-mlx").exists()
    assert (cut / "verify-cases.json").exists()


@pytest.mark.slow
def test_a_run_of_version_0_1_is_lengthened(given: dict[str, Any], tmp_path: Path) -> None:
    """Its recipe stays of its version, so that it may be stopped and resumed like any other."""
    complete = make_old(run(given | {"steps": 4}, tmp_path / "complete"))
    cut = make_old(run(given | {"steps": 4}, tmp_path / "cut"))
    before = Run(cut).recipe
    resume(complete, steps=8)
    with pytest.raises(KeyboardInterrupt):
        resume(cut, Stops(), steps=8)
    resume(cut)
    assert metrics(cut) == metrics(complete)
    assert Run(cut).recipe.version == before.version == 1
    assert Run(cut).recipe.parent == Parent(recipe=before.hash(), step=4)


def test_a_run_of_version_0_1_is_chatted_with_compared_fused_and_verified(
    given: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    folder = run(given, tmp_path / "run")
    kept = cases_of(Run(folder), tiny_llama)
    make_old(folder)
    assert choose(folder, "adapter", None).kind == "adapter"
    compare([folder, folder], Display("quiet"))
    fuse_run(folder, {"export": "fused"}, context(create=Bigram))
    assert Run(folder).record.export.fused == "fused"
    again = cases_of(Run(folder), tiny_llama)  # of its data
    assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in kept.rows]
    assert [row.mask.tolist() for row in again.rows] == [row.mask.tolist() for row in kept.rows]
    assert (again.held_out, again.texts) == (kept.held_out, kept.texts)
    assert [vars(prompt) | {"row": 0} for prompt in again.prompts] == [
        vars(prompt) | {"row": 0} for prompt in kept.prompts
    ]
    assert [prompt.ids for prompt in again.prompts] == [prompt.ids for prompt in kept.prompts]


def test_fields_that_this_version_does_not_know_are_kept(given: dict[str, Any], tmp_path: Path) -> None:
    folder = run(given, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    export = record["export"] | {"onnx": "onnx/model.onnx", "gguf": [{"file": "a.gguf", "quant": "Q9", "hue": 3}]}
    edit_record(folder, color="blue", export=export, options=record["options"] | {"sparkle": 1})
    edit_yaml(folder / "plan.yaml", {"sparkle": 1})
    fuse_run(folder, {"export": "fused"}, context(create=Bigram))
    after = json.loads((folder / "run.json").read_text())
    assert (after["color"], after["options"]["sparkle"], after["export"]["onnx"]) == ("blue", 1, "onnx/model.onnx")
    assert after["export"]["fused"] == "fused"
    (gguf,) = Run(folder).record.export.gguf
    assert (gguf.name, gguf.model_extra) == ("Q9", {"hue": 3})


def test_rows_that_training_dropped_stay_out_when_the_data_are_read_again(
    given: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    lines = Path(given["data"]).read_text().splitlines()
    tools = [json.dumps(json.loads(line) | {"tools": [{"name": "f"}]}) for line in lines]
    bad = ["{", *(json.dumps(chat("Hi", f"a<|im_end|>{number}")) for number in range(3))]
    (tmp_path / "rows.jsonl").write_text("\n".join([*bad, *tools]))
    settings = {"on_bad_row": "drop", "tools": "system", "valid_share": 0.5}
    complete, cut = run(given | settings, tmp_path / "complete"), half_trained(given | settings, tmp_path / "cut")
    resume(cut)
    assert metrics(cut) == metrics(complete)
    kept = cases_of(Run(complete), tiny_llama)
    (complete / "verify-cases.json").unlink()
    again = cases_of(Run(complete), tiny_llama)
    assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in kept.rows]
    assert [prompt.messages for prompt in again.prompts] == [prompt.messages for prompt in kept.prompts]
    options = options_over(Run(complete).record.options, {})
    rows, encoder = data_of(Run(complete), options).train, encoder_of(tiny_llama, options, Run(complete).recipe)
    text = calibration_of(rows, encoder).text
    assert text.count("You may call these functions") == len([row for row in rows if row.tools])
    assert "a<|im_end|>" not in text


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "[" * 10**5),
        '{"held_out": true, "texts": [], "prompts": [], "rows": [{"ids": [1], "labels": [9], "source": ""}]}',
        '{"held_out": true, "texts": [], "prompts": [], "rows": [{"ids": [10000000000], "labels": [], "source": ""}]}',
        '{"held_out": true, "texts": [1], "prompts": [], "rows": []}',
    ],
)
@pytest.mark.slow
def test_cases_that_cannot_be_read_are_made_of_the_data(
    given: dict[str, Any], tmp_path: Path, tiny_llama: Path, text: str
) -> None:
    folder = run(given, tmp_path / "run")
    kept = cases_of(Run(folder), tiny_llama)
    (folder / "verify-cases.json").write_text(text)
    again = cases_of(Run(folder), tiny_llama)
    assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in kept.rows]
    assert len(again.prompts) == len(kept.prompts) > 0


def test_few_long_rows_are_kept(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [len(row.ids) for row in prepared(given).cases.rows]
    monkeypatch.setattr(cases, "_TOKENS", rows[0] + rows[1] - 1)
    assert [len(row.ids) for row in prepared(given).cases.rows] == rows[:1]


def test_the_hash_of_a_recipe_of_version_0_1_is_the_one_it_was_given(given: dict[str, Any], tmp_path: Path) -> None:
    folder = make_old(run(given, tmp_path / "run"))
    recipe = Run(folder).recipe
    assert recipe.version == 1
    fields = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert not fields.keys() & {"version", "rows_hash"}
    text = json.dumps({k: v for k, v in fields.items() if k not in ("model", "data")}, sort_keys=True)
    assert recipe.hash() == hashlib.sha256(text.encode()).hexdigest()
    assert recipe.hash() != recipe.model_copy(update={"version": 2}).hash()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_weight_decay_is_not_changed_within_a_run(given: dict[str, Any], tmp_path: Path, method: str) -> None:
    cut = make_old(half_trained(given | {"weight_decay": 0.1}, tmp_path / "cut"))
    edit_yaml(cut / "recipe.yaml", {"method": method})
    if method == "lora":
        resume(cut)
        assert Run(cut).record.status == "complete"
        return
    with pytest.raises(UserError) as caught:
        resume(cut)
    assert caught.value.what.endswith("which differs in weight_decay, which fell on every parameter.")


def test_a_run_whose_rows_this_version_labels_otherwise_is_not_resumed(given: dict[str, Any], tmp_path: Path) -> None:
    cut = half_trained(given, tmp_path / "cut")
    edit_yaml(cut / "recipe.yaml", {"rows_hash": "cafe"})
    edit_record(cut, recipe_hash=Run(cut).recipe.hash())
    with pytest.raises(UserError) as caught:
        resume(cut)
    assert caught.value.what == f"{cut}: its recipe has changed since it began (changed: rows_hash)."
    assert "resume the run with the version that began it (environment.json names it)" in caught.value.fix


def test_a_recipe_of_a_newer_version_is_not_resumed(given: dict[str, Any], tmp_path: Path) -> None:
    cut = half_trained(given, tmp_path / "cut")
    edit_yaml(cut / "recipe.yaml", {"version": VERSION + 1})
    with pytest.raises(UserError, match="another version of Twintune wrote its recipe, which differs in version"):
        resume(cut)


@pytest.mark.parametrize("change", [{"sparkle": 3}, {"lora_plus": None}], ids=["unknown", "missing"])
@pytest.mark.slow
def test_a_recipe_of_another_version_is_fused_and_not_resumed(
    given: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    complete, cut = run(given, tmp_path / "complete"), half_trained(given, tmp_path / "cut")
    for folder in (complete, cut):
        edit_yaml(folder / "recipe.yaml", change)
    fuse_run(complete, {"export": "fused"}, context(create=Bigram))
    assert choose(complete, "fused", None).kind == "fused"
    compare([complete, complete], Display("quiet"))
    before = metrics(cut)
    with pytest.raises(UserError) as caught:
        resume(cut)
    (name,) = change
    assert caught.value.what == (
        f"{cut} cannot be resumed: another version of Twintune wrote its recipe, which differs in {name}."
    )
    assert f"--adapter {cut}/checkpoints/step-" in caught.value.fix
    assert metrics(cut) == before


def test_a_recipe_that_cannot_be_read_is_one_line(given: dict[str, Any], tmp_path: Path) -> None:
    folder = run(given, tmp_path / "run")
    edit_yaml(folder / "recipe.yaml", {"method": "qalora"})
    for attempt in (lambda: fuse_run(folder, {"export": "fused"}, context(create=Bigram)), lambda: resume(folder)):
        with pytest.raises(UserError, match=r"recipe\.yaml cannot be read by this version: method: Input should be"):
            attempt()


def test_an_option_of_another_version_does_not_stop_a_resume(given: dict[str, Any], tmp_path: Path) -> None:
    cut = half_trained(given, tmp_path / "cut")
    options = json.loads((cut / "run.json").read_text())["options"]
    edit_record(cut, options=options | {"sparkle": 1})
    resume(cut)
    assert Run(cut).record.status == "complete"


def test_an_option_with_a_value_of_another_version_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    folder = run(given, tmp_path / "run")
    options = json.loads((folder / "run.json").read_text())["options"]
    edit_record(folder, options=options | {"export": "onnx"})
    with pytest.raises(UserError, match="the run's export: Input should be"):
        fuse_run(folder, {}, context(create=Bigram))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"model_hash": None}, "model_hash"),
        ({"export": {"gguf": [{}]}}, r"export\.gguf\.0\.file"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
    ],
    ids=["gone", "nested", "type"],
)
def test_a_record_that_is_no_record_says_why(
    given: dict[str, Any], tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    folder = run(given, tmp_path / "run")
    edit_record(folder, **change)
    with pytest.raises(UserError, match=rf"run\.json is not the record of a run: .*{fault}"):
        _ = Run(folder).record


def test_a_misspelled_field_is_a_fault_of_ours(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="status_"):
        Run(run(given, tmp_path / "run")).update(status_="complete")


def test_interrupted_is_not_complete(given: dict[str, Any], tmp_path: Path) -> None:
    cut = half_trained(given, tmp_path / "cut")
    with pytest.raises(UserError, match="has not finished training"):
        fuse_run(cut, {}, context(create=Bigram))
