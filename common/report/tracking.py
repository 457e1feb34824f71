"""What a training tells trackers of experiments, through a process of its own for each.

Nothing here waits for a tracker while a training runs: events go into a pipe, and what the pipe does not take is held
until the next one. A tracker that fails, or takes nothing for too long, is dropped with one warning.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

from common.backend import Memory
from common.display import Display
from common.errors import UserError
from common.export.upload import adapter_files
from common.models.license import is_hub_name
from common.options import Options
from common.paths import source_name
from common.report.trackers import COLUMNS, Begin
from common.run_fields import is_tracker_id
from common.run_record import Run
from common.system.process import running

_HELD = 4_000_000  # bytes of events that a tracker may leave waiting, some ten thousand steps
_SECONDS = 30.0  # that a tracker may take to end; its network may be gone
_UPLOAD_SECONDS = 600.0  # so too, where it is sent files
_EXIT_SECONDS = 5.0  # more, to exit by itself when everything is there
_SUMMARY = ("best_valid_loss", "test_loss", "tokens_per_second", "train_seconds", "peak_memory_bytes")
_ROOT = Path(__file__).resolve().parents[2]


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, such as wandb makes, is no package
            raise UserError(
                f"--track {name}: its package is not installed.", f"Install it: pip install 'twintune[{name}]'"
            )


class _Failed(Exception):
    """A tracker has failed, and why."""


class _Feed:
    """A tracker's process, and what it has not taken yet."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name, self._process = name, process
        self._in, self._out = (cast(IO[bytes], pipe).fileno() for pipe in (process.stdin, process.stdout))
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._waiting, self._heard, self._open = b"", b"", True

    def send(self, event: dict[str, Any]) -> None:
        self._waiting += json.dumps(event).encode() + b"\n"
        self.write()

    def write(self) -> bool:
        """Give the process what it takes now; whether that is all. Raises _Failed where too much is left."""
        with suppress(BlockingIOError, BrokenPipeError):  # a process that has ended has said why
            while self._waiting:
                self._waiting = self._waiting[os.write(self._in, self._waiting) :]
        if len(self._waiting) > _HELD:
            raise _Failed("it does not keep up with the training")
        return not self._waiting

    def hear(self) -> Iterator[dict[str, Any]]:
        """What the process has answered since. Raises _Failed where it failed or has ended."""
        ended = False
        with suppress(BlockingIOError):
            while not ended:
                piece = os.read(self._out, 65536)
                self._heard, ended = self._heard + piece, not piece
        *lines, self._heard = self._heard.split(b"\n")
        for line in map(json.loads, lines):
            if "failed" in line:
                raise _Failed(line["failed"])
            self._open = "done" not in line
            yield line
        if ended and self._open:
            raise _Failed("its process has ended")

    def end(self, until: float) -> Iterator[dict[str, Any]]:
        """What the process answers until it has everything. Raises _Failed as `hear`, or where it takes too long."""
        while self._open:
            left = until - time.monotonic()
            if left <= 0:
                raise _Failed("it has not ended in time")
            select.select([self._out], [self._in] if not self.write() else [], [], left)
            yield from self.hear()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)


class Tracking:
    """The trackers of a run, told of what happens in it; without any, nothing is done."""

    def __init__(self, run: Run, options: Options, display: Display) -> None:
        self._run, self._texts, self._artifacts = run, options.track_text, options.track_artifacts
        self._display = display
        self._feeds: list[_Feed] = []
        self._dropped: dict[str, str] = {}

    def begin(self, name: str, process: subprocess.Popen[bytes], begin: Begin) -> None:
        """Add the tracker of this name, which `process` feeds."""
        self._feeds.append(feed := _Feed(name, process))
        with self._dropping(feed):
            feed.send(asdict(begin))

    def step(self, line: dict[str, Any], memory: Memory) -> None:
        figures = {f"train/{name}": line[name] for name in ("loss", "learning_rate", "grad_norm")}
        sizes = {"used": memory.used, "peak": memory.peak, "swap": memory.swap}
        figures |= {f"memory/{name}_bytes": size for name, size in sizes.items()}
        self._figures(line["step"], figures | {"train/tokens_per_second": line["tokens"] / max(line["seconds"], 1e-9)})

    def evaluation(self, line: dict[str, Any]) -> None:
        self._figures(line["step"], {"eval/loss": line["valid_loss"]})

    def answers(self, lines: Sequence[dict[str, Any]]) -> None:
        """The model's answers at a validation: sent only where text was asked for."""
        if lines and self._texts:
            kept = [{name: line[name] for name in ("number", *COLUMNS)} for line in lines]
            self._send({"event": "answers", "step": lines[0]["step"], "answers": kept})

    def finish(self, complete: bool) -> None:
        """Send what is known at the end, and wait for the trackers as long as they may take."""
        with ExitStack() as files:
            uploads = complete and bool(self._artifacts)
            if complete and self._feeds:
                with self._display.optional("the trackers lack what is known at the end"):
                    self._send_results(files)
            self._send({"event": "end", "complete": complete})
            until = time.monotonic() + (_UPLOAD_SECONDS if uploads else _SECONDS)
            for feed in [*self._feeds]:
                with self._dropping(feed):
                    self._note(feed, feed.end(until))
        for name, why in self._dropped.items():
            self._display.warn(f"{name} has not got the complete run: {why}")

    def _send_results(self, files: ExitStack) -> None:
        record = self._run.record
        known = {f"summary/{name}": getattr(record, name) for name in _SUMMARY}
        self._figures(record.steps or 0, {name: value for name, value in known.items() if value is not None})
        for name in self._artifacts:
            path = self._adapter(files) if name == "adapter" else self._run.report
            self._send({"event": "file", "name": name, "path": str(path.resolve())})

    def _adapter(self, files: ExitStack) -> Path:
        """A folder with the adapter as it may be published: without paths of this machine."""
        folder = Path(files.enter_context(tempfile.TemporaryDirectory()))
        for file in adapter_files(self._run):
            content = file.source.read_bytes() if isinstance(file.source, Path) else file.source
            (folder / file.target).write_bytes(content)
        return folder

    def _figures(self, step: int, figures: dict[str, float]) -> None:
        self._send({"event": "figures", "step": step, "figures": figures})

    def _send(self, event: dict[str, Any]) -> None:
        for feed in [*self._feeds]:
            with self._dropping(feed):
                feed.send(event)
                self._note(feed, feed.hear())

    @contextmanager
    def _dropping(self, feed: _Feed) -> Iterator[None]:
        """Around what is done with a tracker: where it fails, that is the last that is done with it."""
        try:
            yield
        except _Failed as error:
            self._feeds.remove(feed)
            self._dropped[feed.name] = str(error)
            self._display.warn(f"{feed.name} is dropped, and nothing else changes: {error}")

    def _note(self, feed: _Feed, answers: Iterator[dict[str, Any]]) -> None:
        """Show where the tracker's run is, and keep its id for when the run is resumed."""
        for answer in answers:
            if "place" in answer:
                self._display.say(f"{feed.name}: {answer['place']}")
            if is_tracker_id(answer.get("id", "")):
                with self._display.optional(f"a resumed run will begin another one in {feed.name}"):
                    self._run.update(trackers=self._run.record.trackers | {feed.name: answer["id"]})


@contextmanager
def tracked(run: Run, options: Options, step: int, display: Display) -> Iterator[Tracking]:
    """The trackers that the options name, around what is done to the run after `step`.

    At the end they get what is known then, and may take some time.
    """
    tracking = Tracking(run, options, display)
    with ExitStack() as processes:
        for name in options.track:
            with display.optional(f"{name} does not track this run"):
                begin = _begin(run, options, name, step)
                tracking.begin(name, processes.enter_context(_process(name)), begin)
        try:
            yield tracking
        except BaseException:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C waits for no tracker
                tracking.finish(False)
            raise
        tracking.finish(True)


def _process(name: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "common.report.tracker", name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return running(command, env=os.environ | {"PYTHONPATH": path}, **pipes)


def _begin(run: Run, options: Options, name: str, step: int) -> Begin:
    """What the tracker is told first: of the data only hashes and counts, of a model on this machine only its name."""
    record, recipe, plan = run.record, run.recipe, run.plan
    config = {
        "model": recipe.model if is_hub_name(recipe.model) else source_name(recipe.model),
        "recipe": record.recipe_hash,
        **recipe.hashed(),
        "train_rows": record.data.train_rows,
        "valid_rows": record.data.valid_rows,
        "backend": plan.backend,
        "device": plan.device,
        "devices": plan.ranks,
    }
    folder = run.path.resolve()
    # a folder that was not named by --output has the name of the rows' file
    shown = folder.name if record.options.get("output") else f"{source_name(recipe.model)}-{record.recipe_hash[:8]}"
    return Begin(shown, str(folder), config, options.track_project, record.trackers.get(name), step)
