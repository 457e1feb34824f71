"""Options from flags, YAML and defaults; every fault named; what enters the recipe's hash."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from common.commands.arguments import read_flags
from common.errors import UserError
from common.option_sources import load_options, read_config_file
from common.options import QUICKSTART, Options
from common.recipe import Parent, Recipe
from common.run_record import Run
from tests.unit.bigram import RECIPE


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(*argv: str) -> Options:
    return load_options(read_flags(list(argv)))[0]


def fault(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv)
    return caught.value.what


# --- where a value comes from


def test_defaults_stand_where_nothing_is_given(tmp_path: Path) -> None:
    options = load("--data", "x.jsonl")
    assert (options.rank, options.alpha, options.batch_size, options.schedule) == (16, 32.0, 8, "cosine")
    assert (options.steps, options.epochs, options.quant) == (None, None, ["Q4_K_M"])


def test_yaml_wins_over_defaults_and_flags_over_yaml(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "rank: 4\nseed: 7\n")
    options = load("--config", config, "--rank", "2")
    assert (options.rank, options.seed, options.batch_size) == (2, 7, 8)


def test_dashes_and_underscores_name_the_same_option(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "batch-size: 3\nmax_length: 50\n")
    options = load("--config", config, "--eval_every", "5", "--save-every", "6")
    assert (options.batch_size, options.max_length, options.eval_every, options.save_every) == (3, 50, 5, 6)


def test_a_value_may_follow_an_equals_sign() -> None:
    assert load("--data=x.jsonl", "--learning-rate=1e-3").learning_rate == 1e-3


def test_a_yaml_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load("--config", write(tmp_path / "c.yaml", "learning_rate: 2e-3\n")).learning_rate == 2e-3


@pytest.mark.parametrize("text", ["targets: [q_proj, v_proj]", "targets: q_proj v_proj", "targets: q_proj,v_proj"])
def test_a_list_in_yaml_in_each_spelling(tmp_path: Path, text: str) -> None:
    assert load("--config", write(tmp_path / "c.yaml", text)).targets == ["q_proj", "v_proj"]


def test_a_list_among_flags() -> None:
    options = load("--data", "x", "--targets", "q_proj", "v_proj", "--quant", "Q4_K_M,Q8_0", "--quiet")
    assert (options.targets, options.quant, options.quiet) == (["q_proj", "v_proj"], ["Q4_K_M", "Q8_0"], True)


def test_without_config_and_data_the_built_in_example_is_the_base() -> None:
    written = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    options = load("--rank", "2")
    assert (options.model, options.epochs, options.rank) == (written["model"], written["epochs"], 2)
    assert (Path(options.data[0]) / "train.jsonl").exists()


def test_a_path_in_yaml_may_be_meant_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    config = write(tmp_path / "c.yaml", "data: rows.jsonl\n")
    assert load("--config", config).data == [str((tmp_path / "rows.jsonl").resolve())]


def test_a_path_under_another_programs_name_is_found_from_the_yamls_folder_too(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    config = write(tmp_path / "c.yaml", "dataset_name: rows.jsonl\n")
    assert load("--config", config).data == [str((tmp_path / "rows.jsonl").resolve())]


# --- steps and epochs


def test_steps_in_flags_take_the_place_of_epochs_in_yaml(tmp_path: Path) -> None:
    options = load("--config", write(tmp_path / "c.yaml", "epochs: 2\n"), "--steps", "5")
    assert (options.steps, options.epochs) == (5, None)


def test_steps_and_epochs_in_one_place_are_refused(tmp_path: Path) -> None:
    assert "steps and epochs are both given" in fault("--data", "x", "--steps", "5", "--epochs", "2")
    config = write(tmp_path / "c.yaml", "steps: 5\nepochs: 2\n")
    assert "steps and epochs are both given" in fault("--config", config)


# --- targets


def test_an_unknown_target_names_the_nearest() -> None:
    said = fault("--data", "x", "--targets", "q_porj")
    assert said.startswith("--targets: 'q_porj' is not a target; did you mean 'q_proj'? known: ")


# --- faults


def test_a_misspelt_option_in_yaml_names_the_nearest(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "learning_rte: 1e-3\n")
    assert fault("--config", config) == f"{config}: learning_rte is not an option; did you mean 'learning_rate'?"


def test_a_misspelt_flag_names_the_nearest() -> None:
    assert fault("--data", "x", "--bach-size", "4") == "--bach-size is not an option; did you mean 'batch_size'?"


def test_an_option_like_no_other_names_none() -> None:
    assert fault("--data", "x", "--zzz", "4") == "--zzz is not an option"


def test_two_faults_in_yaml_are_both_named(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "ranke: 8\nschedule: cosin\n")
    said = fault("--config", config)
    assert f"{config}: ranke is not an option; did you mean 'rank'?" in said
    assert f"{config}: schedule: Input should be 'cosine', 'linear' or 'constant' (got 'cosin')" in said


def test_a_fault_in_yaml_and_one_in_flags_are_both_named(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "rank: 0\n")
    said = fault("--config", config, "--dropout", "1.5")
    assert f"{config}: rank: Input should be greater than or equal to 1 (got 0)" in said
    assert "--dropout: Input should be less than 1 (got '1.5')" in said


def test_a_flag_without_its_value_does_not_hide_another_fault() -> None:
    said = fault("--data", "x", "--rank", "--alpha", "much")
    assert "--rank needs a value" in said
    assert "--alpha: Input should be a valid number" in said


def test_steps_beside_epochs_does_not_hide_behind_another_fault() -> None:
    said = fault("--data", "x", "--steps", "5", "--epochs", "2", "--rank", "0")
    assert "--rank: Input should be greater" in said
    assert "steps and epochs are both given" in said


def test_a_fault_under_another_programs_name_is_told_by_that_name(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "max_steps: -2\n")
    assert "max_steps" in fault("--config", config)


def test_the_way_out_of_a_fault_is_the_help() -> None:
    with pytest.raises(UserError) as caught:
        load("--data", "x", "--rank", "0")
    assert caught.value.fix == "`python cli.py train --help` lists every option and its values."


def test_a_flag_given_twice() -> None:
    assert fault("--rank", "2", "--rank", "4") == "--rank is given twice."


def test_an_option_of_several_values_may_be_given_several_times() -> None:
    for flags in (["--field", "input=a", "--field", "output=b"], ["--field=input=a", "--field", "output=b"]):
        assert load_options(read_flags([*flags, "--quant", "Q8_0", "--quant", "Q4_0"]))[0].field == {
            "input": "a",
            "output": "b",
        }
    assert load_options(read_flags(["--quant", "Q8_0", "--quant", "Q4_0"]))[0].quant == ["Q8_0", "Q4_0"]
    assert "input is given twice" in fault("--field", "input=a", "input=b")


def test_a_word_without_an_option() -> None:
    assert fault("data.jsonl") == "'data.jsonl' stands where an option should."


def test_a_missing_config_file(tmp_path: Path) -> None:
    assert fault("--config", str(tmp_path / "no.yaml")) == f"--config {tmp_path / 'no.yaml'}: no such file."


def test_a_config_that_is_no_yaml_says_the_line(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "rank: 8\nalpha: [1,\n")
    said = fault("--config", config)
    assert said.startswith(f"{config} cannot be read as YAML:")
    assert "line 3" in said


@pytest.mark.parametrize("text", ["", "- rank\n", "just words\n"])
def test_a_config_without_options(tmp_path: Path, text: str) -> None:
    config = write(tmp_path / "c.yaml", text)
    assert fault("--config", config) == (f"{config} cannot be read as YAML: it does not hold `name: value` lines")


# --- resume


@pytest.mark.parametrize("flags", [["--rank", "4"], ["--seed", "1"], ["--output", "new"], ["--config", "c.yaml"]])
def test_resume_with_other_options_is_refused(tmp_path: Path, flags: list[str]) -> None:
    write(tmp_path / "c.yaml", "rank: 4\n")
    flags = [str(tmp_path / flag) if flag.endswith(".yaml") else flag for flag in flags]
    said = fault("--resume", "runs/a", *flags)
    assert said.startswith("--resume continues with the run's own recipe and plan; it does not combine with")
    assert flags[0] in said


def test_resume_may_be_told_how_far_to_export() -> None:
    options = load("--resume", "runs/a", "--export", "gguf", "--quant", "Q8_0", "--json")
    assert (options.resume, options.export, options.json_output) == ("runs/a", "gguf", True)


def test_resume_under_its_trl_name() -> None:
    assert load("--resume-from-checkpoint", "runs/a").resume == "runs/a"


# --- recipe


def another(name: str, value: Any) -> Any:
    choices = get_args(Recipe.model_fields[name].annotation)
    if isinstance(value, str):
        return next((c for c in choices if c != value), "other") if choices else "other"
    if isinstance(value, list):
        return [*value, 2.0 if name == "weights" else "v_proj"]
    if isinstance(value, dict):
        return {**value, "v_proj": 3}
    if value is None:
        return Parent(recipe="1a2b", step=3) if name == "parent" else "last:1"
    return value + 1 if isinstance(value, int) else value / 2 + 0.001


def test_the_recipe_hash_leaves_out_names_and_what_the_rows_hashes_hold() -> None:
    changing = set()
    for name in Recipe.model_fields:
        content = RECIPE.model_dump()
        content[name] = another(name, content[name])
        if Recipe.model_validate(content).hash() != RECIPE.hash():
            changing.add(name)
    assert set(Recipe.model_fields) - changing == {"model", "data", "weights", "on_bad_row", "tools", "eval_rows"}


def test_a_recipe_survives_its_yaml(tmp_path: Path) -> None:
    Run(tmp_path).write_recipe(RECIPE)
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# recipe {RECIPE.hash()}\n")
    assert Recipe.model_validate(yaml.safe_load(text)).hash() == RECIPE.hash()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_every_recipe_in_configs_is_valid_and_short() -> None:
    for path in QUICKSTART.parent.glob("*.yaml"):
        load_options({"config": str(path)})
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40, path
        assert read_config_file(path), path


def test_a_file_names_no_program(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("model: x/y\nllama-cpp: llama\n")
    with pytest.raises(UserError, match=r"theirs\.yaml: llama_cpp names programs: give it by --llama-cpp"):
        load_options({"config": str(path)})
    path.write_text("model: x/y\n")
    assert load_options({"config": str(path), "llama_cpp": "mine"})[0].llama_cpp == "mine"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--export", "mlx", "--quant", "Q8_0"], "--quant is for a GGUF, and --export is mlx"),
        (["--export", "none", "--no-verify"], "--no-verify is for a GGUF, and --export is none"),
        (["--export", "fused", "--llama-cpp", "x"], "--llama-cpp is for a GGUF, and --export is fused"),
        (["--push-public"], "--push-public needs --push"),
        (["--valid-share", "0.2"], "--valid-share is for one file, and --data"),
    ],
)
def test_a_flag_that_could_do_nothing_is_refused(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("--model", "x/y", "--data", str(tmp_path), *flags)
    assert said in caught.value.what


def test_a_flag_that_does_something_is_not_refused(tmp_path: Path) -> None:
    assert load_options({"data": str(tmp_path), "valid_share": 0.0})[0].valid_share == 0  # as check-data asks
    flags = ["--export", "lora-gguf", "--llama-cpp", "x", "--push", "me/x", "--push-public", "--valid-share", "0.2"]
    assert load("--model", "x/y", "--data", str(tmp_path / "rows.jsonl"), *flags).push_public


@pytest.mark.parametrize(
    "line",
    ["with: [box:7070]", "push_public: true", "push-public: true", "track_text: true", "track_artifacts: adapter"],
)
def test_a_file_sends_nothing_elsewhere(line: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: x/y\ndata: rows.jsonl\n{line}\n")
    with pytest.raises(UserError, match="not in a file"):
        load("--config", str(file))


def test_a_folder_in_the_users_home_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("--model", "x/y", "--data", "a.jsonl", "--output", "~/runs/a").output == str(tmp_path / "runs/a")
    assert load("--resume", "~/runs/a").resume == str(tmp_path / "runs/a")
