"""`init` without a terminal: every question is a flag, and what it writes is what `train` reads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import cli
from common.commands import init
from common.data.dataset import Example
from common.data.glance import glance
from common.goals import GOALS, Setting, as_yaml, settings_of
from common.models.local_models import LocalModel, published_model
from common.option_sources import load_options
from common.options import Options
from common.presets import preset_names, published_configs
from common.system import hardware
from common.training.proposals import Proposal, preset_models, propose
from tests.presets import CPU, GPU
from tests.tiny import write_model, write_rows

GEMMA = "google/gemma-3-1b-it"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "local_models", lambda home, folder: [])
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


class Done:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> None:
        monkeypatch.setattr(sys, "argv", ["cli.py", "init", *argv])
        try:
            cli.main()
            self.status: object = 0
        except SystemExit as ended:
            self.status = ended.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *argv: Done(monkeypatch, capsys, *argv)


def given(goal: str = "persona", data: str = "rows.jsonl", model: str = GEMMA) -> tuple[str, ...]:
    return "--goal", goal, "--data", data, "--model", model


@pytest.mark.parametrize("goal", GOALS)
def test_what_is_written_is_what_train_reads(run, goal: str) -> None:
    done = run(*given(goal), "--name", "mine")
    assert (done.status, done.err) == (0, "")
    options, notes = load_options({"config": "mine.yaml"})
    expected = {setting.name: setting.value for setting in settings_of(goal, "en", False)}
    assert options == Options.model_validate(expected | {"config": "mine.yaml", "model": GEMMA, "data": "rows.jsonl"})
    assert notes == []
    text = Path("mine.yaml").read_text()
    assert "python cli.py train --config mine.yaml" in text
    assert "python cli.py train --config mine.yaml" in done.out
    assert "python cli.py plan --config mine.yaml" in done.out


def test_every_setting_stands_below_its_reason() -> None:
    for goal in GOALS:
        for setting in settings_of(goal, "ja", True):
            assert setting.why, (goal, setting.name)


def test_a_model_that_is_not_here_is_not_fetched_and_its_memory_is_known(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "apple_silicon", lambda: False)
    done = run(*given(), "--name", "mine")
    assert f"train fetches {GEMMA} from the hub first" in done.out
    assert "torch on cpu" in Path("mine.yaml").read_text()
    assert "# memory: 2." in Path("mine.yaml").read_text()


def test_a_model_of_the_hub_whose_config_is_not_known_has_no_estimate(run) -> None:
    run(*given(model="who/knows"), "--name", "mine")
    assert "# memory: not known before it is fetched\n" in Path("mine.yaml").read_text()
    assert load_options({"config": "mine.yaml"})[0].model == "who/knows"


def test_a_model_folder(run, here: Path) -> None:
    write_model(here / "tiny")
    done = run(*given(model="./tiny"))
    assert done.status == 0
    assert load_options({"config": "tiny-persona.yaml"})[0].model == "./tiny"
    assert "fetches" not in done.out


def test_all_that_is_missing_is_named_at_once(run, here: Path) -> None:
    done = run("--data", "rows.jsonl")
    assert done.status == 1
    assert done.err.startswith(
        "error: --goal, --model are not given, and there is no terminal to ask on.\nfix:   Give them:"
    )
    assert run("--goal", "text", "--data", "rows.jsonl").err.startswith("error: --model is not given")
    assert sorted(path.name for path in here.iterdir()) == ["rows.jsonl"]


def test_nothing_is_overwritten_unless_asked_for(run) -> None:
    Path("mine.yaml").write_text("my own\n")
    done = run(*given(), "--name", "mine.yaml")
    assert (done.status, done.err.splitlines()[0]) == (1, "error: mine.yaml exists.")
    assert Path("mine.yaml").read_text() == "my own\n"
    assert run(*given(), "--name", "mine.yaml", "--force").status == 0
    assert Path("mine.yaml").read_text() != "my own\n"


@pytest.mark.parametrize("name", ["../up", "/tmp/x", ".hidden", "a b", "a/b", "x" * 100])
def test_the_file_is_written_here(run, here: Path, name: str) -> None:
    done = run(*given(), "--name", name)
    assert (done.status, "cannot be the name of a file here" in done.err) == (1, True)
    assert sorted(path.name for path in here.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("owner/name", "no such file or folder"),
        ("bad.jsonl", "bad.jsonl line 1"),
    ],
)
def test_the_rows_are_read_at_once(run, here: Path, data: str, said: str) -> None:
    (here / "bad.jsonl").write_text('{"messages": 3}\n')
    done = run(*given(data=data))
    assert (done.status, said in done.err) == (1, True)
    assert not list(here.glob("*.yaml"))


def test_how_rows_are_read_is_given_and_kept(run, here: Path) -> None:
    rows = [{"question": f"{number}?", "answer": "Yes."} for number in range(5)]
    (here / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": 3}]))
    assert "bad line" in run(*given(data="own.jsonl"), "--name", "mine").err
    fields = ("--field", "instruction=question", "output=answer", "--on-bad-row", "drop")
    assert run(*given(data="own.jsonl"), "--name", "mine", *fields).status == 0
    options, _ = load_options({"config": "mine.yaml"})
    assert (options.field, options.on_bad_row) == ({"instruction": "question", "output": "answer"}, "drop")
    assert run(*given(), "--lerning-rate", "3").err.startswith("error: --lerning-rate is not an option")


def test_few_rows_are_said_to_be_few(run) -> None:
    assert "24 rows are few for this goal, for which 1,000 or more are usual" in run(*given("tools")).out


def test_rows_in_japanese_get_japanese_prompts(run, here: Path) -> None:
    turns = [{"role": "user", "content": "元気ですか？"}, {"role": "assistant", "content": "元気じゃとも。"}]
    (here / "ja.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    run(*given(data="ja.jsonl"), "--name", "mine")
    assert "あなたは誰ですか？" in load_options({"config": "mine.yaml"})[0].sample_prompt


def test_the_list_names_every_preset(run) -> None:
    out = run("--list").out
    assert [name for name in preset_names() if name not in out] == []


def test_a_name_of_several_lines_stays_in_its_comment() -> None:
    text = as_yaml(["a\npush: me"], Setting("model", "x\ny: z", "b\r\npush: me"), None, [])
    assert yaml.safe_load(text) == {"model": "x\ny: z"}


def test_control_characters_do_not_reach_the_file() -> None:
    text = as_yaml(["a\x1b]0;hi\x07b"], Setting("model", "x\x1b]0;hi\x07", ""), None, [])
    assert "\x1b" not in text
    assert yaml.safe_load(text) == {"model": "x\x1b]0;hi\x07"}


# --- proposals


def proposal(memory: float, model: LocalModel | None = None, place=GPU) -> Proposal:
    model = model or published_model(GEMMA, published_configs()[GEMMA])
    return propose(model, Options(max_length=512), [(160, 80)] * 100, replace(place, memory=round(memory * 1e9)))


def test_a_base_is_held_in_4_bits_only_where_it_would_not_fit_otherwise() -> None:
    assert (proposal(8).four_bits, proposal(8).fits) == (False, True)
    assert (proposal(2.5).four_bits, proposal(2.5).fits) == (True, True)
    assert (proposal(0.5).four_bits, proposal(0.5).fits) == (False, False)


@pytest.mark.slow
def test_a_proposal_fits_a_line() -> None:
    assert proposal(2.5).described().startswith(f"{GEMMA}: ")
    assert proposal(2.5).described().endswith(" over a base in 4 bits, fetches 2.00 GB from the hub")
    gguf = propose(LocalModel("/a.gguf", "gemma3:1b", "Ollama", 10**9), Options(), [(2, 1)], CPU)
    assert gguf.described() == "gemma3:1b: a GGUF, converted first, in Ollama"
    assert gguf.fits
    every = [propose(model, Options(), [(400, 200)] * 10, GPU) for goal in GOALS for model in preset_models(goal)]
    assert max(len(one.described()) for one in every) < 110


def test_weights_that_mlx_has_quantized_are_estimated_as_they_are() -> None:
    config = published_configs()[GEMMA] | {"quantization": {"bits": 4, "group_size": 64}}
    held = [
        proposal(9, replace(published_model(GEMMA, config)), place).chosen.prediction.parts["weights"]
        for place in (GPU, CPU)
    ]
    assert held[0] < 0.4 * held[1]


@pytest.mark.parametrize("goal", GOALS)
def test_every_goal_has_models_to_propose(goal: str) -> None:
    assert len(preset_models(goal)) >= 3


# --- rows at a glance


def chat(*contents: str, **more) -> Example:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    return Example(tuple(turns), "a:1", **more)


def test_lengths_are_told_by_bytes() -> None:
    assert glance([chat("Hello!", "Hi.")]).sizes == [(2 + 1 + 12, 1 + 6)]
    assert glance([chat("元気？", "元気です")]).sizes == [(3 + 4 + 12, 4 + 6)]
    assert glance([Example((), "a:1", text="abcdef")]).sizes == [(4, 3)]
    ((with_tools, _),) = glance([chat("Hello!", "Hi.", tools=({"name": "x" * 300},))]).sizes
    assert with_tools > 100
    assert len(glance([chat("a", "b")] * 30_000).sizes) == 20_000


@pytest.mark.parametrize(
    ("text", "japanese"),
    [("今日は良い天気ですね", True), ("今天天气很好", False), ("Hello", False), ("A long text with の", False)],
)
def test_japanese_is_told_by_kana(text: str, japanese: bool) -> None:
    assert glance([chat(text, text)]).japanese is japanese
