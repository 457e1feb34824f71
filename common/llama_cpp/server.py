"""llama.cpp's own server, started and stopped, and a client for it."""

import json
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common.backend import Progress
from common.data.chat_template import Message
from common.errors import Ended, Refusal, Starved, Unable, UserError
from common.llama_cpp.install import OF_ANOTHER_CPU, LlamaCpp, llama_environment
from common.llama_cpp.server_log import bounded_log
from common.sampling import Sampling
from common.system.hardware import thread_limit
from common.system.ports import free_port
from common.system.process import failed_by_machine, of_another_cpu, running

LOOPBACK = "127.0.0.1"
RAW = ("--reasoning-format", "none")  # the answer as the model wrote it, reasoning included
AS_WRITTEN = (*RAW, "--skip-chat-parsing")  # and tool calls
_LINES = 200  # of what the server prints, kept for an error's words
_REMEDY = "Try a shorter context or fewer slots where memory is short; else try another llama.cpp: --llama-cpp DIR."


def new_key() -> str:
    return secrets.token_urlsafe(24)


@dataclass(frozen=True)
class ServerOptions:
    """How `llama-server` is started.

    context: tokens a slot may hold, prompt and answer together. slots: requests answered at once. threads: CPU threads,
    llama.cpp's own choice where None. lora: LoRA GGUFs to add to the model. mmproj: its vision tower. template: a chat
    template file in place of the GGUF's. port: 0 takes a free one. flags: further flags of llama-server; RAW leaves
    reasoning in the answer. key: what every request must bring, several separated by commas; None: nothing. timeout:
    seconds until the server must be up, and until it must send the next part of an answer. page: serve llama.cpp's chat
    page too, where the build has one. log: a file for what the server prints, bounded as in server_log.
    """

    context: int = 4096
    slots: int = 1
    threads: int | None = None
    lora: Sequence[Path] = ()
    mmproj: Path | None = None
    template: Path | None = None
    host: str = LOOPBACK
    port: int = 0
    flags: Sequence[str] = RAW
    key: str | None = field(default_factory=new_key)
    timeout: float = 600
    page: bool = False
    log: Path | None = None


class Server:
    """`llama-server` with one GGUF; a context manager. `port` is the one that it listens on.

    Raises UserError where the port is taken, or the server does not come up within `timeout` seconds or dies; the
    message holds its last lines.
    """

    def __init__(self, llama: LlamaCpp, gguf: Path, options: ServerOptions | None = None) -> None:
        self.llama, self.gguf, self.options = llama, gguf, options or ServerOptions()
        self.port = self.options.port
        self._stack = ExitStack()
        self._output: deque[str] = deque(maxlen=_LINES)

    def __enter__(self) -> "Server":
        import httpx2

        self.port = free_port(self.options.host, self.port)
        # every address includes this machine's own
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.options.host, self.options.host)  # noqa: S104
        with ExitStack() as stack:
            self._log = stack.enter_context(bounded_log(self.options.log))
            self._process = stack.enter_context(running(self._command(), **self._popen()))
            self._reader = threading.Thread(target=self._read_output, daemon=True)
            self._reader.start()
            # trust_env: the user's proxy has no part in a request to this machine. One connection a request: the server
            # closes idle ones, which a request may then meet.
            self._client = stack.enter_context(
                httpx2.Client(
                    base_url=httpx2.URL(scheme="http", host=host, port=self.port),
                    headers=_authorization(self.options.key),
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

    def chat(self, messages: list[dict[str, Any]], max_tokens: int, tools: Sequence[Any] = (), **template: Any) -> str:
        """The model's greedy answer. `template`: values for the chat template, such as enable_thinking=False."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0, "cache_prompt": False}
        body |= {"tools": list(tools)} if tools else {}
        answer = self._request("/v1/chat/completions", body | {"chat_template_kwargs": template})
        return str(answer["choices"][0]["message"].get("content") or "")

    def chat_many(
        self, conversations: Sequence[list[dict[str, Any]]], max_tokens: int, progress: Progress, **template: Any
    ) -> list[str]:
        """`chat` for each conversation, `slots` at a time; answers in the order of the conversations."""
        pool = ThreadPoolExecutor(self.options.slots)
        try:
            jobs = [pool.submit(self.chat, messages, max_tokens, **template) for messages in conversations]
            for count, job in enumerate(as_completed(jobs), 1):
                job.result()
                progress(count / len(jobs), f"{count} of {len(jobs)} answers")
        finally:  # after a failure or Ctrl-C: the rest is not asked, and what is under way ends with the server
            pool.shutdown(wait=False, cancel_futures=True)
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

    def has_page(self) -> bool:
        """Whether a browser is given a page to chat on: the build may have none."""
        import httpx2

        try:
            answer = self._client.get("/", timeout=10)
        except httpx2.HTTPError:
            return False
        return answer.status_code == 200 and "text/html" in answer.headers.get("content-type", "")

    def wait(self) -> None:
        """Wait until the server ends; it does so by itself only when it fails, so this raises UserError."""
        self._process.wait()
        raise self._dead("ended")

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text` by the GGUF's own vocabulary."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._request("/tokenize", body)["tokens"]]

    def _command(self) -> list[str]:
        options = self.options
        command = [str(self.llama.server), "-m", str(self.gguf), "--host", options.host, "--port", str(self.port)]
        command += ["-c", str(options.context * options.slots), "-np", str(options.slots), "--jinja"]
        command += [*([] if options.page else ["--no-webui"]), *options.flags]
        if options.template:
            command += ["--chat-template-file", str(options.template)]
        if options.lora:
            command += ["--lora", ",".join(map(str, options.lora))]
        if options.mmproj:
            command += ["--mmproj", str(options.mmproj)]
        if threads := options.threads or thread_limit():
            command += ["-t", str(threads)]
        return command

    def _popen(self) -> dict[str, Any]:
        env = llama_environment()
        if self.options.key:
            env["LLAMA_API_KEY"] = self.options.key  # not a flag: `ps` shows those to everybody
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return {"env": env, "encoding": "utf-8", "errors": "replace", **pipes}

    def _read_output(self) -> None:
        with suppress(ValueError):  # the server has ended, and its pipe was closed meanwhile
            for line in self._process.stdout or ():
                self._output.append(line.rstrip("\n"))
                self._log(self._output[-1])

    def _wait(self) -> None:
        import httpx2

        end = time.monotonic() + self.options.timeout
        while self._process.poll() is None and time.monotonic() < end:
            try:
                if self._client.get("/health", timeout=5).status_code == 200 and self._is_ours():
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.1)
        dead = self._dead("did not come up")
        raise (Unable if isinstance(dead, Unable) else UserError)(dead.what, dead.fix)  # nothing was asked of it yet

    def _is_ours(self) -> bool:
        """Whether this object's server answers, and not another's that was quicker to take the port: it has the key."""
        if self.options.key is None:
            return True  # a server without a key is asked nothing by this object
        asked: dict[str, Any] = _json({"content": ""})
        known = self._client.post("/tokenize", timeout=5, **asked)
        asked["headers"] |= _authorization(new_key())
        return known.status_code == 200 and self._client.post("/tokenize", timeout=5, **asked).status_code == 401

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
        with suppress(subprocess.TimeoutExpired):  # where it has just ended: its last lines come in a moment
            self._process.wait(1)
            self._reader.join(5)
        lines, ended = list(self._output)[-15:], self._process.poll()
        kind = Unable if ended is None else Starved if failed_by_machine(ended, lines) else Ended
        text = f"llama-server with {self.gguf} {what}. It ended with:\n" + "\n".join(lines)
        return kind(text, OF_ANOTHER_CPU if of_another_cpu(ended) else _REMEDY)


def _authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key.partition(',')[0]}"}


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


def _refusal(path: str, answer: bytes) -> Refusal:
    """With the server's own message, where the answer holds one."""
    try:
        error = json.loads(answer)
        text = str(error.get("error", error).get("message"))
    except (ValueError, AttributeError):
        text = answer.decode(errors="replace")
    fix = "Give a larger --context." if "context size" in text else _REMEDY
    return Refusal(f"llama-server refused {path}: {text[:500]}", fix)


def for_llama_cpp(message: Message) -> Message:
    """The message as llama-server takes it: a tool call's arguments are a JSON text, and no key is ours."""
    message = {key: value for key, value in message.items() if key not in ("train", "weight")}
    if calls := message.get("tool_calls"):
        functions = [call["function"] for call in calls]
        texts = [f | {"arguments": _as_json(f["arguments"])} for f in functions]
        message["tool_calls"] = [{"id": "0", **c, "function": f} for c, f in zip(calls, texts, strict=True)]
    return message


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
