"""Every preset is loaded and planned without the hub, and its line of memory is what is estimated now."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.goals import GOALS
from common.models.lora_init import initial_adapter, layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import adaptable_shapes, linear_shapes
from common.option_sources import load_options
from common.options import Options
from common.presets import PRESETS, preset_file, preset_head, preset_names
from common.recipe import Plan
from common.training.memory_estimate import TrainingMemory, dims_of
from common.training.model_estimate import estimated_plan
from common.training.planner import choose_plan
from tests.backends import make_recipe
from tests.presets import CPU, EVERY, MODELS, preset
from tests.tiny import write_model
from tests.unit.bigram import row

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", EVERY)
def test_a_preset_is_what_is_written_and_estimated_now(name: str) -> None:
    """Where this fails after a change of the estimate: python -m tests.presets."""
    assert preset_file(name).read_text(encoding="utf-8") == preset(name)


@pytest.mark.parametrize("name", EVERY)
def test_a_preset_is_loaded_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, notes = load_options({"config": name, "data": ["my.jsonl"]})
    assert (options.model, options.data, notes) == (EVERY[name][0], ["my.jsonl"], [])
    plain, given = Options(), options.model_fields_set - {"config", "data", "model"}
    assert given, "it changes nothing"
    assert [field for field in given if getattr(options, field) == getattr(plain, field)] == []
    assert not given & {"learning_rate", "epochs", "steps", "batch_size", "rank"}, "--recipe auto chooses these"


def test_there_are_presets_for_every_goal_each_of_them_short() -> None:
    assert MODELS.keys() == GOALS.keys()
    assert {*preset_names()} == {*EVERY, "quickstart"}
    assert len(EVERY) >= 20
    assert [name for name in EVERY if len(preset_file(name).read_text().splitlines()) >= 30] == []


def test_the_head_of_a_preset() -> None:
    head = preset_head("gemma-3-270m-persona")
    assert head["about"] == "google/gemma-3-270m-it speaks as one person does; for 100 rows or more"
    assert head["memory"].endswith("estimated for 100 rows of 160 tokens")
    assert preset_head("quickstart")["memory"] == ""


def test_a_file_comes_before_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gemma-3-1b-persona").write_text("model: own/model\n")
    assert load_options({"config": "gemma-3-1b-persona", "data": "x"})[0].model == "own/model"


def test_a_folder_is_no_preset_and_hides_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gemma-3-1b-persona").mkdir()
    assert load_options({"config": "gemma-3-1b-persona", "data": "x"})[0].model == "google/gemma-3-1b-it"


def fault(config: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_options({"config": config, "data": "x"})
    return caught.value


def test_an_unknown_name_is_answered_with_similar_ones() -> None:
    error = fault("Gemma-3-1b-persna")
    assert error.what.startswith("--config Gemma-3-1b-persna: there is no such file, and no preset of this name")
    assert "similar: gemma-3-1b-persona" in error.what
    assert "init --list" in error.fix
    assert fault("zzzz").what == "--config zzzz: there is no such file, and no preset of this name."


@pytest.mark.parametrize("config", ["nowhere.yaml", "some/where", "../x"])
def test_a_path_is_never_a_preset(config: str) -> None:
    assert fault(config).what == f"--config {config}: no such file."


def test_the_quickstart_by_name_is_the_built_in_example() -> None:
    assert load_options({"config": "quickstart"})[0].data == load_options({})[0].data


def test_what_is_estimated_of_a_config_is_what_is_estimated_of_the_model(tmp_path: Path) -> None:
    """With a model folder and rows that are here, `plan` comes to the same."""
    folder = ModelFolder(write_model(tmp_path / "model"))
    shapes = linear_shapes(folder, ["all-linear"])
    assert adaptable_shapes(folder.config, ["all-linear"]) == shapes
    options = Options(rank=4, batch_size=4, learning_rate=1e-3, steps=5, valid_share=0.1, memory_limit="9GB")
    recipe = make_recipe(folder.path, rank=4, batch_size=4, steps=5)
    memory = TrainingMemory(CPU.package, dims_of(folder), recipe, initial_adapter(shapes, layer_count(shapes), recipe))
    lengths = [20 + 7 * number for number in range(20)]
    rows = [row([0] * length, length // 2) for length in lengths]
    plan = Plan(backend="torch", device="cpu", micro_batch_tokens=1, save_every=1)
    real = choose_plan(options, memory, plan, rows[2:], rows[:2])
    sizes = [(length, length // 2) for length in lengths]
    sketched = estimated_plan(options, folder.config | {"dtype": folder.dtype}, sizes, replace(CPU, memory=0))
    assert sketched.prediction == real.prediction
    assert sketched.plan.micro_batch_tokens == real.plan.micro_batch_tokens


def test_presets_lie_in_the_package_that_the_wheel_takes_along() -> None:
    assert (PRESETS / "__init__.py").is_file()
    assert (PRESETS / "models.json").is_file()
