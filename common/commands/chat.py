"""`chat RUN`: a chat session in the terminal, which can be saved as a training row."""

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.commands.arguments import add_llama, add_sampling, add_system, add_target, check_llama, count, sampling_of
from common.context import Context
from common.data.chat_template import Message
from common.data.load import read_rows
from common.display import Display
from common.errors import PROGRAM, Ended, Refusal, UserError
from common.files import atomic_write
from common.inference.chat_models import ChatModels, choose, opened
from common.inference.prompts import system_text
from common.paths import user_path
from common.sampling import Sampling
from common.system.cache import cache_folder

HELP = """/system TEXT or @FILE   another system prompt (/system none: without)
/compare [TEXT]         the base's answer beside the tuned one's, to TEXT or the last question
/save FILE.jsonl        add this session to FILE as a training row; answers that were cut off carry no loss
/load FILE.jsonl [N]    continue with row N of FILE, or its last
/reset                  remove the turns and their tools, keep the system prompt
/quit, or Ctrl-D        end
Enter sends, Alt-Enter (or Esc, Enter) starts a new line, Ctrl-C stops an answer"""


@dataclass
class ChatSession:
    """The turns so far; every command is a method that takes the rest of its line. A UserError changes nothing."""

    models: ChatModels
    sampling: Sampling
    display: Display
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()  # of the row that was loaded

    def messages(self) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def handle(self, line: str) -> bool:
        """One line of the user's. False: the session is over."""
        line = line.strip()
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif name in ("/quit", "/exit"):
            return False
        elif name in (commands := self._commands()):
            commands[name](rest.strip())
        else:
            raise UserError(f"{name} is not a command.", f"Known: {', '.join(commands)}, /quit")
        return True

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/system": self.set_system,
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load,
            "/compare": self.compare,
            "/help": lambda rest: self.display.say(HELP),
        }

    def ask(self, question: str) -> None:
        """Stream the answer, and keep both. Ctrl-C ends it: the text so far stays, but carries no loss."""
        asked = {"role": "user", "content": question}
        text, finish = "", None
        try:
            with closing(self.models.tuned.answer([*self.messages(), asked], self.sampling, self.tools)) as pieces:
                for piece, end in pieces:
                    text, finish = text + piece, end
                    self.display.stream(piece)
        except KeyboardInterrupt:
            finish = "interrupted"
        finally:
            self.display.stream("", end="\n")
        if note := {"length": "cut at --max-tokens or --context", "interrupted": "stopped"}.get(finish or ""):
            self.display.say(f"({note})")
        self._keep(asked, text, finish)

    def _keep(self, asked: Message, text: str, finish: str | None) -> None:
        if text.strip():
            broken_off = {} if finish == "stop" else {"train": False}
            self.turns += [asked, {"role": "assistant", "content": text, **broken_off}]

    def set_system(self, rest: str) -> None:
        if rest:
            self.system = None if rest == "none" else system_text(rest)
        self.display.say(f"system: {self.system}" if self.system else "no system prompt")

    def reset(self, rest: str) -> None:
        self.turns, self.tools = [], ()
        self.display.say("the turns are removed")

    def row(self) -> dict[str, Any]:
        """The session as a training row. Raises UserError where no answer is complete."""
        if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in self.turns):
            raise UserError("There is no complete answer yet to train on.", "Ask something first.")
        return {"messages": self.messages()} | ({"tools": list(self.tools)} if self.tools else {})

    def save(self, rest: str) -> None:
        path = user_path(rest, "/save")
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            raise UserError(f"/save {rest}: sessions are saved as JSONL.", "/save FILE.jsonl")
        row = self.row()
        if path.exists():
            read_rows(path)  # before anything is written: a file with faults raises here, unchanged
        add_row(path, row)
        self.display.say(f"saved to {path}, row {len(read_rows(path))}: {PROGRAM} check-data {path}")

    def load(self, rest: str) -> None:
        name, number = match.groups() if (match := re.fullmatch(r"(.+?)(?:\s+(\d{1,18}))?", rest)) else ("", None)
        path = user_path(name, "/load")
        if not path.is_file():
            raise UserError(f"/load {rest}: no such file.", "/load FILE.jsonl")
        rows = read_rows(path)
        if number is not None and not 1 <= int(number) <= len(rows):
            raise UserError(f"/load {rest}: {name} has {len(rows)} rows.", f"/load {name} {len(rows)}")
        row = rows[int(number) - 1 if number else -1]
        if row.text is not None:
            raise UserError(f"/load {rest}: that row is plain text.", "Choose a row with turns.")
        turns = [dict(message) for message in row.messages]
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        self.turns, self.tools = turns, row.tools
        for turn in self.messages():
            self.display.say(f"{turn['role']}: {turn['content']}")

    def compare(self, rest: str) -> None:
        """Both answers, one after the other, in two columns; only a new question enters the session."""
        questions = [number for number, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not rest and not questions:
            raise UserError("/compare: there is no question yet.", "/compare TEXT")
        asked = {"role": "user", "content": rest} if rest else self.turns[questions[-1]]
        before = self.turns if rest else self.turns[: questions[-1]]
        messages = [*self.messages()[: len(self.messages()) - len(self.turns)], *before, asked]
        models, texts, finish = (self.models.base(), self.models.tuned), ["", ""], None
        with self.display.side_by_side([model.name for model in models]) as update:
            try:
                for number, model in enumerate(models):
                    with closing(model.answer(messages, self.sampling, self.tools)) as pieces:
                        for piece, end in pieces:
                            texts[number], finish = texts[number] + piece, end
                            update(texts)
            except KeyboardInterrupt:
                finish = "interrupted"
        if rest:
            self._keep(asked, texts[1], finish)


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add one row to the file, completely or not at all."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(before + ("\n" if before and not before.endswith("\n") else "") + line, encoding="utf-8")


def converse(session: ChatSession, read: Callable[[], str]) -> None:
    """Handle line after line until the session ends; an error is shown as a warning.

    Raises UserError where nothing more can be read, or asked.
    """
    while True:
        try:
            line = read()
            try:
                if not session.handle(line):
                    return
            except Ended:
                raise
            except UserError as error:
                again = " Or start again: /reset" if isinstance(error, Refusal) else ""
                session.display.warn(f"{error.what}\n  {error.fix}{again}")
        except EOFError:
            return
        except KeyboardInterrupt:
            session.display.say("(Ctrl-D or /quit ends the session)")
        except OSError as error:
            session.display.warn(f"{error.strerror or error}: {error.filename or ''}")


def _reader(history: bool) -> Callable[[], str]:
    """Lines with editing and a history on a terminal, plain ones elsewhere."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = PromptSession(history=history_of(history), multiline=True, key_bindings=keys)
    return lambda: session.prompt("> ", prompt_continuation="  ")


def _plain_line() -> str:
    try:
        return input()
    except UnicodeDecodeError as error:
        raise UserError(
            f"Standard input is not UTF-8 text: {error.reason}.", "Convert it, as by iconv -t UTF-8."
        ) from None


def history_of(kept: bool) -> Any:
    """A history of prompt_toolkit: in the cache folder, or of this session alone where none is wanted, or can be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = cache_folder() / "chat-history"
    with suppress(OSError):
        if kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            with path.open("a+b"):  # whether it can be read and written
                return FileHistory(str(path))
    return InMemoryHistory()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM and a closed terminal end the program, servers and all; only Ctrl-C is a KeyboardInterrupt here."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "In the chat, /help lists the commands, such as /compare with the base and /save as a training row."
    add_target(parser)
    add_system(parser, "system prompt")
    parser.add_argument(
        "--context", type=count, default=4096, metavar="N", help="most tokens of the conversation (default: 4096)"
    )
    parser.add_argument(
        "--no-history", "--no_history", action="store_true", help="neither read nor write earlier sessions' questions"
    )
    add_llama(parser)
    add_sampling(parser)


def run(args: argparse.Namespace, context: Context) -> None:
    sampling = sampling_of(args)
    target, system = choose(args.run, args.kind, args.quant), system_text(args.system, args.system_file)
    check_llama(target.kind == "gguf", context)
    with _ended_by_signal(), opened(target, context, args.context) as models:
        session = ChatSession(models, sampling, context.display, system)
        context.display.say(f"{models.tuned.name}; /help lists the commands, Ctrl-D ends")
        converse(session, _reader(not args.no_history))
