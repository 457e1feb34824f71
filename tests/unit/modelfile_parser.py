"""Modelfiles read as Ollama reads them (its parser/parser.go), for tests."""

COMMANDS = {"from", "license", "template", "system", "adapter", "parameter", "message"}


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """`("from", "./x.gguf")`, `("template", ...)`, `("stop", ...)` ... in order. ValueError where Ollama refuses."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = _line_end(text, at)
        else:
            name, at = _word(text, at)
            if name.lower() not in COMMANDS:
                raise ValueError(f"{name!r} is not a command")
            if name.lower() == "parameter":
                name, at = _word(text, at)
            value, at = _value(text, at)
            found.append((name.lower(), value))
    if "from" not in dict(found):
        raise ValueError("no FROM line")
    return found


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _word(text: str, at: int) -> tuple[str, int]:
    end = at
    while end < len(text) and (text[end].isalnum() or text[end] == "_"):
        end += 1
    if end == len(text) or text[end] not in " \t" or end == at:
        raise ValueError(f"a name is expected at {text[at : at + 20]!r}")
    return text[at:end], end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    """Up to a line's end or, where quotes stand open, to the first line break or space behind them."""
    kept = ""
    while at < len(text):
        letter = text[at]
        at += 1
        if letter in "\r\n" and (value := _unquoted(kept.strip())) is not None:
            return value, at
        if letter in " \t\r\n" or letter.isprintable():  # the others are dropped
            kept += letter
    if (value := _unquoted(kept.strip())) is None:
        raise ValueError("quotes stand open at the end")
    return value, at


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text
