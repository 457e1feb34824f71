"""llama.cpp's own server, started and stopped, and a client for it."""

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from common.backend import Progress
from common.data.chat_template import Message
from common.errors import UserError
from common.llama_cpp.install import LlamaCpp, llama_environment
from common.sampling import Sampling
from common.system.process import running

LOOPBACK = "127.0.0.1"
RAW = ("--reasoning-format", "none")  # the answer as the model wrote it, reasoning included
_REMEDY = "Try a shorter context or fewer slots where memory is short; else try another llama.cpp: --llama-cpp DIR."


@dataclass(frozen=True)
class ServerOptions:
    """How `llama-server` is started.

    context: tokens a slot may hold, prompt and answer together. slots: requests answered at once. threads: CPU threads,
    llama.cpp's own choice where None. lora: a LoRA GGUF to add to the model. template: a chat template file in place of
    the GGUF's. port: 0 takes a free one. flags: further flags of llama-server; RAW leaves reasoning in the answer.
    key: what every request must bring; this class's own methods bring none. timeout: seconds until the server must be
    up, and until it must send the next part of an answer.
    """

    context: int = 4096
    slots: int = 1
    threads: int | None = None
    lora: Path | None = None
    template: Path | None = None
    host: str = LOOPBACK
    port: int = 0
    flags: Sequence[str] = RAW
    key: str | None = None
    timeout: float = 600


class Server:
    """`llama-server` with one GGUF; a context manager. `port` is the one that it listens on.

    Raises UserError where the port is taken, or the server does not come up within `timeout` seconds or dies; the
    message holds its last lines.
    """

    def __init__(self, llama: LlamaCpp, gguf: Path, options: ServerOptions | None = None) -> None:
        self.llama, self.gguf, self.options = llama, gguf, options or ServerOptions()
        self.port = self.options.port
        self._stack = ExitStack()

    def __enter__(self) -> "Server":
        import httpx2

        self.port = free_port(self.options.host, self.port)
        # every address includes this machine's own
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.options.host, self.options.host)  # noqa: S104
        handle, name = tempfile.mkstemp(prefix="llama-server-", suffix=".log")
        self._log = Path(name)
        with ExitStack() as stack:
            stack.callback(self._log.unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as log:
                self._process = stack.enter_context(self._started(log))
            # trust_env: the user's proxy has no part in a request to this machine. One connection a request: the server
            # closes idle ones, which a request may then meet.
            self._client = stack.enter_context(
                httpx2.Client(
                    base_url=httpx2.URL(scheme="http", host=host, port=self.port),
                    timeout=self.options.timeout,
                    limits=httpx2.Limits(max_keepalive_connections=0),
                    trust_env=False,
                    verify=False,  # there is no TLS; loading certificates takes time
                )
            )
            self._wait()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def chat(self, messages: list[dict[str, Any]], max_tokens: int, **template: Any) -> str:
        """The model's greedy answer. `template`: values for the chat template, such as enable_thinking=False."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0, "cache_prompt": False}
        answer = self._request("/v1/chat/completions", body | {"chat_template_kwargs": template})
        return str(answer["choices"][0]["message"].get("content") or "")

    def chat_many(
        self, conversations: Sequence[list[dict[str, Any]]], max_tokens: int, progress: Progress, **template: Any
    ) -> list[str]:
        """`chat` for each conversation, `slots` at a time; answers in the order of the conversations."""
        with ThreadPoolExecutor(self.options.slots) as pool:
            jobs = [pool.submit(self.chat, messages, max_tokens, **template) for messages in conversations]
            try:
                for count, job in enumerate(as_completed(jobs), 1):
                    job.result()
                    progress(count / len(jobs), f"{count} of {len(jobs)} answers")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after a failure, do not ask the rest
        return [job.result() for job in jobs]

    def stream(
        self, messages: list[dict[str, Any]], sampling: Sampling, tools: Sequence[Any] = (), **template: Any
    ) -> Generator[tuple[str, str | None], None, None]:
        """The answer as it comes: `(text, None)` for each piece, then `("", "stop")` or, cut by max_tokens, `"length"`.

        Closing the iterator stops the answer. Raises UserError where the server refuses the request or dies.
        """
        import httpx2

        body = {"messages": messages, "stream": True, "chat_template_kwargs": template} | sampling.request()
        if tools:
            body["tools"] = list(tools)
        try:
            with self._client.stream("POST", "/v1/chat/completions", **_json(body)) as response:
                if response.status_code != 200:
                    raise _refusal("/v1/chat/completions", response.read())
                for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        return
                    if event.data:
                        yield from _pieces(json.loads(event.data))
        except httpx2.HTTPError as error:
            raise self._dead(f"broke off its answer ({type(error).__name__})") from error
        raise self._dead("broke off its answer")  # the stream ended before [DONE]

    def prompt(self, messages: list[dict[str, Any]], tools: Sequence[Any] = (), **template: Any) -> str:
        """The prompt that the model would be given. Raises UserError where its chat template refuses the messages."""
        body: dict[str, Any] = {"messages": messages, "chat_template_kwargs": template}
        return str(self._request("/apply-template", body | ({"tools": list(tools)} if tools else {}))["prompt"])

    def complete(self, ids: Sequence[int], max_tokens: int) -> tuple[str, str]:
        """`(the greedy continuation of the token ids, why it ended)`: `eos`, or `limit` where max_tokens cut it."""
        body = {"prompt": list(ids), "n_predict": max_tokens, "temperature": 0, "cache_prompt": False}
        answer = self._request("/completion", body)
        return str(answer["content"]), str(answer["stop_type"])

    def wait(self) -> None:
        """Wait until the server ends; it does so by itself only when it fails, so this raises UserError."""
        self._process.wait()
        raise self._dead("ended")

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text` by the GGUF's own vocabulary."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._request("/tokenize", body)["tokens"]]

    @contextmanager
    def _started(self, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        options = self.options
        command = [str(self.llama.server), "-m", str(self.gguf), "--host", options.host, "--port", str(self.port)]
        command += ["-c", str(options.context * options.slots), "-np", str(options.slots), "--jinja", "--no-webui"]
        command += options.flags
        if options.template:
            command += ["--chat-template-file", str(options.template)]
        if options.lora:
            command += ["--lora", str(options.lora)]
        if options.threads:
            command += ["-t", str(options.threads)]
        env = llama_environment()
        if options.key:
            env["LLAMA_API_KEY"] = options.key  # not a flag: `ps` shows those to everybody
        # a session of its own: a terminal's Ctrl-C is for us, and stops an answer, not the server
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        with ExitStack() as stack:
            try:
                process = stack.enter_context(running(command, grace=5, env=env, **pipes))
            except OSError as error:
                raise UserError(f"{self.llama.server} does not start: {error}", _REMEDY) from error
            yield process

    def _wait(self) -> None:
        import httpx2

        end = time.monotonic() + self.options.timeout
        while self._process.poll() is None and time.monotonic() < end:
            try:
                if self._client.get("/health", timeout=5).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.1)
        raise self._dead("did not come up")

    def _request(self, path: str, body: dict[str, Any]) -> Any:
        import httpx2

        try:
            response = self._client.post(path, **_json(body))
        except httpx2.HTTPError as error:
            raise self._dead(f"gave no answer to {path} ({type(error).__name__})") from error
        if response.status_code != 200:
            raise _refusal(path, response.content)
        return response.json()

    def _dead(self, what: str) -> UserError:
        lines = self._log.read_text(errors="replace").splitlines()[-15:] if self._log.is_file() else []
        return UserError(f"llama-server with {self.gguf} {what}. It ended with:\n" + "\n".join(lines), _REMEDY)


def _json(body: dict[str, Any]) -> dict[str, Any]:
    """The request's body in ASCII: httpx's own `json=` fails where a text holds half of a surrogate pair."""
    return {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}


def _pieces(event: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """What one event of a streamed answer holds, as `Server.stream` yields it."""
    if "error" in event:
        raise _refusal("to continue", json.dumps(event).encode())
    for choice in event.get("choices", []):
        if text := choice["delta"].get("content"):
            yield text, None
        if choice.get("finish_reason"):
            yield "", choice["finish_reason"]


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises UserError where it is taken, or `host` is not an address of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as test:
            if os.name != "nt":  # a port that was just closed is free; on Windows this would share a taken port
                test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind((host, port))
            return int(test.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} on {host} cannot be used: {error}.", "Give another --port.") from None


def _refusal(path: str, answer: bytes) -> UserError:
    """A UserError with the server's own message, where the answer holds one."""
    try:
        error = json.loads(answer)
        text = str(error.get("error", error).get("message"))
    except (ValueError, AttributeError):
        text = answer.decode(errors="replace")
    fix = "Start again (/reset), or give a larger --context." if "context size" in text else _REMEDY
    return UserError(f"llama-server refused {path}: {text[:500]}", fix)


def for_llama_cpp(message: Message) -> Message:
    """The message as llama-server takes it: a tool call's arguments are a JSON text, and no key is ours."""
    message = {key: value for key, value in message.items() if key not in ("train", "weight")}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [
            {"id": "0", **c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
            for c in calls
        ]
    return message
