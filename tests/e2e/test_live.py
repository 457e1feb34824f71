"""The page of a run while it trains, as a browser shows it: it follows by itself, and nothing is complained of."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.display import Display
from common.options import Options
from common.report import live
from common.report.live import live_page
from common.report.page import write_report
from common.run_fields import AlarmRecord
from common.run_record import Run
from tests.browser import Page
from tests.report_run import metrics, samples, write_run
from tests.unit.test_live import address

# The points of the training loss, as in the path of its line.
POINTS = "(document.querySelector('#chart-loss .mark-line path')?.getAttribute('d').match(/[ML]/g) || []).length"
ALARM = AlarmRecord(name="loss", seen="the loss jumped", cause="a high rate", remedy="lower it", since=7)


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def train_to(run: Run, step: int) -> None:
    """Append the lines of the steps up to this one."""
    append(run.metrics, metrics(step)[len(run.metrics.read_text().splitlines()) :])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """After five steps of forty, without an answer or an alarm."""
    run = Run(write_run(tmp_path / "run", steps=40, status="training", alarms=[], verify=None))
    run.samples.unlink()
    run.metrics.write_text("")
    train_to(run, 5)
    return run


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[list[Page]]:
    opened: list[Page] = []
    yield opened
    for one in opened:
        one.close()


def test_it_follows_the_training_to_its_end(
    run: Run, pages: list[Page], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_SHARE", 0.5)  # else it waits a hundred times as long as the page is made
    with live_page(Display("plain")) as show:
        show(run, Options(live=True))
        port, path = address(capsys.readouterr().out)
        pages.append(page := Page(f"http://127.0.0.1:{port}{path}", tmp_path / "profile"))
        page.wait_for(POINTS, 5)
        page.ask("document.getElementById('figures-loss').open = true")
        train_to(run, 9)
        page.wait_for(POINTS, 9)
        words = "document.getElementById('main').innerText"
        assert not re.search("an answer at 10|the loss jumped", page.ask(words))
        train_to(run, 13)
        append(run.samples, samples("")[:2])
        run.update(alarms=[ALARM])
        page.wait_for(f"[{POINTS}, /an answer at 10/.test({words}), /the loss jumped/.test({words})]", [13, True, True])
        assert page.ask("document.getElementById('figures-loss').open")
        assert page.ask("document.querySelectorAll('.chart svg').length == document.querySelectorAll('.chart').length")
        assert "follows" in page.ask("document.getElementById('live').innerText")
        train_to(run, 40)
        run.update(status="complete")
        write_report(run)
    page.wait_for("/has ended.*report.html/.test(document.getElementById('live').innerText)", True)
    assert (page.ask(POINTS), page.ask("document.querySelector('.badge').innerText")) == (40, "complete")
    assert page.console == []


def test_what_goes_wrong_is_on_the_console(pages: list[Page], tmp_path: Path) -> None:
    """Else the other test would pass whatever is wrong."""
    (tmp_path / "a.html").write_text(
        "<script>fetch('http://127.0.0.1:1/'); setTimeout(() => undefined_name(), 1)</script>"
    )
    pages.append(page := Page((tmp_path / "a.html").as_uri(), tmp_path / "profile"))
    page.wait_for("document.readyState", "complete")
    page.ask("new Promise((done) => setTimeout(done, 500))")
    for said in ("undefined_name is not defined", "net::ERR_"):
        assert said in "\n".join(page.console)
