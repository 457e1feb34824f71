"""Uploading, to a stand-in for the hub: which files arrive with which bytes, and where the token goes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cli
from common.display import Display, Mode
from common.errors import UserError
from common.export.upload import _stage, adapter_files, files_of
from common.files import file_digest
from common.models.license import KNOWN
from common.options import Options
from common.run_lock import held
from common.run_record import Run
from tests import ROOT
from tests.unit.hub import TOKEN, Hub, finished_run, serve
from tests.unit.old_run import edit_record

FUSED = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "LICENSE", "USE_POLICY.md"}
ADAPTER = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/LICENSE"}
GGUF = {"gguf/model-Q4_K_M.gguf", "gguf/Modelfile", "gguf/LICENSE"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Push = Callable[..., Done]


@pytest.fixture
def push(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """`push RUN ...` in this process."""

    def main(*argv: str, token: str | None = TOKEN) -> Done:
        hub.enter(monkeypatch, run.parent, token)
        monkeypatch.setattr(sys, "argv", ["cli.py", "push", str(run), *argv])
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(str(stopped.code or 0))
        return Done(code, *capsys.readouterr())

    return main


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path, subprocess.CompletedProcess[str]]]:
    """As a user types it, in a process of its own."""
    run = finished_run(tmp_path_factory.mktemp("user") / "run")
    with serve() as hub:
        yield (
            hub,
            run,
            subprocess.run(
                [sys.executable, str(ROOT / "cli.py"), "push", str(run), "team/model"],
                env=hub.environment(run.parent / "home"),
                capture_output=True,
                text=True,
                timeout=120,
            ),
        )


Uploaded = tuple[Hub, Path, subprocess.CompletedProcess[str]]


def test_everything_arrives_in_one_commit(uploaded: Uploaded) -> None:
    hub, run, done = uploaded
    assert (done.returncode, done.stderr) == (0, "")
    (repo,) = hub.repos
    assert (repo["organization"], repo["name"]) == ("team", "model")
    assert repo.get("private") is True or repo.get("visibility") == "private"
    (files,) = hub.commits
    assert set(files) == FUSED | ADAPTER | GGUF
    for name in (FUSED | ADAPTER | GGUF) - {"README.md", "config.json"}:
        assert files[name] == (run / ("" if "/" in name else "fused") / name).read_bytes(), name
    assert json.loads(files["config.json"]) == {"_name_or_path": "base", "model_type": "llama"}
    assert b"# base, fine-tuned" in files["README.md"]
    assert str(run).encode() not in b"".join([*hub.bodies, *files.values()])
    assert f"uploaded: {hub.url}/team/model" in done.stdout


def test_what_another_upload_left_there_is_named(hub: Hub, push: Push) -> None:
    assert "also holds" not in push("team/model").stdout
    hub.before = ["gguf/model-Q8_0.gguf", "notes.txt", "attest.json"]
    said = " ".join(push("team/model").stdout.split())
    assert "also holds attest.json, gguf/model-Q8_0.gguf, which this upload has not written" in said


def test_the_token_goes_into_the_header_and_nowhere_else(uploaded: Uploaded) -> None:
    hub, run, done = uploaded
    for asked, headers in zip(hub.asked, hub.headers, strict=True):
        given = {name.lower(): value for name, value in headers.items() if TOKEN in value}
        # what is stored goes to another host in truth
        assert given == ({} if asked.startswith("PUT /storage/") else {"authorization": f"Bearer {TOKEN}"}), asked
    secret = TOKEN.encode()
    assert secret not in b"".join(hub.bodies)
    assert TOKEN not in "".join([*hub.asked, done.stdout, done.stderr])
    kept = [path for path in run.parent.rglob("*") if path.is_file()]
    assert [path for path in kept if secret in path.read_bytes()] == []
    assert len(hub.asked) > 5
    assert len(kept) > 12


def test_each_large_file_is_told_as_it_goes(hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.display._PLAIN_SECONDS", -1)
    done = push("me/model", "--what", "gguf")
    told = re.findall(r"^upload .* to me/model +(\d+)%  (.*)$", done.stdout, re.MULTILINE)
    assert {name for _, name in told} == GGUF | {"README.md", "LICENSE"}
    shares = [int(share) for share, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1] > 50, done.stderr) == (0, True, "")


@pytest.mark.parametrize("mode", ["rich", "plain", "json", "quiet"])
def test_the_hubs_own_bars_are_for_a_terminal(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    with _stage("upload", Display(mode)):
        assert are_progress_bars_disabled() is (mode != "rich")
    assert not are_progress_bars_disabled()


@pytest.mark.parametrize(("given", "shown"), [("{}", True), ("{'quiet': True}", False), ("{'json': True}", False)])
def test_quiet_and_json_show_no_bars_of_a_download(given: str, shown: bool, hub: Hub, tmp_path: Path) -> None:
    program = (
        "from common.commands.arguments import display_of\nfrom common.options import Options\n"
        f"display_of(Options.model_validate({given}))\n"
        "from huggingface_hub.utils import are_progress_bars_disabled\nprint(are_progress_bars_disabled())"
    )
    run = partial(subprocess.run, [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run(env=hub.environment(tmp_path)).stdout == f"{not shown}\n"


def test_no_option_holds_a_token() -> None:
    assert not [name for name in Options.model_fields if "token" in name and name != "micro_batch_tokens"]


def test_a_dry_run_lists_all_and_asks_nothing(hub: Hub, run: Path, push: Push) -> None:
    before = (run / "run.json").read_bytes()
    done = push("me/model", "--dry-run", token=None)
    assert (done.returncode, done.stderr, hub.asked) == (0, "", [])
    for name in FUSED | ADAPTER | GGUF:
        assert name in done.stdout
    assert "12 files" in done.stdout
    assert "me/model would be created, private, if it does not exist." in " ".join(done.stdout.split())
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("what", "names"),
    [
        (["gguf"], GGUF | {"README.md", "LICENSE"}),
        (["adapter"], ADAPTER | {"README.md", "LICENSE"}),
        (["adapter", "gguf"], ADAPTER | GGUF | {"README.md", "LICENSE"}),
        (["fused"], FUSED),
    ],
)
def test_a_part_brings_the_license_along(run: Path, what: list[str], names: set[str]) -> None:
    assert {file.target for file in files_of(Run(run), what)} == names


def test_an_adapter_brings_the_runs_chat_template_along(run: Path) -> None:
    (run / "chat_template.jinja").write_text("{{ messages }}")
    (run / "gguf" / "adapter.gguf").write_bytes(b"GGUF")
    assert "gguf/chat_template.jinja" not in {file.target for file in files_of(Run(run), ["gguf"])}
    Run(run).update_export(lora_gguf="gguf/adapter.gguf")
    files = {file.target: file.source for file in files_of(Run(run), [])}
    assert files["adapter/chat_template.jinja"] == files["gguf/chat_template.jinja"] == run / "chat_template.jinja"
    assert (run / "chat_template.jinja") in [file.source for file in adapter_files(Run(run))]


def test_public_only_when_asked(hub: Hub, push: Push) -> None:
    assert push("me/model", "--public", "--what", "gguf").returncode == 0
    assert hub.repos[0].get("private") is False or hub.repos[0].get("visibility") == "public"
    assert set(hub.commits[0]) == GGUF | {"README.md", "LICENSE"}


@pytest.mark.parametrize("at", ["/api/repos/create", "/preupload/", "/info/lfs/", "/storage/", "/commit/"])
def test_a_failure_leaves_the_run_whole_and_says_how_to_go_on(hub: Hub, run: Path, push: Push, at: str) -> None:
    hub.fail = at
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = push("me/model", "--what", "adapter", "gguf", "--public")
    (run / ".lock").unlink()
    assert done.returncode == 1
    error, fix = done.stderr.strip().split("\n")
    assert error.startswith("error: the upload to me/model failed: ")
    again = f"python cli.py push {run} me/model --what adapter gguf --public"
    assert fix == f"fix:   The run in {run} is complete. Try again: {again}"
    assert hub.commits == []
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    hub.fail = ""
    assert push("me/model").returncode == 0


@pytest.mark.parametrize(
    ("repo", "token", "who", "said"),
    [
        ("me/a--b", TOKEN, {}, "error: push to 'me/a--b': Cannot have -- or .. in repo_id"),
        ("a/b/c", TOKEN, {}, "error: push to 'a/b/c': Repo id must be in the form"),
        ("me/model", None, {}, "error: push to me/model: no hub token was found."),
        ("you/model", TOKEN, {}, "error: push to you/model: your token is for me, team."),
        (
            "me/model",
            TOKEN,
            {"auth": {"accessToken": {"role": "read"}}},
            "error: push to me/model: your token is read-only",
        ),
    ],
)
def test_what_is_looked_at_before_anything_is_sent(
    hub: Hub, push: Push, repo: str, token: str | None, who: dict, said: str
) -> None:
    hub.who = hub.who | who
    done = push(repo, token=token)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert "\nfix:   " in done.stderr
    assert set(hub.asked) <= {"GET /api/whoami-v2"}


def test_a_hub_that_refuses_the_token(hub: Hub, push: Push) -> None:
    hub.fail = "/api/whoami"
    done = push("me/model")
    assert done.returncode == 1
    assert done.stderr.startswith("error: push to me/model: the hub does not accept your token: ")
    assert TOKEN not in done.stderr


def test_train_looks_at_the_token_before_it_reads_a_row(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.enter(monkeypatch, tmp_path, None)
    argv = ["train", "--data", "nosuch.jsonl", "--model", "x/y", "--push", "me/model", "--backend", "torch"]
    monkeypatch.setattr(sys, "argv", ["cli.py", *argv, "--device", "cpu"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("error: push to me/model: no hub token was found.\nfix:   Log in")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "interrupted"}, "has not finished training."),
        ({"export": {}}, "has no gguf."),
        ({"base": None}, "has not been exported by this version."),
    ],
)
def test_a_run_that_is_not_ready(run: Path, push: Push, change: dict, said: str) -> None:
    content = json.loads((run / "run.json").read_text()) | change
    (run / "run.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    done = push("me/model", "--what", "gguf", "--dry-run")
    assert done.returncode == 1
    assert said in done.stderr
    assert "fix:   " in done.stderr


def test_a_name_that_the_license_does_not_want_is_told(run: Path, push: Push) -> None:
    finished_run(run, KNOWN["llama3.2"])
    warning = "warning: the base's license asks that a derived model's name begin with 'Llama'; me/pip's does not"
    assert warning in " ".join(push("me/pip", "--dry-run").stdout.split())
    assert "warning" not in push("me/Llama-3.2-pip", "--dry-run").stdout


@pytest.mark.parametrize("fail", ["/api/whoami", "/api/repos/create", "/commit/", "nothing"])
def test_credentials_in_the_hubs_address_are_not_shown(
    hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    hub.fail, hub.url = fail, hub.url.replace("http://", "http://someone:hush-hush@")
    done = push("me/model")
    assert done.returncode == (fail != "nothing")
    assert "hush-hush" not in done.stdout + done.stderr
    assert "someone" not in done.stdout + done.stderr


BROKEN = {"verdict": "broken", "checks": [{"name": "prompt", "state": "broken", "text": "a row's words"}], "rows": 3}


def test_a_broken_run_is_uploaded_only_on_demand(hub: Hub, run: Path, push: Push) -> None:
    Run(run).update(verify=BROKEN)
    for dry in (["--dry-run"], []):
        done = push("me/model", *dry)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {run}: `verify` calls it broken: what llama.cpp runs is not what was")
        assert "or add --anyway" in done.stderr
    assert hub.asked == []
    assert push("me/model", "--anyway").returncode == 0
    card = hub.commits[0]["README.md"].decode()
    assert "Verdict: broken. What llama.cpp runs is NOT what was trained." in card
    assert "a row's words" not in card


def test_a_dry_run_writes_nothing_and_waits_for_nobody(run: Path, push: Push) -> None:
    """The folder may be read-only: to hold it would need a file in it."""
    assert push("me/model", "--dry-run").returncode == 0
    assert not (run / ".lock").exists()
    with held(run):
        assert push("me/model", "--dry-run").returncode == 0
        assert push("me/model").returncode == 1


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=str)
@pytest.mark.parametrize("name", ["gguf/Modelfile", "fused/LICENSE", "fused/model.safetensors", "adapter"])
def test_a_link_out_of_the_run_is_never_followed(
    hub: Hub, run: Path, push: Push, name: str, options: list[str]
) -> None:
    secret = run.parent / "secret"
    (run / name).rename(secret)
    (run / name).symlink_to(secret)
    done = push("me/model", *options)
    assert (done.returncode, done.stdout, hub.asked) == (1, "", [])
    assert f"links in it lead out of the folder: {name} to {secret}" in done.stderr


def test_a_link_to_itself_is_no_crash(run: Path, push: Push) -> None:
    (run / "fused" / "LICENSE.txt").symlink_to("LICENSE.txt")
    assert "Traceback" not in (done := push("me/model", "--dry-run")).stderr
    assert "this is a bug" not in done.stderr


def write_attest(run: Path, **changes: Any) -> set[str]:
    """The targets of an upload of a run with both files, and with a record of them."""
    files = {name: run / name for name in ("attest.json", "attest.html")}
    for path in files.values():
        path.write_text("{}")
    digests = {name: file_digest(path) for name, path in files.items()}
    edit_record(run, attest={"sha256": "ab12", "files": digests} | changes)
    return {file.target for file in files_of(Run(run), [])} & {*files}


def test_an_attest_goes_along_unless_it_holds_text(run: Path) -> None:
    assert write_attest(run) == {"attest.json", "attest.html"}
    assert write_attest(run, with_text=True) == set()
    edit_record(run, attest=None)
    assert not {"attest.json", "attest.html"} & {file.target for file in files_of(Run(run), [])}


@pytest.mark.parametrize("name", ["attest.json", "attest.html"])
def test_an_attest_that_was_altered_or_is_gone_is_not_uploaded(run: Path, name: str) -> None:
    write_attest(run)
    (run / name).write_text("[]")
    with pytest.raises(UserError, match=f"{name} is not what `attest` wrote"):
        files_of(Run(run), [])
    (run / name).unlink()
    with pytest.raises(UserError, match=f"{name} is not what `attest` wrote"):
        files_of(Run(run), [])
