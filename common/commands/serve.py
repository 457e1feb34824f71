"""`serve RUN`: the run's GGUF in llama.cpp's own server, an OpenAI-compatible endpoint."""

import argparse
import ipaddress
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from common.commands.arguments import add_llama, count
from common.context import Context
from common.display import Display
from common.errors import PROGRAM, UserError
from common.inference.chat_models import Target, choose, llama_of
from common.llama_cpp.install import LlamaCpp, llama_environment
from common.llama_cpp.server import Server, ServerOptions, new_key
from common.models.gguf_import import is_gguf
from common.system.ports import address_of, free_port
from common.system.process import capture

# Nobody reads others' prompts, and no web page but this machine's own is given an answer.
_SAFER = (("--no-slots",), ("--cors-origins", "localhost"), ("--no-cors-credentials",))


@dataclass(frozen=True)
class Address:
    """Where to listen, and the key that requests must bring (None: no key)."""

    host: str
    port: int  # 0: a free one
    key: str | None
    shown_key: str = ""  # as the user may be shown it


@dataclass(frozen=True)
class Wanted:
    """How to serve. length: tokens of a prompt and its answer. slots: requests answered at once.

    mmproj: the vision tower, the run's own where the path is empty. lora: GGUFs of adapters. alias: the model's name in
    the API. gpu_layers: as llama-server takes it. log: the server's log.
    """

    length: int = 4096
    slots: int = 1
    mmproj: Path | None = None
    lora: tuple[Path, ...] = ()
    alias: str = ""
    gpu_layers: str = ""
    log: Path | None = None


def serve(target: Target, address: Address, wanted: Wanted, context: Context) -> None:
    """Serve until Ctrl-C.

    Raises UserError where the target is not a GGUF, a file is missing, the port is taken, or the server dies.
    """
    display, host, port, key = context.display, address.host, address.port, address.key
    if target.kind != "gguf":
        raise UserError(
            f"{target.run} is not a GGUF, and llama.cpp serves nothing else.", "Give the run folder or a GGUF file."
        )
    mmproj = _checked(target, wanted)
    free_port(host, port)
    llama = llama_of(target, context)
    if not is_loopback(host) and key is None:
        display.warn(f"--host {host} --no-auth: whoever reaches this machine over the network can use the model")
    options = ServerOptions(
        context=wanted.length,
        slots=wanted.slots,
        lora=wanted.lora,
        mmproj=mmproj,
        host=host,
        port=port,
        flags=[*_flags(llama, display), *_named(wanted)],
        key=key,
        page=True,
        log=wanted.log,
    )
    with Server(llama, target.path, options) as up:
        url = f"http://{address_of(host, up.port)}"
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
        head = "-H 'Content-Type: application/json'"
        if key:
            head += f' -H "Authorization: Bearer {address.shown_key}"'
        display.say(f"{target.path.name} at {url}/v1 (OpenAI-compatible); Ctrl-C stops it. Try:")
        display.say(f"curl {url}/v1/chat/completions {head} -d {shlex.quote(body)}")
        if up.has_page():
            display.say(f"a page to chat on: {url}{' (its settings ask for the API key)' if key else ''}")
        else:
            display.say(
                "no chat page: this build of llama.cpp has none (another may: --llama-cpp DIR); in the terminal: "
                f"{PROGRAM} chat {target.run or target.path}"
            )
        try:
            up.wait()
        except KeyboardInterrupt:
            display.say("stopped")


def _checked(target: Target, wanted: Wanted) -> Path | None:
    """The vision tower to serve. Raises UserError for what would fail later."""
    if wanted.gpu_layers and not re.fullmatch(r"auto|all|\d{1,4}", wanted.gpu_layers, re.ASCII):
        raise UserError(f"--gpu-layers {wanted.gpu_layers!r} is not a number, auto or all.", "Give one of these.")
    mmproj = wanted.mmproj
    if mmproj == Path():
        made = target.record.export.mmproj if target.record else None
        if made is None or target.run is None:
            raise UserError(
                f"--mmproj: {target.run or target.path} has no vision tower.", "Name its file: --mmproj FILE"
            )
        mmproj = target.run.path / made
    for name, file in [("--mmproj", mmproj), *(("--lora", path) for path in wanted.lora)]:
        if file is not None and not is_gguf(file):
            raise UserError(f"{name} {file} is not a GGUF file.", "Check the path.")
    if split := [path for path in wanted.lora if "," in str(path)]:
        raise UserError(f"--lora {split[0]}: llama-server takes no path with a comma.", "Rename the file.")
    return mmproj


def _named(wanted: Wanted) -> list[str]:
    flags = [("--alias", wanted.alias), ("--gpu-layers", wanted.gpu_layers)]
    return [word for name, value in flags if value for word in (name, value)]


def key_of(host: str, api_key: str | None, no_auth: bool) -> tuple[str | None, str]:
    """The key to ask of every request, and how to show it: --api-key, LLAMA_API_KEY, or on this machine a random one.

    Raises UserError where one must be given, or cannot be sent.
    """
    if no_auth and api_key:
        raise UserError("--api-key and --no-auth are both given.", "Leave one of them out.")
    if no_auth:
        return None, ""
    if key := api_key or os.environ.get("LLAMA_API_KEY"):
        if not re.fullmatch(r"[!#-+\--~][!#-~]*", key):  # a comma separates keys, and quotes group them
            raise UserError("The API key holds characters that a request cannot bring.", "Use letters and digits.")
        return key, "KEY" if api_key else "$LLAMA_API_KEY"
    if not is_loopback(host):
        raise UserError(
            f"--host {host}: whoever reaches this machine over the network could use the model.",
            "Require a key, by LLAMA_API_KEY in the environment or --api-key; or say --no-auth.",
        )
    key = new_key()
    return key, key


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _flags(llama: LlamaCpp, display: Display) -> list[str]:
    """_SAFER as far as this llama-server knows them: an older one would not start."""
    known = capture([str(llama.server), "--help"], 60, lines=10_000, env=llama_environment())[1]
    if missing := [flag[0] for flag in _SAFER if flag[0] not in known]:
        display.warn(f"{llama.server} lacks the option {' and '.join(missing)}; the server runs without it")
    return [word for flag in _SAFER if flag[0] not in missing for word in flag]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder or GGUF file")
    parser.add_argument("--quant", metavar="TYPE", help="GGUF of the run to serve; the first unless given")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port; 0 takes a free one (default: 8080)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; for any but this machine's own give a key or --no-auth (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--context",
        type=count,
        default=4096,
        metavar="N",
        help="most tokens of a prompt and its answer (default: 4096)",
    )
    parser.add_argument("--slots", type=count, default=1, metavar="N", help="requests answered at once (default: 1)")
    parser.add_argument(
        "--mmproj",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="vision tower to serve too, for images: the run's own, or this file",
    )
    parser.add_argument(
        "--lora", type=Path, nargs="+", default=[], metavar="FILE", help="GGUFs of adapters to add to the model"
    )
    parser.add_argument("--alias", default="", metavar="NAME", help="name of the model in the API")
    parser.add_argument(
        "--gpu-layers",
        "--gpu_layers",
        default="",
        metavar="N",
        help="most layers to hold in the GPU's memory: a number, auto or all (default: as llama-server decides)",
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="keep what the server prints, its last 5 to 10 MB in FILE and FILE.1"
    )
    parser.add_argument(
        "--api-key",
        "--api_key",
        metavar="KEY",
        help="key of every request; LLAMA_API_KEY does the same, unseen by `ps` (default: a random one)",
    )
    parser.add_argument("--no-auth", "--no_auth", action="store_true", help="serve without a key, on any host")
    add_llama(parser)


def run(args: argparse.Namespace, context: Context) -> None:
    target = choose(args.run, None, args.quant)
    address = Address(args.host, args.port, *key_of(args.host, args.api_key, args.no_auth))
    wanted = Wanted(args.context, args.slots, args.mmproj, tuple(args.lora), args.alias, args.gpu_layers, args.log)
    serve(target, address, wanted, context)
