"""`worker`: help a training on another computer; `train --with HOST:PORT` is the other side."""

import argparse
from typing import cast

from common.backend_package import RankPackage
from common.commands.several import base_folder
from common.context import Context
from common.errors import UserError
from common.system.hardware import choose_backend
from common.system.ports import address_of, free_port
from common.training.transport import secret, serve
from common.training.worker import Worker

_LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--port N] [--host ADDRESS] [--model NAME] [--backend NAME] [--device NAME]"
    parser.epilog = (
        "Both sides need the same secret in the environment; an error says how. Only this computer can reach the "
        "worker unless --host is given; over a network, tunnel the port: ssh -L 7070:localhost:7070 MACHINE."
    )
    parser.add_argument("--port", type=int, default=7070, metavar="N", help="port to listen on (default: 7070)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--model", metavar="NAME", help="the model here; as train names it unless given")
    parser.add_argument("--backend", choices=("auto", "mlx", "torch"), default="auto", help="as of train")
    parser.add_argument("--device", default="auto", metavar="NAME", help="as of train")


def run(args: argparse.Namespace, context: Context) -> None:
    shared, display = secret(), context.display
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: must be between 0 and 65535.", "Give another.")
    host = args.host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    free_port(host, args.port)  # the error of gRPC lacks the reason
    name = choose_backend(args.backend, context.backends).value
    package = cast(RankPackage, context.backends(name))
    device = package.choose_device(args.device)
    worker = Worker(package, name, device.value, lambda recipe: base_folder(args.model, recipe, name), display.say)
    server, port = serve(worker.answer, address_of(host, args.port), shared)
    display.say(
        f"a worker on {name} ({device.value}: {device.why}) listens on {address_of(host, port)}; Ctrl-C ends it"
    )
    if args.host not in _LOCAL:
        display.warn("rows and the secret are sent unencrypted: use a network that you trust, or a tunnel")
    try:
        server.wait_for_termination()
    finally:
        server.stop(0).wait()
        worker.close()
