"""A model of the hub, fetched into the hub's own cache, and what may go wrong on the way."""

import errno
import socket
import ssl
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line, os_fault
from common.model_files import HUB_FILES, HUB_IGNORED
from common.system.disk import require_disk

WANTED: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED}
_MOVE = "HF_HOME names another place for the hub's cache."
_NO_CONNECTION = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


class Unreachable(Exception):
    """Why nothing comes from the hub."""


def is_repository(name: str) -> bool:
    """Whether the hub could have a model of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def download(name: str) -> Path:
    """The model's folder in the hub's cache, fetched. Raises Unreachable without a connection, else UserError."""
    from huggingface_hub import model_info, snapshot_download

    try:
        info = model_info(name, files_metadata=True)
    except Exception as error:  # the HTTP client's own errors come through: no network, a timeout, a proxy's refusal
        raise _fault(name, error) from None
    _require_space(name, {file.rfilename: file.size or 0 for file in info.siblings or []})
    try:
        folder = snapshot_download(name, **WANTED)
    except Exception as error:  # as above, and the disk's
        raise _fault(name, error) from None
    return Path(folder)


def _require_space(name: str, sizes: dict[str, int]) -> None:
    """Raises UserError where the files that are wanted do not fit on the cache's disk."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    here = sum(path.stat().st_size for path in folder.glob("blobs/*"))  # parts too: a download continues
    needed = sum(sizes[file] for file in filter_repo_objects(sizes, **WANTED)) - here
    require_disk([(folder, name, needed)], f"Free some space, or move the cache: {_MOVE}")


def _fault(name: str, error: Exception) -> Exception:
    from httpx2 import HTTPError
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return UserError(
            f"--model {name}: this model is gated, and no token of yours has access to it.",
            "Accept the terms on the model's page, then log in: `hf auth login` (or set HF_TOKEN).",
        )
    answer = next((found for found in (error, error.__cause__) if isinstance(found, HfHubHTTPError)), None)
    # without a token a 401 means that there is no such model; with a good one the hub would answer 404
    if answer is not None and answer.response.status_code in (401, 403) and get_token() is not None:
        return UserError(
            f"--model {name}: the hub does not accept your token: {first_line(answer)}",
            "Log in again with `hf auth login`; for a public model also: unset HF_TOKEN.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"--model {name}: the hub has no such model, or it is private.",
            "Check the spelling; for a private model log in with `hf auth login`.",
        )
    if isinstance(error, OSError) and not isinstance(error, _NO_CONNECTION) and error.errno not in (None, *_NO_ROUTE):
        error.filename = error.filename or constants.HF_HUB_CACHE
        return os_fault(error, f"give the command again. {_MOVE}")
    why = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, (OSError, HTTPError)):
        return Unreachable(f"the hub cannot be reached ({why})")
    return UserError(f"--model {name}: the download failed: {why}", "Give the command again: it continues.")


def hub_answers() -> bool:
    """Whether the hub's host accepts a connection within five seconds: snapshot_download alone retries for minutes.

    Behind a proxy only the download itself can tell.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if "https" in getproxies():
        return True
    parts = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
