"""Training's speed beside other programs: alone, beside one busy core, beside llama-server at work.

    python -m benchmarks.beside --gguf MODEL.gguf [--backend mlx]

SmolLM2-135M on the built-in example. The server answers with Twintune's own options for it, one long answer after
another. Each case is a `train` of its own; tokens/s as its run.json says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks.peer_runs import ROOT
from common.llama_cpp.build import ensure
from common.llama_cpp.server import Server, ServerOptions
from common.system.process import running

_OPTIONS = ("--eval-every", "1000", "--eval-rows", "4", "--sample-prompt", "Hi", "--export", "none", "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gguf", type=Path, help="what llama-server answers with")
    given = parser.parse_args()
    cases: list[tuple[str, AbstractContextManager[None]]] = [("alone", nullcontext()), ("one busy core", _busy_core())]
    if given.gguf:
        cases.append(("llama-server at work", _answering(given.gguf)))
    alone = 0.0
    print("| beside | tokens/s | times slower |\n| --- | --- | --- |")
    for name, other in cases:
        with other:
            speed = _speed(given.backend, given.steps)
        alone = alone or speed
        print(f"| {name} | {speed:.0f} | {alone / speed:.2f} |", flush=True)


def _speed(backend: str, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train = [sys.executable, str(ROOT / "cli.py"), "train", "--backend", backend, "--steps", str(steps)]
        env = os.environ | {"TWINTUNE_LEARN_MEMORY": "0"}  # nothing of this machine's other runs
        subprocess.run([*train, *_OPTIONS, "--output", str(run)], check=True, stdout=subprocess.DEVNULL, env=env)
        return float(json.loads((run / "run.json").read_text())["tokens_per_second"])


@contextmanager
def _busy_core() -> Iterator[None]:
    with running([sys.executable, "-c", "while True: pass"]):
        time.sleep(1)
        yield


@contextmanager
def _answering(gguf: Path) -> Iterator[None]:
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            server.chat([{"role": "user", "content": "Write a long story about a harbor."}], 200)

    options = ServerOptions(1024)
    with Server(ensure(None, lambda share, text: None), gguf, options) as server, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        asking.result()


if __name__ == "__main__":
    main()
