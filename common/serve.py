"""`serve RUN`: the run's GGUF in llama.cpp's own server, an OpenAI-compatible endpoint."""

import json
import shlex
from pathlib import Path

from common.errors import UserError
from common.progress import Display
from common.server import LOOPBACK, Server, free_port
from common.voices import choose, llama_of


def serve(
    run: Path,
    quant: str | None,
    host: str,
    port: int,
    context: int,
    slots: int,
    llama_cpp: str | None,
    display: Display,
) -> None:
    """Until Ctrl-C. Raises UserError where the run has no GGUF, the port is taken, or the server dies."""
    target = choose(run, None, quant)
    if target.kind != "gguf":
        raise UserError(f"{run} is no GGUF, and llama.cpp serves nothing else.", "Give the run folder or a GGUF file.")
    if context < 1 or slots < 1:
        raise UserError("--context and --slots must be 1 or more.", "Leave them out.")
    free_port(host, port)
    llama = llama_of(target, llama_cpp, display)
    if host not in (LOOPBACK, "localhost", "::1"):
        display.warn(f"--host {host}: whoever reaches this machine over the network can use the model")
    with Server(llama, target.path, context, slots, host=host, port=port, flags=()) as server:
        url = f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
        display.say(f"{target.path.name} at {url}/v1 (OpenAI-compatible); Ctrl-C stops it. Try:")
        display.say(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")
        try:
            server.wait()
        except KeyboardInterrupt:
            display.say("stopped")
