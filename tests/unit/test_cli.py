"""The front door: a fault is two lines on standard error and exit code 1, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from tests import ROOT
from tests.tiny import write_rows


def command(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """As a user types it, in another folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *argv], cwd=folder, capture_output=True, text=True, timeout=60
    )


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    """The same without a new process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["cli.py", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return caught.value.code, out, err


HERE = ("--backend", "torch", "--device", "cpu", "--export", "none")


def test_help_answers(tmp_path: Path) -> None:
    done = command(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "check-data" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_standard_stream_may_be_closed(tmp_path: Path, closed: str) -> None:
    words = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, str(ROOT / "cli.py"), "schema"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed != ">&-")


def test_windows_is_told_in_two_lines(tmp_path: Path) -> None:
    """There is no fcntl, and nothing that needs it may be imported before."""
    start = (
        f"import sys; sys.platform, sys.modules['fcntl'] = 'win32', None; sys.path.insert(0, {str(ROOT)!r}); import cli"
    )
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    error, fix = done.stderr.splitlines()
    assert (done.returncode, error) == (1, "error: Twintune runs on Linux and macOS, not on Windows itself.")
    assert fix == "fix:   Install and start it in WSL."


def test_an_error_is_an_event_too(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "cli.py"), "plan", "--json", "--model", "x/y", "--data", "nope.jsonl"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event["event"]) == (1, "error")
    assert "nope.jsonl" in event["what"]
    assert f"error: {event['what']}\nfix:   {event['fix']}\n" == done.stderr


def test_missing_data(tmp_path: Path) -> None:
    done = command(tmp_path, "train", "--data", "nosuch.jsonl", "--model", "x/y", *HERE)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.split("\n")[0] == "error: --data nosuch.jsonl: no such file or folder."
    assert done.stderr.split("\n")[1].startswith("fix:   Give a file, a folder with a train file")
    assert len(done.stderr.strip().split("\n")) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_output_folder_that_holds_another_run(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    write_rows(tmp_path / "rows.jsonl", 4)
    done = command(tmp_path, "train", "--data", "rows.jsonl", "--model", "x/y", "--output", "old", *HERE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: --output old holds another run.\n"
        "fix:   Continue it (python cli.py train --resume old), or give another folder.\n"
    )
    assert (tmp_path / "old" / "run.json").read_text() == "{}"


def test_two_faults_come_in_one_go(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = main(monkeypatch, capsys, "train", "--data", "x", "--rank", "0", "--bach-size", "4")
    assert (code, out) == (1, "")
    assert err == (
        "error: --bach-size is not an option; did you mean 'batch_size'?\n"
        "--rank: Input should be greater than or equal to 1 (got '0')\n"
        "fix:   `python cli.py train --help` lists every option and its values.\n"
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["compare", "nowhere"], "error: compare needs two or more runs.\n"),
        (["compare", "nowhere", "elsewhere"], "error: nowhere holds no run (no run.json).\n"),
        (["fuse", "nowhere"], "error: nowhere holds no run (no run.json).\n"),
        (["train", "--resume", "nowhere"], "error: nowhere holds no run (no run.json).\n"),
        (
            ["train", "--resume", "nowhere", "--rank", "2"],
            "error: --resume continues with the run's own recipe",
        ),
        (["chat", "nowhere"], "error: nowhere holds no run (no run.json).\n"),
        (["chat", "nowhere", "--temperature", "-1"], "error: --temperature -1.0: must be 0 or more\n"),
        (["generate", "nowhere", "--prompts", "p", "--out", "o"], "error: nowhere holds no run (no run.json).\n"),
        (["serve", "gone.gguf"], "error: gone.gguf: no such file.\n"),
        (["check-data", "nosuch.jsonl"], "error: --data nosuch.jsonl: no such file or folder.\n"),
    ],
)
def test_faults_of_every_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = main(monkeypatch, capsys, *argv)
    assert code == 1
    assert err.startswith(said)
    assert "\nfix:   " in err


def test_a_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from common.errors import UserError

    monkeypatch.setenv("TWINTUNE_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["cli.py", "compare", "nowhere"])
    with pytest.raises(UserError):
        cli.main()
    assert capsys.readouterr().err.startswith("error: compare needs two or more runs.\nfix:   ")


def test_a_translation_is_told_as_json_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ("train", "--data", "nosuch.jsonl", "--model", "x/y", "--lora-r", "4", "--json", *HERE)
    code, out, _ = main(monkeypatch, capsys, *argv)
    assert code == 1
    assert json.loads(out.splitlines()[0]) == {"event": "note", "text": "flags: lora_r -> rank 4"}


def test_what_nobody_expected_is_one_fault_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr("common.commands.doctor.doctor", broken)
    code, out, err = main(monkeypatch, capsys, "doctor")
    assert (code, out) == (1, "")
    what, fix = err.splitlines()
    assert what == "error: this is a bug: ZeroDivisionError: by zero"
    assert fix == "fix:   Report it. TWINTUNE_TRACEBACK=1 shows where."
    monkeypatch.setenv("TWINTUNE_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["cli.py", "doctor"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    command = f"{sys.executable} {ROOT / 'cli.py'} train --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
