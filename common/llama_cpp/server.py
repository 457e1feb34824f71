"""llama.cpp's own server, started and stopped, and a client for it."""

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from common.backend import Progress
from common.data.chat_template import Message
from common.errors import UserError
from common.llama_cpp.install import LlamaCpp
from common.sampling import Sampling

LOOPBACK = "127.0.0.1"
RAW = ("--reasoning-format", "none")  # the answer as the model wrote it, thoughts included


class Server:
    """`llama-server` with one GGUF; a context manager.

    context: tokens a slot may hold, prompt and answer together. slots: requests answered at once. threads: CPU threads,
    llama.cpp's own choice where None. lora: a LoRA GGUF to add to the model. template: a chat template file in place of
    the GGUF's. port: 0 takes a free one. flags: further ones of llama-server; RAW leaves reasoning in the answer.
    key: what every request must bring; this class's own methods bring none. Raises UserError where the port is taken,
    or the server does not come up within `timeout` seconds or dies; its last lines are in the message.
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
        template: Path | None = None,
        host: str = LOOPBACK,
        port: int = 0,
        flags: Sequence[str] = RAW,
        key: str | None = None,
    ) -> None:
        self.llama, self.gguf, self.context, self.slots = llama, gguf, context, slots
        self.threads, self.timeout, self.lora, self.template = threads, timeout, lora, template
        self.host, self.port, self.flags, self.key = host, port, flags, key
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(os.devnull)

    def __enter__(self) -> "Server":
        self.port = free_port(self.host, self.port)
        command = [str(self.llama.server), "-m", str(self.gguf), "--host", self.host, "--port", str(self.port)]
        command += ["-c", str(self.context * self.slots), "-np", str(self.slots), "--jinja", "--no-webui"]
        command += self.flags
        if self.template:
            command += ["--chat-template-file", str(self.template)]
        if self.lora:
            command += ["--lora", str(self.lora)]
        if self.threads:
            command += ["-t", str(self.threads)]
        env = server_environment()
        if self.key:
            env["LLAMA_API_KEY"] = self.key  # not a flag: `ps` shows those to everybody
        handle, name = tempfile.mkstemp(prefix="llama-server-", suffix=".log")
        self._log = Path(name)
        with os.fdopen(handle, "wb") as log:
            try:
                # a session of its own: a terminal's Ctrl-C is for us, and stops an answer, not the server
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
                )
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
        try:
            if self._process is not None:
                self._process.terminate()
                self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where a second Ctrl-C comes while it ends
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

    def stream(
        self, messages: list[dict[str, Any]], sampling: Sampling, tools: Sequence[Any] = (), **template: Any
    ) -> Generator[tuple[str, str | None], None, None]:
        """The answer as it comes: `(text, None)` for each piece, then `("", "stop")` or, cut by max_tokens, `"length"`.

        Closing the iterator stops the answer. Raises UserError where the server refuses the request or dies.
        """
        body = {"messages": messages, "stream": True, "chat_template_kwargs": template} | sampling.request()
        if tools:
            body["tools"] = list(tools)
        connection = self._connection(self.timeout)
        try:
            response = self._ask(connection, "POST", "/v1/chat/completions", body)
            if response.status != 200:
                raise _refusal("/v1/chat/completions", response.read())
            for event in read_events(response):
                if "error" in event:
                    raise _refusal("to go on", json.dumps(event).encode())
                for choice in event.get("choices", []):
                    if text := choice["delta"].get("content"):
                        yield text, None
                    if choice.get("finish_reason"):
                        yield "", choice["finish_reason"]
        except (OSError, EOFError, http.client.HTTPException) as error:
            raise self._dead(f"broke off its answer ({type(error).__name__})") from error
        finally:
            connection.close()

    def prompt(self, messages: list[dict[str, Any]], tools: Sequence[Any] = (), **template: Any) -> str:
        """The prompt that the model would be given. Raises UserError where its chat template refuses the messages."""
        body: dict[str, Any] = {"messages": messages, "chat_template_kwargs": template}
        return str(self._request("POST", "/apply-template", body | ({"tools": list(tools)} if tools else {}))["prompt"])

    def complete(self, ids: Sequence[int], max_tokens: int) -> tuple[str, str]:
        """`(what greedily follows the token ids, why it ended)`: `eos`, or `limit` where it would have gone on."""
        body = {"prompt": list(ids), "n_predict": max_tokens, "temperature": 0, "cache_prompt": False}
        answer = self._request("POST", "/completion", body)
        return str(answer["content"]), str(answer["stop_type"])

    def wait(self) -> None:
        """Until the server ends, which it does by itself only when it fails: then raises UserError."""
        if self._process is not None:
            self._process.wait()
        raise self._dead("ended")

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
            raise _refusal(path, answer)
        return json.loads(answer)

    def _send(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> tuple[int, bytes]:
        connection = self._connection(seconds)
        try:
            response = self._ask(connection, method, path, body)
            return response.status, response.read()
        finally:
            connection.close()

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        # http.client, because urllib would send a request for this very machine through the user's proxy
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)  # noqa: S104  # every address: ours too
        return http.client.HTTPConnection(host, self.port, timeout=seconds)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def _dead(self, what: str) -> UserError:
        lines = self._log.read_text(errors="replace").splitlines()[-15:] if self._log.is_file() else []
        return UserError(f"llama-server with {self.gguf} {what}. It ended with:\n" + "\n".join(lines), _SERVER_REMEDY)


def server_environment() -> dict[str, str]:
    """Without LLAMA_ARG_* and LLAMA_API_KEY, which llama-server reads: they would change what is being verified."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_ARG_", "LLAMA_API_"))}


def read_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Server-sent events (WHATWG HTML, section 9.2) that hold JSON, up to `[DONE]`; all but data is passed over.

    Raises EOFError where the lines end before that.
    """
    data: list[str] = []
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text == "[DONE]":
                return
            yield json.loads(text)
    raise EOFError("the stream ended before [DONE]")


def free_port(host: str, port: int) -> int:
    """`port`, or of 0 a free one. Raises UserError where another program has it, or `host` is no address of ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            if os.name != "nt":  # a port that was just left is free; on Windows this would let us share a taken one
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} on {host} cannot be used: {error}.", "Give another --port.") from None


def _refusal(path: str, answer: bytes) -> UserError:
    """In the server's own words, where it has some."""
    try:
        error = json.loads(answer)
        text = str(error.get("error", error).get("message"))
    except (ValueError, AttributeError):
        text = answer.decode(errors="replace")
    fix = "Start again (/reset), or give it more room: --context." if "context size" in text else _SERVER_REMEDY
    return UserError(f"llama-server refused {path}: {text[:500]}", fix)


_SERVER_REMEDY = (
    "Try a shorter context or fewer slots where memory is short; else try another llama.cpp: --llama-cpp DIR."
)


def for_llama_cpp(message: Message) -> Message:
    """As its interface wants it: a call's arguments are a text there."""
    message = {key: value for key, value in message.items() if key != "train"}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [
            {"id": "0", **c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
            for c in calls
        ]
    return message
