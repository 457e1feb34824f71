"""The README's picture: what a terminal shows at a command's end, without a word of the machine."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks.picture import COLUMNS, picture, terminal_lines
from common.errors import UserError
from tests import ROOT

# A bar on its way and a letter of two cells, as rich writes them; the bar of a stage that is done; a color.
SHOWN = r"""
import os, sys
assert sys.stdout.isatty() and os.get_terminal_size().columns == 110
sys.stdout.write("step 1/2 \x1b[38;5;237m━━\x1b[0m\rstep 2/2 \x1b[38;2;114;156;31m━━\x1b[0m\n\n")
sys.stdout.write("hash the model ━━━━━━ 100%\n\x1b[1;33m山\x1b[0m | Pip\n" + "long " * 30)
"""


def lines(code: str, folder: Path) -> list[str]:
    return [line.plain for line in terminal_lines([sys.executable, "-c", code], folder)]


def test_what_a_terminal_shows_at_the_end_is_kept(tmp_path: Path) -> None:
    found = lines(SHOWN, tmp_path)
    assert found[:2] == ["step 2/2 ━━", "山 | Pip"]
    assert [len(line) for line in found[2:]] == [COLUMNS - 1, 30 * 5 - COLUMNS - 1]


def test_it_is_drawn_in_its_colors_and_fetches_nothing(tmp_path: Path) -> None:
    svg = picture([("python cli.py train", terminal_lines([sys.executable, "-c", SHOWN], tmp_path))])
    for text in ("$&#160;python&#160;cli.py&#160;train", "step&#160;2/2", ">山<", "#729c1f"):
        assert text in svg, text
    assert "step&#160;1/2" not in svg
    assert "url(" not in svg.replace("url(#", "")


def test_a_wide_letter_takes_two_columns(tmp_path: Path) -> None:
    svg = picture([("a", terminal_lines([sys.executable, "-c", "print('a山川b')"], tmp_path))])
    found = re.findall(r'x="([\d.]+)" y="[\d.]+" textLength="([\d.]+)"[^>]*>(a|山川|b)<', svg)
    assert found == [("0", "12.2", "a"), ("12.2", "48.8", "山川"), ("61", "12.2", "b")]


def test_a_command_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ended with 3:\nit broke"):
        lines("print('it broke'); raise SystemExit(3)", tmp_path)


def test_a_path_of_this_machine_is_an_error(tmp_path: Path) -> None:
    shown = terminal_lines([sys.executable, "-c", f"print({str(ROOT / 'runs')!r})"], tmp_path)
    with pytest.raises(UserError, match="of this machine"):
        picture([("a", shown)])


def test_the_picture_shows_what_the_readme_quotes() -> None:
    """The losses and counts of one run; it names no folder but relative ones, and is small."""
    path = ROOT / "docs" / "quickstart.svg"
    svg = path.read_text(encoding="utf-8")
    cells = [text.replace("&#160;", " ") for text in re.findall(r"<text [^>]*>([^<]*)</text>", svg)]
    shown = re.sub(r"\s+", " ", " ".join(cells))
    for readme in ("README.md", "README.ja.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        quoted = re.search(r"step 200: validation loss.*\n(?:    .*\n)+", text)
        assert quoted, readme
        for line in quoted[0].splitlines():
            assert re.sub(r"\s+", " ", line).strip() in shown, line
    assert not re.findall(r"(?:^|\s)/(?:root|home|work|tmp|Users)\S*", shown)
    assert "url(" not in svg.replace("url(#", "")
    assert path.stat().st_size < 200_000
