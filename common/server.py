"""A client for llama.cpp's own server."""

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import UserError
from common.llamacpp import LlamaCpp
from common.seam import Progress


class Server:
    """`llama-server` with one GGUF, on a free port of this machine; a context manager.

    context: tokens a slot may hold, prompt and answer together. slots: requests answered at once. threads: CPU threads,
    llama.cpp's own choice where None. lora: a LoRA GGUF to add to the model. Raises UserError where the server does not
    come up within `timeout` seconds or dies; its last lines are in the message.
    """

    def __init__(
        self,
        llama: LlamaCpp,
        gguf: Path,
        context: int = 4096,
        slots: int = 1,
        threads: int | None = None,
        timeout: float = 600,
        lora: Path | None = None,
    ) -> None:
        self.llama, self.gguf, self.context, self.slots = llama, gguf, context, slots
        self.threads, self.timeout, self.lora = threads, timeout, lora
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(os.devnull)

    def __enter__(self) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [str(self.llama.server), "-m", str(self.gguf), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["-c", str(self.context * self.slots), "-np", str(self.slots), "--jinja", "--no-webui"]
        command += ["--reasoning-format", "none"]  # the answer as the model wrote it, thoughts included
        if self.lora:
            command += ["--lora", str(self.lora)]
        if self.threads:
            command += ["-t", str(self.threads)]
        # llama-server reads LLAMA_ARG_* and LLAMA_API_KEY: the user's own would change what is being verified.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_ARG_", "LLAMA_API_"))}
        handle, name = tempfile.mkstemp(prefix="llama-server-", suffix=".log")
        self._log = Path(name)
        with os.fdopen(handle, "wb") as log:
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
            except OSError as error:
                self.__exit__(None, None, None)
                raise UserError(f"{self.llama.server} does not start: {error}", _SERVER_REMEDY) from error
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._log.unlink(missing_ok=True)

    def chat(self, messages: list[dict[str, Any]], max_tokens: int, **template: Any) -> str:
        """The model's greedy answer. `template`: values for the chat template, such as enable_thinking=False."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0, "cache_prompt": False}
        answer = self._request("POST", "/v1/chat/completions", body | {"chat_template_kwargs": template})
        return str(answer["choices"][0]["message"].get("content") or "")

    def chat_many(
        self, conversations: Sequence[list[dict[str, Any]]], max_tokens: int, progress: Progress, **template: Any
    ) -> list[str]:
        """`chat` for each conversation, `slots` at a time; answers in the order of the conversations."""
        with ThreadPoolExecutor(self.slots) as pool:
            jobs = [pool.submit(self.chat, messages, max_tokens, **template) for messages in conversations]
            try:
                for count, job in enumerate(as_completed(jobs), 1):
                    job.result()
                    progress(count / len(jobs), f"{count} of {len(jobs)} answers")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after a failure, do not ask the rest
        return [job.result() for job in jobs]

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text` by the GGUF's own vocabulary."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._request("POST", "/tokenize", body)["tokens"]]

    def _wait(self) -> None:
        end = time.monotonic() + self.timeout
        while self._process is not None and self._process.poll() is None and time.monotonic() < end:
            try:
                if self._send("GET", "/health", None, 5)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise self._dead("did not come up")

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            status, answer = self._send(method, path, body, self.timeout)
        except (OSError, http.client.HTTPException) as error:
            raise self._dead(f"gave no answer to {path} ({type(error).__name__})") from error
        if status != 200:
            raise UserError(f"llama-server refused {path}: {answer.decode(errors='replace')[:500]}", _SERVER_REMEDY)
        return json.loads(answer)

    def _send(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> tuple[int, bytes]:
        # http.client, because urllib would send a request for this very machine through the user's proxy
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _dead(self, what: str) -> UserError:
        lines = self._log.read_text(errors="replace").splitlines()[-15:] if self._log.is_file() else []
        return UserError(f"llama-server with {self.gguf} {what}. It ended with:\n" + "\n".join(lines), _SERVER_REMEDY)


_SERVER_REMEDY = (
    "Try a shorter context or fewer slots where memory is short; else try another llama.cpp: --llama-cpp DIR."
)
