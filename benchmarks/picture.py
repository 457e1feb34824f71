"""docs/quickstart.svg: the README's two commands in a real terminal, as a picture.

    python -m benchmarks.picture                              # trains the built-in example: ten minutes
    python -m benchmarks.picture --out a.svg --train --steps 2      # other options of train, to try it

The commands run in a copy of this folder, so that what they write stays out of it. What a terminal
shows at their end is drawn: text that was overwritten, such as a bar on its way, is gone. The bars of finished stages
and empty lines are left out. A path of this machine, its name or its user's is an error.
"""

import argparse
import fcntl
import getpass
import html
import os
import platform
import pty
import re
import shutil
import signal
import struct
import sys
import tempfile
import termios
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pyte
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from common.errors import UserError
from common.files import atomic_write

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 110, 400  # so many that nothing scrolls out
_BAR = re.compile(r"^.* ━+ 100%$")  # of a stage that is done
_PACKAGES = ("common", "configs", "examples", "mlx_backend", "torch_backend")
_COLUMN = 12.2  # a column's width in rich's SVG
_TEXT = re.compile(r'(<text class="[^"]+" x=")([\d.]+)(" y="[\d.]+" )textLength="[\d.]+"([^>]*>)([^<]*)</text>')
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # which a browser would fetch


def terminal_lines(command: Sequence[str], folder: Path) -> list[Text]:
    """What a terminal shows after the command, run in `folder`. Raises UserError where it fails."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.chdir(folder)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        kept |= {"TERM": "xterm-256color", "TWINTUNE_LEARN_MEMORY": "0"}  # nothing of this machine's other runs
        os.execvpe(command[0], list(command), kept)  # noqa: S606
    try:
        while written := _read(terminal):
            stream.feed(written)
    except BaseException:
        os.kill(child, signal.SIGTERM)  # a training outlives its terminal
        raise
    finally:
        os.close(terminal)
    lines = [_text(screen, row) for row in range(ROWS)]
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        shown = "\n".join(line.plain for line in lines).rstrip()
        raise UserError(f"{' '.join(command)} ended with {status}:\n{shown}", "Run it alone, and look at its error.")
    return [line for line in lines if line.plain and not _BAR.match(line.plain)]


def _read(terminal: int) -> bytes:
    """What was written next; nothing at the end."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux: the child has closed its side
        return b""


def _text(screen: pyte.Screen, row: int) -> Text:
    """Cells of one style are one piece: each is an element of the SVG."""
    cells = [screen.buffer[row][column] for column in range(COLUMNS)]  # the second half of a wide letter is empty
    pieces = groupby(cells, _style)
    text = Text.assemble(*(("".join(cell.data for cell in piece), style) for style, piece in pieces), no_wrap=True)
    text.rstrip()
    return text


def _style(cell: pyte.screens.Char) -> Style:
    return Style(
        color=_color(cell.fg),
        bgcolor=_color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def _color(name: str) -> Color | None:
    """pyte's color as rich's: it calls yellow brown, and those beyond the sixteen by their hex digits."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return Color.parse(f"#{name}")
    name = name.replace("brown", "yellow")
    return Color.parse(name.replace("bright", "bright_"))


def spaced(svg: str) -> str:
    """The SVG with wide letters over two columns each: rich gives a text the width of so many narrow letters."""

    def pieces(found: re.Match[str]) -> str:
        head, left, middle, tail, content = found.groups()
        at, texts = float(left), []
        for columns, letters in groupby(html.unescape(content), cell_len):
            text = "".join(letters)
            width = columns * len(text) * _COLUMN
            shown = html.escape(text, quote=False).replace(" ", "&#160;").replace("\xa0", "&#160;")
            texts.append(f'{head}{at:g}{middle}textLength="{width:g}"{tail}{shown}</text>')
            at += width
        return "".join(texts)

    return _TEXT.sub(pieces, svg)


def picture(parts: Sequence[tuple[str, list[Text]]]) -> str:
    """SVG of `(what was typed, what was shown)`. Raises UserError where it names this machine."""
    console = Console(width=COLUMNS, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for number, (typed, lines) in enumerate(parts):
        console.print(Text(("\n" if number else "") + f"$ {typed}", "bold"))
        for line in lines:
            console.print(line, soft_wrap=True)
    svg = console.export_svg(title="Twintune", theme=SVG_EXPORT_THEME, unique_id="quickstart")
    svg = spaced(_FONTS.sub("", svg))
    text = "\n".join(line.plain for _, lines in parts for line in lines)
    for name in (str(ROOT), str(Path.home()), tempfile.gettempdir(), platform.node(), getpass.getuser()):
        if len(name) > 1 and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
            raise UserError(f"The terminal shows {name!r}, which is of this machine.", "Run it where it is not shown.")
    return svg


def _copied(folder: Path) -> Path:
    """A folder in which the README's commands are typed as they stand there: a copy of what they read."""
    for name in ("cli.py", *_PACKAGES):
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
    return folder


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.picture", description="Draw the README's picture again.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "quickstart.svg", help="(default: docs/quickstart.svg)"
    )
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="options of train")
    given = parser.parse_args(words)
    commands = (["python", "cli.py", "train", *given.train], ["python", "-m", "examples.score"])
    with tempfile.TemporaryDirectory() as name:
        folder = _copied(Path(name))
        parts = [(" ".join(typed), terminal_lines([sys.executable, *typed[1:]], folder)) for typed in commands]
    with atomic_write(given.out) as temporary:
        temporary.write_text(picture(parts), encoding="utf-8")
    print(f"The picture is in {given.out}, {given.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
