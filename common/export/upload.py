"""Upload a run to the hub: the fused model at the root, `adapter/`, `gguf/`, the card and the base's license files.

One commit holds them all, so a repository never shows half a run. huggingface_hub sends the token in the header of its
requests; it goes nowhere else.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.backend import Progress
from common.display import Display, gigabytes
from common.documents import read_json
from common.errors import UserError, first_line, masked
from common.export.model_card import PARTS, card, parts_of
from common.files import file_digest
from common.model_files import COPIED, TEMPLATE_FILE, license_files, read_config
from common.models.license import is_hub_name, terms_of
from common.run_lock import held, refuse_links
from common.run_record import Run

_FUSED = ("model*.safetensors", "config.json", "generation_config.json", *COPIED)
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_WEIGHTS = (".safetensors", ".gguf")
_NAMED = 5  # files in a warning
_PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."


@dataclass(frozen=True)
class File:
    target: str  # in the repository
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True)
class Upload:
    """What is asked of `push`. what: those of PARTS to upload, all that there are where it is empty."""

    what: tuple[str, ...] = ()
    private: bool = True  # where the repository is new
    dry_run: bool = False
    anyway: bool = False  # whatever the verdict


def push(run: Path, repo: str, asked: Upload, display: Display) -> None:
    """Upload a finished run, or parts of it.

    Raises UserError, also where the run's verdict is broken. The run itself is never changed by a failure, and the same
    command tries again.
    """
    found = Run(run)
    found.require_complete()
    if asked.dry_run:  # nothing is written: the folder may be read-only, or in use
        refuse_links(run)
        files = _checked_files(found, asked)
        check_name(repo)
        _show(found, files, repo, asked, display)
        kind = "private" if asked.private else "public"
        display.say(f"dry run: nothing was sent. {repo} would be created, {kind}, if it does not exist.")
        return
    with held(run):
        files = _checked_files(found, asked)
        repo = check_push(repo, asked.private, display)
        total = _show(found, files, repo, asked, display)
        options = "".join(f" {word}" for word in ("--what", *asked.what) if asked.what)
        options += f"{'' if asked.private else ' --public'}{' --anyway' if asked.anyway else ''}"
        again = f"The run in {found} is complete. Try again: python cli.py push {found} {repo}{options}"
        with _stage(f"upload {total} to {repo}", display) as progress:
            url = _upload(files, repo, asked.private, again, progress)
        found.update(pushed={"repo": repo, "files": [file.target for file in files]})
        display.say(f"uploaded: {url}")
        _warn_of_others({file.target for file in files}, repo, display)


def _warn_of_others(written: set[str], repo: str, display: Display) -> None:
    """Of weights and figures that an earlier upload left there."""
    from huggingface_hub import HfApi

    with display.optional("not looked at what else the repository holds"):
        kinds = (*_WEIGHTS, ".safetensors.index.json", "attest.json", "attest.html")
        others = sorted(name for name in HfApi().list_repo_files(repo) if name not in written and name.endswith(kinds))
        if others:
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            display.warn(
                f"{repo} also holds {', '.join(others[:_NAMED])}{more}, which this upload has not written: remove them "
                "there where they are of another run"
            )


def _checked_files(run: Run, asked: Upload) -> list[File]:
    record = run.record
    if record.base is None:
        raise UserError(f"{run} has not been exported by this version.", f"python cli.py fuse {run}")
    if record.verify and record.verify.verdict == "broken" and not asked.anyway:
        raise UserError(
            f"{run}: `verify` calls it broken: what llama.cpp runs is not what was trained.",
            f"See why: python cli.py verify {run}; or add --anyway: the card then says so.",
        )
    return files_of(run, asked.what)


def _show(run: Run, files: list[File], repo: str, asked: Upload, display: Display) -> str:
    """List the files; their size in all."""
    base = run.record.base
    begins = terms_of(base.terms).begins if base else ""
    if begins and not repo.rpartition("/")[2].lower().startswith(begins.lower().replace(" ", "-")):
        display.warn(f"the base's license asks that a derived model's name begin with {begins!r}; {repo}'s does not")
    total = gigabytes(sum(file.size for file in files))
    rows = [[file.target, f"{file.size:,}"] for file in files]
    display.table(f"{len(files)} files, {total}, for the model repository {repo}", ["file", "bytes"], rows)
    return total


def files_of(run: Run, what: Collection[str]) -> list[File]:
    """The run's files to upload, chosen by name: never checkpoints, metrics, run.json or other files."""
    present = parts_of(run)
    parts = [part for part in PARTS if part in what] if what else present
    if missing := [part for part in parts if part not in present]:
        raise UserError(f"{run} has no {', '.join(missing)}.", f"Make it: python cli.py fuse {run} --export gguf")
    if not parts:
        raise UserError(f"{run} holds nothing to upload.", f"Make it: python cli.py fuse {run} --export gguf")
    found: list[File] = []
    for part in parts:
        if part == "gguf":
            export = run.record.export
            files = [*(file for report in export.gguf for file in report.files), export.mmproj, export.lora_gguf]
            names = [*(Path(file).name for file in files if file), "Modelfile"]
        else:
            names = list(_FUSED if part == "fused" else _ADAPTER)
        paths = {path for name in names for path in (run.path / part).glob(name)}
        if not any(path.suffix in _WEIGHTS for path in paths):
            raise UserError(f"{run.path / part} holds no weights.", f"Make it: python cli.py fuse {run} --export gguf")
        head = "" if part == "fused" else f"{part}/"
        if part == "adapter" or (part == "gguf" and run.record.export.lora_gguf):
            found += _template(run, head)
        found += [File(f"{head}{path.name}", _public(path)) for path in sorted(paths)]
        found += [File(f"{head}{name}", run.path / part / name) for name in license_files(run.path / part)]
    if "fused" not in parts:  # the license must be at the root in any case
        found += [File(name, run.path / parts[0] / name) for name in license_files(run.path / parts[0])]
    found += _attest(run)
    return [File("README.md", card(run, parts).encode()), *found]


def _attest(run: Run) -> list[File]:
    """The run's attest, unless it holds rows as text: those stay here. Raises UserError where it was altered since."""
    made = run.record.attest
    if made is None or made.with_text:
        return []
    paths = [run.attest, run.attest.with_suffix(".html")]
    for path in paths:
        if not path.is_file() or file_digest(path) != made.files.get(path.name):
            raise UserError(f"{path} is not what `attest` wrote.", f"Make it again: python cli.py attest {run}")
    return [File(path.name, path) for path in paths]


def adapter_files(run: Run) -> list[File]:
    """The run's adapter as it may be published, each file under its own name."""
    return [*(File(name, _public(run.adapter / name)) for name in _ADAPTER), *_template(run)]


def _template(run: Run, head: str = "") -> list[File]:
    """The chat template that an adapter is served with: its base's may be another. None for plain text."""
    return [File(f"{head}{TEMPLATE_FILE}", run.template)] if run.template.is_file() else []


def _public(path: Path) -> Path | bytes:
    """The file, or its contents where a config names its base by a path of this machine: with the bare name instead."""
    if path.suffix != ".json" or "config" not in path.name:
        return path
    content = read_config(path)  # without the keys that name code: an older version left them in
    private = [key for key in _PATH_KEYS if content.get(key) and not is_hub_name(str(content[key]))]
    if not private and content == read_json(path, "Fetch the model's files again."):
        return path
    return (json.dumps(content | {key: Path(str(content[key])).name for key in private}, indent=2) + "\n").encode()


def check_name(repo: str) -> None:
    """Raises UserError where the hub would not take the name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"push to {repo!r}: {error}", "Give owner/name, as in --push me/my-model.") from None


def check_push(repo: str, private: bool, display: Display) -> str:
    """`owner/name`, once the name, the token and its permission to write there are checked. Raises UserError.

    Called before training, so that what would fail at the end fails at once.
    """
    from huggingface_hub import HfApi, get_token

    check_name(repo)
    if get_token() is None:
        raise UserError(f"push to {repo}: no hub token was found.", _LOGIN)
    api = HfApi()
    try:
        who = api.whoami()
    except Exception as error:  # the hub's library lets its HTTP client's errors through
        raise UserError(
            f"push to {repo}: the hub does not accept your token: {first_line(error)}",
            f"{_LOGIN} Or leave the upload for later: python cli.py push RUN {repo}",
        ) from None
    owner, _, name = repo.rpartition("/")
    owner = owner or who["name"]
    owners = [who["name"], *(group["name"] for group in who.get("orgs", []))]
    if owner not in owners:
        raise UserError(f"push to {repo}: your token is for {', '.join(owners)}.", "Give one of these as the owner.")
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(f"push to {repo}: your token is read-only.", _LOGIN)
    display.say(f"the result goes to {owner}/{name} on the hub, {'private' if private else 'public'} if it is new")
    return f"{owner}/{name}"


@contextmanager
def _stage(name: str, display: Display) -> Iterator[Progress]:
    """On a terminal the hub's own bars, which count bytes; elsewhere lines that count files."""
    from huggingface_hub.utils import disable_progress_bars

    if display.mode == "rich":
        display.say(name)
        yield lambda share, text: None
    else:
        with disable_progress_bars(), display.stage(name) as progress:
            yield progress


def _upload(files: list[File], repo: str, private: bool, again: str, progress: Progress) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, additions = HfApi(), []

    def failed(error: Exception) -> UserError:
        return UserError(f"the upload to {repo} failed: {first_line(error)}", again)

    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
    except Exception as error:  # as above
        raise failed(error) from None
    done, total = 0, sum(file.size for file in files)
    for file in files:
        progress(done / total, file.target)
        done += file.size
        additions.append(CommitOperationAdd(file.target, file.source))
        if not file.target.endswith(_WEIGHTS):
            continue  # small: within the commit
        try:
            api.preupload_lfs_files(repo, additions[-1:])
        except Exception as error:  # as above
            raise failed(error) from None
    try:
        api.create_commit(repo, additions, commit_message="Fine-tuned by Twintune")
    except Exception as error:  # as above
        raise failed(error) from None
    return masked(str(made))
