"""`serve RUN`: the run's GGUF in llama.cpp's own server, an OpenAI-compatible endpoint."""

import ipaddress
import json
import os
import shlex
from pathlib import Path

from common.context import Context
from common.display import Display
from common.errors import UserError
from common.inference.chat_models import choose, llama_of
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, free_port, server_environment
from common.system.process import capture

# Nobody reads others' prompts, and no web page is given an answer together with the browser's credentials.
_SAFER = ("--no-slots", "--no-cors-credentials")


def serve(
    run: Path,
    quant: str | None,
    host: str,
    port: int,
    length: int,
    slots: int,
    api_key: str | None,
    no_auth: bool,
    context: Context,
) -> None:
    """Until Ctrl-C. Raises UserError where the run has no GGUF, the port is taken, or the server dies; and where others
    than this machine could reach it without a key, unless `no_auth`."""
    display, target = context.display, choose(run, None, quant)
    if target.kind != "gguf":
        raise UserError(f"{run} is no GGUF, and llama.cpp serves nothing else.", "Give the run folder or a GGUF file.")
    if length < 1 or slots < 1:
        raise UserError("--context and --slots must be 1 or more.", "Leave them out.")
    key = key_of(host, api_key, no_auth)
    free_port(host, port)
    llama = llama_of(target, context)
    if not is_loopback(host) and key is None:
        display.warn(f"--host {host} --no-auth: whoever reaches this machine over the network can use the model")
    with Server(llama, target.path, length, slots, host=host, port=port, flags=_flags(llama, display), key=key) as up:
        url = f"http://{f'[{host}]' if ':' in host else host}:{up.port}"
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
        head = "-H 'Content-Type: application/json'"
        if key:
            shown = "$LLAMA_API_KEY" if key == os.environ.get("LLAMA_API_KEY") else "KEY"
            head += f' -H "Authorization: Bearer {shown}"'
        display.say(f"{target.path.name} at {url}/v1 (OpenAI-compatible); Ctrl-C stops it. Try:")
        display.say(f"curl {url}/v1/chat/completions {head} -d {shlex.quote(body)}")
        try:
            up.wait()
        except KeyboardInterrupt:
            display.say("stopped")


def key_of(host: str, api_key: str | None, no_auth: bool) -> str | None:
    """The key to ask of every request: --api-key, else LLAMA_API_KEY. Raises UserError where there must be one."""
    if no_auth and api_key:
        raise UserError("--api-key and --no-auth are both given.", "Leave one of them out.")
    key = None if no_auth else api_key or os.environ.get("LLAMA_API_KEY") or None
    if key is None and not no_auth and not is_loopback(host):
        raise UserError(
            f"--host {host}: whoever reaches this machine over the network could use the model.",
            "Give a key that they must bring, by LLAMA_API_KEY in the environment or --api-key; or say --no-auth.",
        )
    return key


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _flags(llama: LlamaCpp, display: Display) -> list[str]:
    """_SAFER as far as this llama-server knows them: an older one would not start."""
    known = capture([str(llama.server), "--help"], 60, lines=10_000, env=server_environment())[1]
    if missing := [flag for flag in _SAFER if flag not in known]:
        display.warn(f"{llama.server} knows no {' or '.join(missing)}: it is served without")
    return [flag for flag in _SAFER if flag not in missing]
