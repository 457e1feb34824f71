"""What the user sees: rich on a terminal, plain lines elsewhere, JSON events, or next to nothing."""

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from common import strict_json
from common.backend import Memory, Progress
from common.errors import AtOdds, UserError, masked

Mode = Literal["rich", "plain", "json", "quiet"]
Styled = str | tuple[str, str]  # a text, or a text and its style
# What could steer a terminal or hide text: escape sequences, reversed writing, half characters of file names.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FIGURE = re.compile(r"[-\d.,]+( ?[a-zA-Z%]+)?(  \(.*\))?")  # a number, its unit, a ratio behind it
_PLAIN_SECONDS = 10.0  # between plain lines of one stage
_SHOWN_PROMPT = 300  # characters
_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.1f} MB"


def shown(text: str) -> str:
    """`text` as it may be printed, whoever wrote it: control characters as `\\x1b`; lines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _text(given: Styled) -> Text:
    text, style = (given, "") if isinstance(given, str) else given
    return Text(shown(text), style)


class _Lasting:
    """stdout or stderr, which survives its terminal or reader: once that is gone, what is written is discarded.

    A job that trains for hours must not fail because its terminal was closed, nor because its log's disk is full: what
    could not be written is kept, and written when there is space again.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO:
        stream = getattr(sys, self._name)
        return cast(TextIO, getattr(stream, "rich_proxied_file", stream))  # not rich's own, which writes to us

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Point the stream's descriptor at nothing, so that what it has buffered can be written at exit."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _console(out: _Lasting, soft_wrap: bool) -> Console:
    return Console(file=cast(TextIO, out), highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)


class Display:
    """Prints everything that the user reads. mode: rich on a terminal and plain lines elsewhere, unless given."""

    def __init__(self, mode: Mode | None = None) -> None:
        self.mode: Mode = mode or ("rich" if sys.stdout.isatty() else "plain")
        self._out = _Lasting("stdout")
        self.console = _console(self._out, soft_wrap=self.mode == "plain")
        # In quiet mode standard output holds results alone; elsewhere a warning stands at its place in the log.
        self._warnings = _console(_Lasting("stderr"), soft_wrap=True) if self.mode == "quiet" else self.console
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._memory = Text(style="dim")
        self._tokens = 0
        self._seconds = 0.0
        self._steps = 0
        self._total = 0  # steps of the training
        self._valid = "-"
        self._figures = ""
        self._stopping = ""
        self._printed = 0.0  # when a step was printed last

    def event(self, kind: str, **facts: Any) -> None:
        if self.mode == "json":
            line = strict_json.dumps({"event": kind, **facts})
            self._out.write(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")
            self._out.flush()

    def _print(self, text: str) -> None:
        self.console.print(_text(text))

    def say(self, text: str) -> None:
        self.event("note", text=text)
        if self.mode in ("rich", "plain"):
            self._print(text)

    def warn(self, text: str) -> None:
        self.event("warning", text=text)
        if self.mode != "json":
            self._warnings.print(_text((f"warning: {text}", "yellow")))

    def sample(self, by: str, prompt: str, answer: str, before: str | None = None) -> None:
        """Show a model's answer to a prompt that is cut where it is long. by: what runs the model, or when.

        before: the answer from before training.
        """
        short = prompt if len(prompt) <= _SHOWN_PROMPT else f"{prompt[:_SHOWN_PROMPT]}..."
        self.say(f"{by}: {short!r} -> {answer!r}" + (f" (before: {before!r})" if before is not None else ""))

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Around a part that nothing else needs: where it fails, there is only a warning, with `what` and why."""
        try:
            yield
        except AtOdds:
            raise
        except Exception as error:  # whatever it is: what was made before it is complete
            if isinstance(error, _BUGS) and os.environ.get("TWINTUNE_RAISE_BUGS"):  # the tests set it
                raise
            why = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {masked(str(error))}"
            self.warn(f"{what}: {why}")

    def stopping(self) -> None:
        """Say that a stop signal has come. A signal handler calls this: it may wait for no lock and use no buffer."""
        text = "stopping: the step is finished and saved first; a second Ctrl-C stops at once"
        if self._bars is not None:
            self._stopping = f"\n{text}"
            self._memory.plain += self._stopping
            return
        try:
            os.write(2, f"{text}\n".encode())
        except OSError:
            pass  # the terminal is gone

    def panel(self, title: str, facts: dict[str, str]) -> None:
        self.event("header", **facts)
        if self.mode == "rich":
            grid = Table.grid(padding=(0, 2))
            for name, value in facts.items():
                grid.add_row(_text((name, "bold")), _text(value))
            self.console.print(Panel(grid, title=_text(title), title_align="left", expand=False))
        elif self.mode == "plain":
            for name, value in facts.items():
                self._print(f"{name:<10} {value}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Styled]]) -> None:
        """A result: shown even with --quiet."""
        texts = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in rows]
        self.event("table", title=title, columns=list(columns), rows=texts)
        if self.mode == "json":
            return
        table = Table(title=_text(title), title_justify="left", title_style="bold")
        for number, column in enumerate(columns):
            figures = all(_FIGURE.fullmatch(row[number]) for row in texts)
            table.add_column(_text(column), justify="right" if figures else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(_text, row))
        self.console.print(table)

    def show(self, *parts: Styled, kind: str = "note", **facts: Any) -> None:
        """A result that is running text: shown even with --quiet. kind and facts: of its event."""
        text = Text().join(map(_text, parts))
        self.event(kind, text=text.plain, **facts)
        if self.mode != "json":
            self.console.print(text)

    def stream(self, piece: str, end: str = "") -> None:
        """A piece of an answer, as soon as it is there."""
        self.console.out(shown(piece), end=end)
        self.console.file.flush()

    @contextmanager
    def side_by_side(self, names: Sequence[str]) -> Iterator[Callable[[list[str]], None]]:
        """Yields the function that takes a text for each column; on a terminal they are seen as they grow."""

        def table(texts: list[str]) -> Table:
            made = Table(expand=True)
            for name in names:
                made.add_column(_text(name), ratio=1, overflow="fold")
            made.add_row(*map(_text, texts))
            return made

        if self.mode == "rich":
            with Live(console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
                yield lambda texts: live.update(table(texts), refresh=True)
        else:
            last = dict.fromkeys(range(len(names)), "")
            yield lambda texts: last.update(enumerate(texts))
            self.console.print(table(list(last.values())))

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Yields the function that takes the stage's progress."""
        started = time.perf_counter()
        self.event("stage", name=name)
        if self.mode == "rich":
            with Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                console=self.console,
            ) as bars:
                task = bars.add_task(shown(name), total=1.0)

                def update(share: float, text: str) -> None:
                    bars.update(task, completed=share, description=shown(f"{name}: {text}")[:60])

                yield update
                bars.update(task, completed=1.0, description=shown(name))
        else:
            last = [started]

            def line(share: float, text: str) -> None:
                if self.mode == "plain" and time.perf_counter() - last[0] > _PLAIN_SECONDS:
                    last[0] = time.perf_counter()
                    self._print(f"{name} {share:4.0%}  {text}")

            yield line
        seconds = time.perf_counter() - started
        self.event("stage_done", name=name, seconds=seconds)
        if self.mode == "plain":
            self._print(f"{name} done in {seconds:.1f} s")

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[None]:
        """Around the loop; `step` and `evaluation` move the bar."""
        self._total, self._steps, self._tokens, self._seconds, self._valid = steps, 0, 0, 0.0, "-"
        if self.mode != "rich":
            yield
            return
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, console=self.console)
        self._task = self._bars.add_task("train", total=steps, completed=done, figures="")
        try:
            with Live(Group(self._bars, self._memory), console=self.console, refresh_per_second=4):
                yield
        finally:
            self._bars = self._task = None

    def step(self, line: dict, memory: Memory) -> None:
        self._steps += 1
        if self._steps > 1:  # the first step warms up
            self._tokens += line["tokens"]
            self._seconds += line["seconds"]
        speed = f"{self._tokens / self._seconds:.0f} tokens/s" if self._seconds else "- tokens/s"
        used = f"{memory.kind} {gigabytes(memory.used)}, peak {gigabytes(memory.peak)} of {gigabytes(memory.total)}"
        held = f"{used}, swap {gigabytes(memory.swap)}"
        self.event("step", **line)
        if self._bars is not None and self._task is not None:
            self._figures = f"loss {line['loss']:.4f}  valid {{}}  {speed}"
            self._bars.update(self._task, completed=line["step"], figures=self._figures.format(self._valid))
            self._memory.plain = f"memory: {held}{self._stopping}"
        elif self.mode == "plain":
            now = time.perf_counter()
            if now - self._printed > _PLAIN_SECONDS or line["step"] == self._total:
                self._printed = now
                left = (self._total - line["step"]) * (self._seconds / max(1, self._steps - 1))
                self._print(
                    f"step {line['step']}/{self._total}  loss {line['loss']:.4f}  valid {self._valid}  {speed}  "
                    f"{left:.0f} s left  {held}"
                )

    def evaluation(self, line: dict) -> None:
        self._valid = f"{line['valid_loss']:.4f}"
        self.event("evaluation", **line)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, figures=self._figures.format(self._valid))
        if self.mode in ("plain", "rich"):
            when = f"step {line['step']}" if line["step"] else "before the first step"
            self._print(f"{when}: validation loss {self._valid}")
