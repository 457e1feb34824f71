"""A stand-in for the hub's API on this machine, and a finished run to upload to it."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from common.models.license import Terms
from common.recipe import Recipe
from common.run_record import Run
from tests.backends import make_plan, make_recipe

TOKEN = "hf_TheTokenThatNobodyMayKeep"
WRITER = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}}


@dataclass
class Hub:
    """What was asked (`GET /path`), with which headers and body, and the files that were committed."""

    url: str
    who: dict[str, Any] = field(default_factory=lambda: WRITER)
    fail: str = ""  # answer 500 to what holds this in its path
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    repos: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, bytes]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)  # files that were in the repository

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}  # xet has servers of its own
        kept |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def enter(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = TOKEN) -> None:
        """This process asks here from now on."""
        from huggingface_hub import constants

        for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet has servers of its own

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/whoami-v2":
            return self.who
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            self.repos.append(json.loads(body))
            return {"url": f"{self.url}/{self.repos[-1]['organization'] or 'me'}/{self.repos[-1]['name']}"}
        if "/preupload/" in path:
            large = (".safetensors", ".gguf")
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(large) else "regular" for name in files}
            return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.url}/storage/{o['oid']}"}}} for o in objects]
            return {"transfer": "basic", "objects": upload}
        if path.startswith("/storage/"):
            self.stored[path.removeprefix("/storage/")] = body
            return {}
        if "/commit/" in path:
            self.commits.append(self._committed([json.loads(line) for line in body.decode().splitlines()]))
            return {"commitUrl": f"{self.url}/me/model/commit/{'a' * 40}", "commitOid": "a" * 40}
        if "/tree/main" in path:
            names = {**{name: b"" for name in self.before}, **{k: v for made in self.commits for k, v in made.items()}}
            return [{"type": "file", "path": name, "size": 1, "oid": "a"} for name in names]
        raise AssertionError(f"{path} is not a part of this stand-in")

    def _committed(self, lines: list[dict[str, Any]]) -> dict[str, bytes]:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        return files


@contextmanager
def serve() -> Iterator[Hub]:
    """The stand-in on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/api/agent-harnesses":  # huggingface_hub's own question, once a day and without a token
                assert TOKEN not in str(self.headers)
                self.send_error(404)
                return
            hub.asked.append(f"{self.command} {self.path}")
            hub.headers.append(dict(self.headers))
            hub.bodies.append(body)
            failed = bool(hub.fail) and hub.fail in self.path
            content = json.dumps({"error": "full"} if failed else hub.answer(self.path, body)).encode()
            self.send_response(400 if failed else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *words: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def finished_run(folder: Path, terms: Terms | None = None, model: str = "some/base", **changes: Any) -> Path:
    """A run folder with small files of every kind, those that are nobody's business among them."""
    secret = f"kept here: {folder}"
    files = {
        "fused/model.safetensors": b"weights",
        "fused/config.json": json.dumps({"_name_or_path": str(folder / "base"), "model_type": "llama"}).encode(),
        "fused/tokenizer.json": b"{}",
        "fused/LICENSE": b"terms",
        "fused/USE_POLICY.md": b"policy",
        "fused/README.md": b"an old card",
        "fused/notes.txt": secret.encode(),
        "adapter/adapter_model.safetensors": b"adapter",
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": model, "r": 4}).encode(),
        "adapter/LICENSE": b"terms",
        "gguf/model-Q4_K_M.gguf": b"GGUF",
        "gguf/Modelfile": b"FROM ./model-Q4_K_M.gguf",
        "gguf/model-Q8_0.gguf": b"from an earlier export",
        "gguf/LICENSE": b"terms",
        "checkpoints/step-1/state.safetensors": b"state",
        "adapter-mlx/adapters.safetensors": b"mlx",
        "metrics.jsonl": secret.encode(),
        "environment.json": b"{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    recipe: Recipe = make_recipe(Path(model), model_hash="f00d", data_hash="beef", **changes)
    run = Run(folder)
    run.write_recipe(recipe)
    run.write_plan(make_plan("torch"))
    report = {"file": "gguf/model-Q4_K_M.gguf", "bytes": 4_000_000, "bits_per_weight": 4.9, "fallbacks": 3}
    run.update(
        status="complete",
        recipe_hash=recipe.hash(),
        model_hash="f00d",
        stop_ids=[2],
        base={"terms": vars(terms or Terms("apache-2.0")), "form": ""},
        options={"model": model, "data": str(folder / "rows.jsonl"), "fuse_into": None},
        data={"train_rows": 1234, "valid_rows": 0, "tokens": 5678, "label_tokens": 432},
        export={"fused": "fused", "gguf": [report], "sample": {"answer": "what a row's prompt brought"}},
        sample_prompt=[{"role": "user", "content": "a row's own words"}],
        steps=10,
        final_train_loss=1.25,
        best_valid_loss=None,
        tokens_per_second=99.5,
        peak_memory_bytes=2_000_000_000,
    )
    return folder
