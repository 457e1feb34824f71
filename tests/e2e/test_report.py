"""Pages as a browser draws them: every figure of a run is a mark, nothing is complained of, nothing overflows."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.report.page import write_report
from common.run_record import Run
from tests.browser import program
from tests.e2e.command_line import twintune
from tests.report_run import VALIDATED, write_run
from tests.tiny import write_model, write_rows

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


class Drawn(HTMLParser):
    """The marks of each chart: `(chart, class of the group, role)` and the `d` of its paths."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.marks: dict[str, list[tuple[str, str]]] = {}
        self.title = ""
        self._chart, self._groups, self._depth, self._titled = "", [""], 0, False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if str(given.get("id")).startswith("chart-"):
            self._chart = str(given["id"]).removeprefix("chart-")
        self._titled = tag == "title"
        if tag == "g":
            self._groups.append(str(given.get("class") or self._groups[-1]))
        if tag == "path" and "role-mark" in self._groups[-1]:
            self.marks.setdefault(self._chart, []).append((self._groups[-1].split()[0], str(given.get("d"))))

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._groups.pop()

    def handle_data(self, data: str) -> None:
        if self._titled:
            self.title, self._titled = data, False

    def points(self, chart: str) -> list[int]:
        """How many points each line of the chart has."""
        return [len(re.findall("[ML]", path)) for kind, path in self.marks.get(chart, []) if kind == "mark-line"]

    def dots(self, chart: str) -> int:
        return sum(kind == "mark-symbol" for kind, _ in self.marks.get(chart, []))

    def bars(self, chart: str) -> int:
        return sum(kind == "mark-rect" for kind, _ in self.marks.get(chart, []))


def chromium(*words: str) -> tuple[str, str]:
    """What Chromium prints, and what the page's console was told."""
    settings = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--enable-logging=stderr")
    done = subprocess.run([program(), *settings, *words], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def drawn(path: Path) -> Drawn:
    html, console = chromium("--dump-dom", path.resolve().as_uri())
    assert console == ""
    return Drawn(html)


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_figure_of_the_run_is_drawn(tmp_path: Path, lang: Any) -> None:
    """As often as metrics.jsonl has it; what the page's policy forbids does not happen."""
    run = write_run(tmp_path / "run", steps=40, hostile=HOSTILE)
    page = drawn(write_report(Run(run), lang))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, validations = (sum(name in line for line in lines) for name in ("loss", "valid_loss"))
    assert (steps, validations) == (40, 40 // VALIDATED + 1)
    assert page.points("loss") == [steps, validations]
    assert page.dots("loss") == steps + validations
    for chart in ("rate", "norm", "memory", "swap"):
        assert page.points(chart) == [steps], chart
    assert page.points("speed") == [steps - 1]  # the first warms up
    assert [page.bars(chart) for chart in ("lengths", "scripts", "sizes", "kl")] == [3, 2, 2, 2]
    assert page.title.startswith("run - ")


def test_a_phone_shows_it_without_scrolling_sideways(tmp_path: Path) -> None:
    """Chromium's window is never narrower than 500 pixels: a frame of a phone's width is."""
    run = write_run(tmp_path / "run", steps=20)
    report = write_report(Run(run), "ja")
    script = (
        "frame.onload = () => setTimeout(() => { const root = frame.contentDocument.documentElement; "
        "document.title = `${root.clientWidth} ${root.scrollWidth} ${root.querySelectorAll('svg').length}`; }, 3000)"
    )
    frame = (
        f"<iframe id=frame src={report.name} width=360 height=800 style='border:0'></iframe><script>{script}</script>"
    )
    (run / "frame.html").write_text(frame)
    html, _ = chromium("--allow-file-access-from-files", "--dump-dom", (run / "frame.html").as_uri())
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", html)
    assert found, html[:500]
    width, needed, charts = map(int, found.groups())
    assert (needed, charts) == (width, 10)


def test_a_real_run_and_a_comparison_are_drawn(tmp_path: Path) -> None:
    """Of both backends, by the commands."""
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 40)
    for backend in ("torch", "mlx"):
        words = ("--backend", backend, "--device", "cpu", "--precision", "fp32", "--batch-size", 4, "--steps", 12)
        words = ("--model", model, "--data", rows, "--export", "none", "--eval-every", 4, *words)
        twintune("train", *words, "--output", tmp_path / backend)
    page = drawn(tmp_path / "mlx" / "report.html")
    assert page.points("loss") == [12, 4]
    assert page.bars("lengths") == len(Run(tmp_path / "mlx").read_report_facts().data.counts)
    out = twintune("report", tmp_path / "mlx", "--lang", "ja", "--no-text", "--output", tmp_path / "ja.html")
    assert f"The report is in {tmp_path / 'ja.html'}" in out
    assert drawn(tmp_path / "ja.html").points("loss") == [12, 4]
    assert "<mark>" in (tmp_path / "mlx" / "report.html").read_text(encoding="utf-8")
    assert "<mark>" not in (tmp_path / "ja.html").read_text(encoding="utf-8")
    twintune("compare", tmp_path / "torch", tmp_path / "mlx", "--html", tmp_path / "c.html")
    page = drawn(tmp_path / "c.html")
    assert [page.points(chart) for chart in ("loss", "valid", "speed", "rate")] == [
        [12, 12],
        [4, 4],
        [11, 11],
        [12, 12],
    ]
    assert [page.bars(chart) for chart in ("speeds", "peaks")] == [2, 2]


def test_the_browser_tells_of_an_error(tmp_path: Path) -> None:
    """Else the other tests would pass whatever is wrong."""
    (tmp_path / "a.html").write_text("<script>undefined_name()</script>")
    assert "undefined_name is not defined" in chromium("--dump-dom", (tmp_path / "a.html").as_uri())[1]
