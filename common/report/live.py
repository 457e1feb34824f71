"""The page of a run while it trains: a small server for this machine alone, in a thread beside the training.

What it shows is read from the run's files while a browser follows, and made again only as often as that takes under a
hundredth of the time. Its address holds a secret, and a request that names another host is refused, so that no page of
another site reads it.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from common import strict_json
from common.display import Display
from common.errors import UserError
from common.options import Options
from common.report.kept import read_kept
from common.report.page import page, run_page, specs, write_own_report
from common.report.texts import Lang
from common.run_record import Run

_HOST = "127.0.0.1"
_SHARE = 0.01  # of the time that the page may take
_SECONDS = 10  # that a browser may take to send its request
_EVERY = 1.0  # seconds between looks at the run's files, for each browser that follows
_LAST = 2.0  # seconds that the end of the training waits for browsers to take the last state


@contextmanager
def reported(run: Run, lang: Lang, display: Display) -> Iterator[None]:
    """Around what is done to the run: its page is written at the end, however that came."""
    try:
        yield
    except BaseException:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C ends the page, and hides nothing of the first
            write_own_report(run, display, lang)
        raise
    write_own_report(run, display, lang)


@contextmanager
def live_page(display: Display) -> Iterator[Callable[[Run, Options], None]]:
    """A function that serves a run's page where --live asks for it, and says where; of several calls the first does.

    The page is served until the block ends. Where there is no port or no thread for it, there is only a warning.
    """
    servers: list[_Server] = []

    def show(run: Run, options: Options) -> None:
        with display.optional("the training is not shown live"):
            if options.live and not servers:
                pages = Pages(run, options.lang)
                pages.page()  # Vega is loaded before the training starts, not beside it
                servers.append(_started(pages))
                display.show(f"Live in the browser: {servers[0].address}", kind="live", address=servers[0].address)

    try:
        yield show
    finally:
        for server in servers:
            server.end()


def _started(pages: "Pages") -> "_Server":
    server = _Server(pages)
    try:
        threading.Thread(target=server.serve_forever, name="live page", daemon=True).start()
    except RuntimeError:  # as many as there may be
        server.server_close()
        raise
    return server


class Pages:
    """The page and what is new on it, as they were made last."""

    def __init__(self, run: Run, lang: Lang) -> None:
        self._run, self._lang = run, lang
        self._lock = threading.Lock()
        self._state: Any = None
        self._page = self._news = b""
        self._next = 0.0  # when they may be made again

    def page(self) -> bytes:
        return self._made()[0]

    def news(self, last: bool = False) -> bytes:
        """Title, body and charts as JSON. last: of a training that has ended, however lately they were made."""
        return self._made(last)[1]

    def _made(self, last: bool = False) -> tuple[bytes, bytes]:
        with self._lock:
            began = time.monotonic()
            state = [_changed(path) for path in (self._run.record_file, self._run.metrics, self._run.samples)]
            if not self._page or (state != self._state and (last or began >= self._next)):
                with suppress(UserError):  # a file that is damaged for now: what was read before stays
                    title, body, charts = run_page(read_kept(self._run), self._lang)
                    self._page = page(title, body, charts, self._lang, live=True).encode(errors="backslashreplace")
                    news = {"title": title, "body": body, "charts": specs(charts)}
                    self._news = strict_json.dumps(news).encode(errors="backslashreplace")
                    self._state = state
                now = time.monotonic()
                self._next = now + (now - began) / _SHARE if self._next else now  # the first loads Vega
            return self._page, self._news


def _changed(path: Any) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # the training waits for no browser

    def __init__(self, pages: Pages) -> None:
        super().__init__((_HOST, 0), _Handler)
        self.pages, self.path = pages, f"/{secrets.token_urlsafe(24)}/"
        self.ended = threading.Event()
        self.followers: set[threading.Thread] = set()

    @property
    def hosts(self) -> tuple[str, ...]:
        return f"{_HOST}:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def address(self) -> str:
        return f"http://{self.hosts[0]}{self.path}"

    def end(self) -> None:
        """Browsers that follow get the last state first, so that none asks a server that is gone."""
        self.ended.set()
        until = time.monotonic() + _LAST
        self.shutdown()
        for follower in list(self.followers):
            follower.join(max(0.0, until - time.monotonic()))
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no fault."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SECONDS

    def do_GET(self) -> None:
        answers = {self.server.path: self._answer_page, f"{self.server.path}now": self._answer_news}
        asked = self.path.encode(errors="replace")
        known = next((found for path, found in answers.items() if secrets.compare_digest(path.encode(), asked)), None)
        if self.headers.get("Host") not in self.server.hosts or known is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        known()

    def _answer_page(self) -> None:
        content = self.server.pages.page()
        self._send_headers("text/html", ("Content-Length", str(len(content))))
        self.wfile.write(content)

    def _answer_news(self) -> None:
        """What is new, as server-sent events, until the training ends or the browser is gone."""
        self.server.followers.add(threading.current_thread())
        try:
            self._send_headers("text/event-stream")
            sent, ended = b"", False
            while not ended:
                ended = self.server.ended.wait(_EVERY)
                news = self.server.pages.news(last=ended)
                # A comment, where nothing is new, finds out whether the browser is still there.
                self.wfile.write(b"data: " + news + b"\n\n" if news != sent else b":\n")
                sent = news
            self.wfile.write(b"event: end\ndata:\n\n")
        finally:
            self.server.followers.discard(threading.current_thread())

    def _send_headers(self, kind: str, *more: tuple[str, str]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        for name, value in (
            *more,
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", "frame-ancestors 'none'"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not shown: the terminal shows the training."""
