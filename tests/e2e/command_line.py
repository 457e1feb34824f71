"""Commands as a user types them, each in a process of its own.

Most are forked from one process in which every package is loaded already: half of a short command's time is imports.
A command with an environment of its own begins from nothing: its libraries read it while they are imported.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests import ROOT

SECONDS = 1500


def twintune(*words: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run the command line; its exit code is checked, its output returned."""
    if env is not None:
        return _started([str(ROOT / "cli.py"), *map(str, words)], code, env)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace", suffix=".log") as log:
        request = {"words": [*map(str, words)], "log": log.name, "cwd": str(ROOT), "env": dict(os.environ)}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer, output = server.stdout.readline(), log.read()
    assert answer, f"the process that forks the commands ended with status {server.poll()}"
    status = int(answer)
    assert status == code, f"{words}\n{output[-8000:]}"
    return output


def score(*words: object, code: int = 0) -> str:
    """`python -m examples.score`, as `make example` runs it; its exit code is checked, its output returned."""
    return _started(["-m", "examples.score", *map(str, words)], code, None)


def _started(words: list[str], code: int, env: dict[str, str] | None) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == code, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@cache
def _server() -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.e2e.command_line"]
    server = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def serve() -> None:
    """Run the commands that are asked for on standard input, one after another; answer each with its exit status."""
    from tests.faults.commands import preload, start

    preload()
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        try:
            status = start(request["words"], Path(request["log"])).wait(SECONDS)
        except TimeoutError:
            status = 124
        print(status, flush=True)


if __name__ == "__main__":
    serve()
