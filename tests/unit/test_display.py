"""What strangers have written is shown, never obeyed: not by the terminal, and not by rich."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from common.display import Display, shown
from common.errors import AtOdds
from common.models.adapter_files import write_peft
from tests import ROOT
from tests.tiny import chat, write_model
from tests.unit.hub import finished_run
from tests.unit.test_adapter_files import adapter

# A window's title, red, a cleared screen by C1, markup, an emoji code, reversed writing, half a character.
HOSTILE = "\x1b]0;PWNED\x07\x1b[31m\x9b2J[bold]m[/b] :smile:\u202e\r"
SHOWN = r"\x1b]0;PWNED\x07\x1b[31m\x9b2J[bold]m[/b] :smile:\u202e\r"
NAME = HOSTILE.replace("/", "")
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# What rich itself writes on a terminal: styles, and the cursor and lines of a progress bar.
RICH = re.compile(r"\x1b\[[\d;]*[mAK]|\x1b\[2K|\x1b\[\?25[lh]|\r(?=\x1b\[2K|\n|\Z)")


@pytest.fixture(params=["plain", "rich"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_control_characters_are_shown_and_lines_stay() -> None:
    assert shown(HOSTILE) == SHOWN
    assert shown("a\tb\nc é 日 😀 \u200d") == "a\tb\nc é 日 😀 \u200d"
    assert shown("caf\udce9.jsonl") == r"caf\udce9.jsonl"  # a file name that is not UTF-8


def test_everything_the_display_prints_is_shown(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(mode)  # type: ignore[arg-type]
    calls = [
        lambda: display.say(HOSTILE),
        lambda: display.warn(HOSTILE),
        lambda: display.panel(HOSTILE, {"a": HOSTILE}),
        lambda: display.table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, (HOSTILE, "green")]]),
        lambda: display.show((HOSTILE, "bold"), HOSTILE),
        lambda: display.stream(HOSTILE, end="\n"),
        lambda: _side_by_side(display),
        lambda: _staged(display),
    ]
    display.console.width = 400
    for call in calls:
        call()
        out = capsys.readouterr().out
        assert not RAW.search(RICH.sub("", out).replace("\n", "")), repr(out)
        assert "]m[/b] :smile:" in out or "stage" in out


def _side_by_side(display: Display) -> None:
    with display.side_by_side([HOSTILE, HOSTILE]) as update:
        update([HOSTILE, HOSTILE])


def _staged(display: Display) -> None:
    with display.stage(f"stage {HOSTILE}") as progress:
        progress(0.5, HOSTILE)


def test_events_are_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    Display("json").say(HOSTILE)
    line = capsys.readouterr().out
    assert not RAW.search(line.rstrip("\n"))
    assert json.loads(line)["text"] == HOSTILE


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str, *argv: object
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, argv)])
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: mode == "rich", raising=False)
    code = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = int(str(stopped.code))
    out, err = capsys.readouterr()
    return code, out + err


def hostile_model(folder: Path, template: str = "") -> Path:
    write_model(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def hostile_run(folder: Path) -> Path:
    finished_run(folder)
    record = json.loads((folder / "run.json").read_text())
    record |= {"device": HOSTILE, "stage_seconds": {HOSTILE: 1.0}, "memory_kind": HOSTILE}
    record["plans"] = [{"backend": HOSTILE, "device": HOSTILE, "from_step": 1}] * 2
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "fused" / f"LICENSE{NAME}.txt").write_text("mine")
    return folder


def hostile_adapter(folder: Path, **settings: object) -> Path:
    write_peft(folder, adapter())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


RAISES = "{{ raise_exception(" + json.dumps(HOSTILE) + ") }}"


@pytest.mark.parametrize(
    "case",
    [
        *("rows", "explain", "key", "template", "model", "adapter", "adapter setting", "compare", "push", "option"),
        *("command", "missing", "plan"),
    ],
)
@pytest.mark.slow
def test_no_command_prints_what_steers_a_terminal(
    case: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, model = Path(f"{NAME}.jsonl"), f"{NAME}model"
    row = json.dumps(chat(HOSTILE, f"{HOSTILE} <b>", HOSTILE))
    rows.write_text(f"{row}\n{row}\n")
    Path("key.jsonl").write_text(json.dumps({HOSTILE: 1}) + "\n")
    hostile_model(Path(model), RAISES if case == "template" else "")
    argv: dict[str, list[object]] = {
        "rows": ["check-data", rows, "--model", model],
        "explain": ["check-data", rows, "--model", model, "--explain", 1],
        "key": ["check-data", "key.jsonl", "--model", model],
        "template": ["check-data", rows, "--model", model],
        "model": ["check-data", rows, "--model", f"{model}x"],
        "adapter": ["adapter", "inspect", "a"],
        "adapter setting": ["adapter", "inspect", "b"],
        "compare": ["compare", "one", f"{NAME}run"],
        "push": ["push", f"{NAME}run", "me/x", "--dry-run"],
        "option": ["train", f"--{HOSTILE}", HOSTILE, "--rank", HOSTILE],
        "command": [NAME],
        "missing": ["chat", f"{NAME}gone"],
        "plan": ["plan", model, "--data", rows, "--no-probe", "--backend", "torch", "--device", "cpu"],
    }
    if case in ("compare", "push"):
        hostile_run(Path("one"))
        hostile_run(Path(f"{NAME}run"))
    hostile_adapter(Path("a"), base_model_name_or_path=HOSTILE)
    hostile_adapter(Path("b"), init_lora_weights=HOSTILE)
    _, out = run_cli(monkeypatch, capsys, mode, *argv[case])
    assert not RAW.search(RICH.sub("", out).replace("\n", "")), repr(out)
    assert "[bold]m[" in out, repr(out)
    assert ":smile:" in out, repr(out)


def test_a_librarys_log_line_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def doctor(context: object) -> None:
        logging.getLogger("somebody's").warning("the tokenizer is a %s", HOSTILE)

    monkeypatch.setattr("common.commands.doctor.doctor", doctor)
    run_cli(monkeypatch, capsys, "plain", "doctor")
    assert f"the tokenizer is a {SHOWN}" in caplog.text


@pytest.mark.parametrize("bug", [TypeError, KeyError, AttributeError, NameError, AssertionError])
def test_a_bug_in_an_optional_part_is_a_warning_for_users_and_fails_a_test(
    bug: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(bug), Display("plain").optional("no card"):
        raise bug("ours")
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("TWINTUNE_RAISE_BUGS")
    with Display("plain").optional("no card"):
        raise bug("ours")
    assert capsys.readouterr().out.startswith(f"warning: no card: {bug.__name__}: ")


@pytest.mark.parametrize(("mode", "where"), [("quiet", "err"), ("plain", "out"), ("json", "out")])
def test_a_warning_is_no_result(mode: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    Display(mode).warn(f"{HOSTILE}{'x' * 200}")  # type: ignore[arg-type]
    streams = capsys.readouterr()
    warning = f"warning: {SHOWN}{'x' * 200}\n"
    if mode == "json":
        assert json.loads(streams.out) == {"event": "warning", "text": f"{HOSTILE}{'x' * 200}"}
    else:
        assert getattr(streams, where) == warning
    assert (streams.err if where == "out" else streams.out) == ""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_terminal_that_is_gone_fails_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        Display("quiet" if name == "stderr" else "plain").warn("nobody reads this")
        stream.flush()  # what was buffered is gone too


def test_ranks_that_are_at_odds_end_even_in_an_optional_part() -> None:
    with pytest.raises(AtOdds), Display("quiet").optional("no sample"):
        raise AtOdds("memory ran out", "Continue.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is full")
@pytest.mark.parametrize("mode", ["plain", "json", "rich"])
def test_a_log_on_a_full_disk_fails_nothing(mode: str, tmp_path: Path) -> None:
    """Its text is given up at the end; a program of its own, as Python flushes when it ends."""
    done = tmp_path / "done"
    program = (
        "import sys; from pathlib import Path; import cli; from common.display import Display\n"
        f"display = Display({mode!r})\n"
        "for number in range(9): display.say('x' * 9000); display.warn('y')\n"
        f"Path({str(done)!r}).touch(); cli._flush()"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr, done.exists()) == (0, b"", True)
