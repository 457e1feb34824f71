"""The page of a run while it trains: for this machine, for who knows its address, and for no other site."""

import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from common.commands.train import run_training
from common.display import Display
from common.options import Options
from common.report import live as module
from common.report.live import Pages, live_page
from common.run_record import Run
from tests.contexts import context
from tests.report_run import write_run
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)(/\S{20,}/)")


def asked(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and content; of a stream of events the first."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        streamed = "event-stream" in str(answer.getheader("Content-Type"))
        return answer.status, answer.readline() if streamed else answer.read()
    finally:
        connection.close()


def address(text: str) -> tuple[int, str]:
    found = _ADDRESS.search(text)
    assert found, text
    return int(found[1]), found[2]


@pytest.mark.slow
def test_a_training_is_shown_while_it_runs(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --live; its page and what is new on it come from the run's files."""
    seen: dict[str, Any] = {}

    class Asks(Bigram):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
            if step == 6:
                seen["port"], path = address(capsys.readouterr().out)
                seen["page"], seen["now"] = (asked(seen["port"], f"{path}{name}") for name in ("", "now"))
            return super().train_step(micro_batches, learning_rate, step)

    given = {"model": str(tiny_llama), "data": str(write_rows(tmp_path / "rows.jsonl")), "live": True, "steps": 8}
    given |= {"output": str(tmp_path / "run"), "backend": "torch", "device": "cpu", "precision": "fp32", "rank": 2}
    run_training(Options.model_validate(given | {"export": "none"}), context("plain", create=Asks))
    assert [seen[name][0] for name in ("page", "now")] == [200, 200]
    news = json.loads(seen["now"][1].removeprefix(b"data: "))
    assert news.keys() == {"title", "body", "charts"}
    assert ">training<" in news["body"]
    assert b"connect-src &#39;self&#39;" in seen["page"][1]
    with pytest.raises(ConnectionRefusedError):  # it ends with the run
        asked(seen["port"], "/")
    assert "connect-src &#39;none&#39;" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    run = Run(write_run(tmp_path / "run"))
    with live_page(Display("plain")) as show:
        for _ in range(2):  # as after a rollback: the page stays where it is
            show(run, Options(live=True))
        yield address(capsys.readouterr().out)


def test_who_follows_gets_the_last_state_and_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However lately the page was made; then the address is gone."""
    run = Run(write_run(tmp_path / "run", status="training"))
    with live_page(Display("plain")) as show:
        show(run, Options(live=True))
        port, path = address(capsys.readouterr().out)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", f"{path}now")
        answer = connection.getresponse()
        assert b">training<" in answer.readline()
        run.update(status="complete")
    last = [line for line in answer.read().splitlines() if line and line != b":"]
    assert b">complete<" in last[-3]
    assert last[-2:] == [b"event: end", b"data:"]


def test_another_path_or_host_gets_nothing(served: tuple[int, str]) -> None:
    port, path = served
    assert asked(port, path)[0] == 200
    assert asked(port, path, Host=f"localhost:{port}")[0] == 200
    for other, headers in (
        ("/", {}),
        (path[:-1], {}),
        (f"/x{path}", {}),
        (f"{path}now/../", {}),
        (path, {"Host": "evil.example"}),
        (path, {"Host": f"evil.example:{port}"}),
        (path, {"Host": "127.0.0.1"}),
    ):
        status, text = asked(port, other, **headers)
        assert (status, b"some/base" in text) == (404, False), (other, headers)


def test_only_this_machine_reaches_it(served: tuple[int, str]) -> None:
    port, _ = served
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in others - {"127.0.0.1"}:
        if not str(other).startswith("127."):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((str(other), port), timeout=5)
    with socket.socket() as free:  # bound there, or this fails
        free.bind(("127.0.0.2", port))


def test_the_page_is_made_again_when_the_run_has_changed_and_not_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    made: list[float] = []

    def counted(*given: Any) -> Any:
        made.append(now[0])
        now[0] += 1.0  # it takes a second
        return "t", "b", {}

    monkeypatch.setattr(module, "run_page", counted)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    run = Run(write_run(tmp_path / "run"))
    pages = Pages(run, "en")
    pages.page()
    pages.news()
    assert made == [0.0]
    for at in (2.0, 3.0, 50.0, 200.0):
        now[0] = at
        with run.metrics.open("a") as file:
            file.write('{"step": 99, "loss": 1.0}\n')
        pages.news()
    assert made == [0.0, 2.0, 200.0]  # never more than a hundredth of the time; at once after the first


@pytest.mark.parametrize(("part", "error"), [("_Server", OSError), ("threading.Thread.start", RuntimeError)])
def test_a_port_or_thread_that_cannot_be_had_costs_no_training(
    part: str, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: Any) -> Any:
        raise error("there is none")

    monkeypatch.setattr(f"common.report.live.{part}", refused)
    ran = []
    with live_page(Display("plain")) as show:
        show(Run(write_run(tmp_path / "run")), Options(live=True))
        ran.append(True)
    assert ran
    assert f"warning: the training is not shown live: {error.__name__}" in capsys.readouterr().out
