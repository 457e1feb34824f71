"""Questions on a terminal. Who asks has made sure that there is one."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from common.display import Display, shown
from common.errors import UserError


def can_ask() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def choose(question: str, answers: Sequence[tuple[str, str]]) -> str:
    """The chosen one of `(value, what is shown of it)`, by arrows, its number and Enter."""
    from prompt_toolkit.shortcuts import choice

    options = [(value, shown(text)) for value, text in answers]
    return str(_answered(lambda: choice(f"{question}\n", options=options, default=options[0][0])))


def ask(question: str, default: str, check: Callable[[str], Any], display: Display) -> Any:
    """What `check` makes of the line that was typed. Its UserError is shown, and the question is asked again."""
    from prompt_toolkit import prompt
    from prompt_toolkit.completion import PathCompleter

    while True:
        line = _answered(
            lambda: prompt(
                f"{question} ", default=default, completer=PathCompleter(expanduser=True), complete_while_typing=False
            )
        )
        try:
            return check(str(line).strip())
        except UserError as error:
            display.warn(f"{error.what}\n  {error.fix}")


def confirm(question: str) -> bool:
    """Whether the answer is yes; Enter alone is no."""
    from prompt_toolkit import prompt

    return str(_answered(lambda: prompt(f"{question} [y/N] "))).strip().lower() in ("y", "yes")


def _answered(put: Callable[[], Any]) -> Any:
    try:
        return put()
    except EOFError:  # Ctrl-D ends it, as Ctrl-C does
        raise KeyboardInterrupt from None
