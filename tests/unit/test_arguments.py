"""The command line made of the options: spellings, headings, help that stands alone, schema, completion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from common.commands import schema
from common.commands.arguments import default_text, joined, read_flags
from common.commands.completion import SHELLS
from common.errors import UserError
from common.option_aliases import NEEDLESS
from common.option_fields import HEADINGS, extra_of
from common.option_sources import load_options
from common.option_translation import translate
from common.options import Options, by_flag
from tests import ROOT

ACTIONS = [["adapter", "inspect"], ["adapter", "convert"], ["llama", "build"], ["llama", "where"], ["llama", "clean"]]


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str, status: int = 0) -> str:
    monkeypatch.setattr(sys, "argv", ["cli.py", *argv])
    try:
        cli.main()
        found: Any = 0
    except SystemExit as done:
        found = done.code
    assert found == status
    return capsys.readouterr().out


@pytest.mark.parametrize("name", by_flag())
@pytest.mark.slow
def test_every_option_is_a_flag_in_both_spellings_and_a_key_of_yaml(name: str, tmp_path: Path) -> None:
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert read_flags([f"{flag}=x"]).keys() == {name}
    assert extra_of(by_flag()[name])["heading"] in HEADINGS


def test_a_value_that_is_missing_is_true_and_a_switch_takes_no_word() -> None:
    assert read_flags(["--rank", "--quiet", "--targets"]) == {"rank": True, "quiet": "true", "targets": True}
    assert joined(["--quiet", "model", "--json", "false"]) == ["--quiet=true", "model", "--json=false"]


def test_a_model_may_stand_anywhere_among_plans_options() -> None:
    parser = cli.build_parser("plan")
    for argv in (["x/y", "--rank", "2"], ["--rank", "2", "x/y"], ["--quiet", "x/y", "--rank", "2"]):
        args, extra = parser.parse_known_args(["plan", *joined(argv)])
        assert (args.named, args.flags["rank"], extra) == ("x/y", "2", [])


@pytest.mark.parametrize("command", ["chat RUN", "generate RUN --prompts p --out o", "serve RUN", "eval RUN"])
@pytest.mark.parametrize("given", ["0", "-5", "x"])
def test_a_context_is_a_number_from_1_on(command: str, given: str) -> None:
    words = [*command.split(), "--context", given]
    with pytest.raises(UserError, match=f"--context: '{given}' is not a number from 1 on"):
        cli.build_parser(words[0]).parse_args(words)


def test_help_comes_under_headings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, monkeypatch, "train", "--help")
    places = [text.index(f"\n{heading}:") for heading in HEADINGS]
    assert places == sorted(places)
    assert text.index("--learning-rate") < text.index("\nAdapter:") < text.index("--rank ")


@pytest.mark.parametrize("command", [[name] for name in cli.COMMANDS] + ACTIONS, ids=" ".join)
def test_every_help_stands_alone(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, monkeypatch, *command, "--help")
    for fault in ("(default: )", "None", "SUPPRESS", "lora_r", "_"):
        assert fault not in text.replace("LLAMA_API_KEY", "").replace("Q4_K_M", "Q4").replace("q_proj", ""), fault
    assert re.search(r"^  -h, --help", text, re.MULTILINE)


def test_a_description_is_not_the_rest_of_a_sentence() -> None:
    for name, field in by_flag().items():
        assert not re.match(r"(of|on|for|by|in|as|to) ", str(field.description)), name
        assert not str(field.description).endswith("."), name


def test_fuse_does_not_offer_to_make_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--export {none,fused," in printed(capsys, monkeypatch, "train", "--help")
    assert "--export {fused,gguf,lora-gguf,mlx}" in printed(capsys, monkeypatch, "fuse", "--help")


def test_no_command_shows_the_help_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "commands:" in printed(capsys, monkeypatch, status=2)


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["tain"], "'tain' is not a command; did you mean 'train'?"),
        (["doctor", "--pariti", "x"], "'--pariti' is not an argument of doctor; did you mean 'parity'?"),
        (["doctor", "--json"], "'--json' is not an argument of doctor."),
        (["serve", "x.gguf", "--port", "eight"], "invalid int value: 'eight'"),
        (["push", "run"], "The following arguments are required: REPO."),
        (["fuse", "run", "--exprt", "mlx"], "run holds no run"),
        (["chat"], "The following arguments are required: RUN."),
    ],
)
def test_a_fault_in_any_command_line_is_one_error(
    argv: list[str],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert fault in error.splitlines()[0]
    assert "\nfix:   " in error


# --- peers


@pytest.mark.parametrize("key", NEEDLESS)
def test_a_harmless_key_of_published_scripts_is_accepted_and_explained(key: str) -> None:
    options, notes, faults = translate({key: "none"})
    assert (options, faults) == ({}, [])
    assert notes == [f"{key}: not needed, {NEEDLESS[key]}"]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"optim": "adamw_8bit"}, {}),
        ({"optim": "paged_adamw_32bit"}, {}),
        ({"torch_dtype": "bfloat16"}, {"precision": "bf16"}),
        ({"torch_dtype": "torch.float32"}, {"precision": "fp32"}),
        ({"dataset_text_field": "text"}, {}),
        ({"dataset_text_field": "body"}, {"field": {"text": "body"}}),
        ({"max_seq_len": 99}, {"max_length": 99}),
        ({"chat_template_path": "t.jinja"}, {"chat_template": "t.jinja"}),
        ({"lora_bias": "none"}, {}),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}, {}),
        ({"push_to_hub": False}, {}),
    ],
)
def test_more_of_trl_and_peft(given: dict[str, Any], options: dict[str, Any]) -> None:
    found, notes, faults = translate(given)
    assert (found, len(notes), faults) == (options, len(given), [])


@pytest.mark.parametrize(
    "given", [{"lora_bias": "all"}, {"torch_dtype": "float16"}, {"trust_remote_code": True}, {"push_to_hub": "true"}]
)
def test_what_would_change_the_result_is_not_dropped(given: dict[str, Any]) -> None:
    assert len(translate(given)[2]) == 1


PUBLISHED = """--model_name_or_path a/b --dataset_name rows.jsonl --report_to none --eval_strategy epoch
--optim adamw_8bit
--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --max_steps -1 --logging_steps 1 --use_rslora
--lora_target_modules q_proj v_proj --num_train_epochs 2 --output_dir out --save_total_limit 1"""


def test_a_published_command_line() -> None:
    flags = read_flags(PUBLISHED.split())
    options, notes = load_options(flags)
    assert (options.model, options.batch_size, options.epochs, options.rslora) == ("a/b", 8, 2, True)
    assert options.targets == ["q_proj", "v_proj"]
    assert len(notes) == 13


# --- schema and completion


def test_the_schema_knows_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, monkeypatch, "schema"))
    assert found["properties"].keys() == by_flag().keys() - {
        "config",
        "llama_cpp",
        "resume",
        "finish",
        "with",
        "push_public",
        "track_text",
        "track_artifacts",
    }
    assert found["properties"]["rank"]["minimum"] == 1
    assert found["properties"]["export"]["enum"] == ["none", "fused", "gguf", "lora-gguf", "mlx"]
    assert found["additionalProperties"] is False


def test_the_page_of_options_is_fresh() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == schema.markdown() + "\n", "make it again: python cli.py schema --format markdown > docs/options.md"


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (False, ""), ({}, ""), (0.0, "0"), (2e-4, "0.0002"), (["a", "b"], "a b"), (0, "0")]
)
def test_a_default_as_it_is_typed(value: Any, text: str) -> None:
    assert default_text(value) == text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_told_how_to_complete(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, monkeypatch, "completion", shell)
    assert "twintune" in text
    assert "_ARGCOMPLETE" in text


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("twintune che", ["check-data"]),
        ("twintune train --learn", ["--learning-rate", "--learning_rate"]),
        ("twintune train --schedule c", ["constant", "cosine"]),
        ("twintune completion f", ["fish"]),
        ("twintune fuse run --quant Q5_K_", ["Q5_K_M", "Q5_K_S"]),
        ("twintune train --export n", ["none"]),
        ("twintune fuse run --export n", []),
    ],
)
@pytest.mark.slow
def test_the_shell_gets_commands_options_and_values(line: str, wanted: list[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    env = os.environ | asked | {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, str(ROOT / "cli.py")], env=env, timeout=60, check=False)
    assert sorted(word.strip() for word in answer.read_text().split()) == sorted(wanted)


def test_options_over_a_runs_own_are_checked_together() -> None:
    from common.option_sources import options_over

    kept = Options(quantization="4bit", data="x").model_dump(by_alias=True)
    assert options_over(kept, {"fuse_into": "base", "quant": "Q8_0"}).quant == ["Q8_0"]
    with pytest.raises(UserError) as caught:
        options_over(kept, {"exprt": "mlx", "quant": True})
    assert caught.value.what == "--exprt is not an option; did you mean 'export'?\n--quant needs a value"


# --- options that a command does not take, or that could do nothing


def fault(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["cli.py", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    return capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A finished run that was started with --export fused and --push."""
    from tests.unit.test_run_record import write_run

    options = Options(model="a/b", data="rows.jsonl", export="fused", push="me/x").model_dump(by_alias=True)
    return str(write_run(tmp_path / "run", options=options))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--rank", "4", "--epochs", "9"], "--rank is not an option\n--epochs is not an option"),
        (["--data", "other"], "--data is not an option"),
        (["--json"], "--json is not an option"),
        (["--exprt", "mlx"], "--exprt is not an option; did you mean 'export'?"),
        (["--export", "mlx", "--quant", "Q8_0"], "--quant is for a GGUF, and --export is mlx"),
        (["--export", "fused", "--no-verify"], "--no-verify is for a GGUF, and --export is fused"),
        (["--export", "fused", "--llama-cpp", "x"], "--llama-cpp is for a GGUF, and --export is fused"),
        (["--push-public"], "--push-public needs --push"),
        (["--export", "none"], "--export none: fuse would make nothing."),
        (["--quant", "Q9"], "--quant: 'Q9' is not a GGUF type; "),
    ],
)
def test_fuse_refuses_what_it_does_not_use(
    flags: list[str], text: str, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fault(["fuse", run, *flags], monkeypatch, capsys)
    assert text in error
    assert "`python cli.py fuse --help`" in error or "--export none" in text


def test_a_switch_leaves_the_run_to_fuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere holds no run" in fault(["fuse", "--no-verify", "nowhere"], monkeypatch, capsys)
    assert "stands first" in fault(["fuse", "--quant", "Q8_0", "nowhere"], monkeypatch, capsys)


def test_check_data_refuses_what_it_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fault(["check-data", "rows.jsonl", "--rank", "8", "--export", "mlx"], monkeypatch, capsys)
    assert "--rank is not an option\n--export is not an option" in error
    assert "`python cli.py check-data --help`" in error


def test_plan_estimates_no_resumed_run_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "plan estimates a new training" in fault(["plan", "--resume", "run"], monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["cli.py", "plan", "x/y", "--data", "nosuch.jsonl", "--quant", "Q8_0"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--quant is for what train does after it" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_runs_own_options_decide_what_is_idle() -> None:
    from common.option_sources import options_over

    kept = Options(model="a/b", data="x", export="fused", push="me/x").model_dump(by_alias=True)
    assert options_over(kept, {"push_public": True, "resume": "run"}).push_public
    with pytest.raises(UserError, match="--no-verify is for a GGUF, and --export is fused"):
        options_over(kept, {"no_verify": True, "resume": "run"})
    assert load_options({"resume": "run", "push_public": True})[0].push_public


def test_llama_cpp_is_for_a_gguf() -> None:
    from common.commands.arguments import check_llama
    from tests.contexts import context

    check_llama(True, context(llama_cpp="x"))
    check_llama(False, context())
    with pytest.raises(UserError, match="--llama-cpp is for a GGUF"):
        check_llama(False, context(llama_cpp="x"))


@pytest.mark.parametrize(
    "flags",
    [
        {"iters": "inf"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": float("inf")},
        {"lora_parameters": {"rank": float("inf")}},
        {"lora_parameters.rank": "1e400"},
        {"epochs": "inf"},
        {"warmup": "nan"},
        {"learning_rate": float("inf")},
        {"alpha_pattern": ["q_proj=inf"]},
        {"save_minutes": "inf"},
        {"adapter": ["x"]},
    ],
)
def test_what_is_no_finite_number_is_a_fault_of_the_user(flags: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        load_options({"data": "x", **flags})


def test_a_file_names_no_other_file_and_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("config: other.yaml\n")
    with pytest.raises(UserError, match="config: a file cannot name another one"):
        load_options({"config": str(file)})
    file.write_text("batch-size: 4\nbatch_size: 8\n")
    with pytest.raises(UserError, match="batch_size is given twice"):
        load_options({"config": str(file)})
