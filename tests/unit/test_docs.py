"""README, CONTRIBUTING and docs/: their links, their commands, the errors they quote, and how they are written."""

import ast
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cli
from tests import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
READMES = [ROOT / "README.md", ROOT / "README.ja.md"]
ENGLISH = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
EVERY = [*READMES, ROOT / "CONTRIBUTING.md", *DOCS]

# README's limits, and the mean words of a sentence in all that is written here.
LINES, WIDTH, WORDS = 150, 120, 1500
MEAN_SENTENCE = 20

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*)$", re.MULTILINE)
_PATH = re.compile(r"`((?:common|torch_backend|mlx_backend|tests|benchmarks|configs|examples|docs)/[\w/.-]*)`")
_NAME_IN = re.compile(r"`(\w+)` in `([\w/]+\.py)`")
_DEFINED = r"^ *(?:def|class) {0}\b|^ *{0}(?:: [^=\n]+)? ="
_COMMAND = re.compile(r"\b(?:python cli\.py|twintune) ([a-z][a-z-]*)([^\n`]*)")


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Fenced and indented code blocks removed, so that nothing in them is taken for a link or a heading."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?:(?: {4}|\t).*\n+)+", "\n", text)


def anchors(path: Path) -> set[str]:
    """The headings' anchors, as GitHub and the site make them of headings without punctuation."""
    headings = _HEADING.findall(without_code(text_of(path)))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("path", EVERY, ids=page)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    broken = []
    for link in _LINK.findall(without_code(text_of(path))):
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", EVERY, ids=page)
def test_every_file_that_is_named_is_there(path: Path) -> None:
    assert [name for name in _PATH.findall(text_of(path)) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", EVERY, ids=page)
def test_a_name_is_defined_in_the_file_that_is_said_to_have_it(path: Path) -> None:
    named = [(name, file) for name, file in _NAME_IN.findall(text_of(path)) if (ROOT / file).is_file()]
    assert [one for one in named if not re.search(_DEFINED.format(one[0]), text_of(ROOT / one[1]), re.MULTILINE)] == []


def in_navigation(part: object) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from in_navigation(value)
    elif isinstance(part, list):
        for value in part:
            yield from in_navigation(value)


def test_the_navigation_is_all_pages_once() -> None:
    site = tomllib.loads(text_of(ROOT / "zensical.toml"))["project"]
    assert sorted(in_navigation(site["nav"])) == [path.name for path in DOCS]


def test_the_start_page_links_every_other() -> None:
    linked = set(_LINK.findall(text_of(ROOT / "docs" / "index.md")))
    assert {path.name for path in DOCS} - linked == {"index.md"}


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Each command of the command line that the page names, and the flags that stand in its line."""
    lines = re.sub(r"\s#\s.*", "", re.sub(r"\\\n\s*", " ", text_of(path)))
    found = _COMMAND.findall(lines)
    return [(name, re.findall(r"--[a-z][a-z-]*", rest.partition("|")[0])) for name, rest in found]


@cache
def help_of(command: str) -> str:
    """What `COMMAND --help` prints. Fails where there is no such command."""
    argv, out = sys.argv, sys.stdout
    from io import StringIO

    sys.argv, sys.stdout = ["twintune", command, "--help"], StringIO()
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code in (0, None), command
        return sys.stdout.getvalue()
    finally:
        sys.argv, sys.stdout = argv, out


NESTED = ("adapter", "llama")  # whose flags stand in the help of a command of theirs


@pytest.mark.parametrize("path", EVERY, ids=page)
def test_every_command_that_is_named_exists_and_takes_its_flags(path: Path) -> None:
    wrong = []
    for name, flags in commands(path):
        shown = help_of("train" if name == "plan" else name)  # plan takes train's options
        if name not in NESTED:
            own = ("--no-probe", "--forget") if name == "plan" else ()
            wrong += [f"{name} {flag}" for flag in flags if flag not in shown and flag not in (*own, "--help")]
    assert wrong == []


# --- how it is written


def test_the_readme_is_short() -> None:
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) < LINES
    assert [number for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []
    assert len(text_of(ROOT / "README.md").split()) < WORDS


def test_the_readmes_are_linked_and_hold_the_same() -> None:
    english, japanese = map(text_of, READMES)
    assert "README.ja.md" in english
    assert "README.md" in japanese
    blocks = [set(re.findall(r"`(--[a-z-]+)[ `]", text)) for text in (english, japanese)]
    assert blocks[0] == blocks[1]
    named = [{name for name, _ in commands(path)} for path in READMES]
    assert named[0] == named[1]


def sentences(text: str) -> list[str]:
    """Prose alone: code blocks, tables, headings and HTML left out; an item of a list is a sentence of its own."""
    prose: list[str] = []
    for line in without_code(text).splitlines():
        if not line.strip() or line.startswith(("|", "#", "<", "!")):
            prose.append("\n")
        elif re.match(r"\s*(?:[-*]|\d+\.)\s", line):
            prose.append("\n" + re.sub(r"^\s*(?:[-*]|\d+\.)\s", "", line))
        else:
            prose.append(line)
    parts = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z`*\[\"])", " ".join(prose))
    return [part for part in (part.strip() for part in parts) if len(part.split()) > 1]


@pytest.mark.parametrize("path", ENGLISH, ids=page)
def test_sentences_are_short(path: Path) -> None:
    lengths = [len(sentence.split()) for sentence in sentences(text_of(path))]
    assert not lengths or statistics.mean(lengths) < MEAN_SENTENCE


def test_sentences_are_found() -> None:
    text = (
        "# Not this\n\nOne two three. Four five\nsix?\n\n    code here\n\n- an item\n- another. And more\n| a | b |\n"
    )
    assert sentences(text) == ["One two three.", "Four five six?", "an item", "And more"]


# --- errors


def written_texts() -> str:
    """Every string of the program, an f-string's values as `{}`, one a line."""
    found = [text_of(ROOT / "Makefile")]
    for path in [
        ROOT / "cli.py",
        *(p for name in ("common", "torch_backend", "mlx_backend") for p in (ROOT / name).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
    return "\n".join(found)


def test_the_errors_that_are_explained_are_those_that_are_raised() -> None:
    program = written_texts()
    rows = re.findall(r"^\| `([^`]+)` \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(rows) > 50
    missing = [row for row in rows if not re.search(".*".join(map(re.escape, row.split("..."))), program)]
    assert missing == []


# --- figures


def test_every_table_of_the_benchmarks_carries_date_host_and_commit() -> None:
    """In the table, or in the paragraph before or after it."""
    blocks = text_of(ROOT / "docs" / "benchmarks.md").split("\n\n")
    tables = [number for number, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) > 3
    for number in tables:
        around = "\n".join(blocks[number - 1 : number + 2])
        for what, pattern in (
            ("date", r"\b\d+ [A-Z][a-z]+ 20\d\d\b"),
            ("host", r"\b(?:EPYC|Xeon|H200|Mac\w+)\b"),
            ("commit", r"\bcommits? [0-9a-f]{7}\b"),
        ):
            assert re.search(pattern, around), f"{blocks[number].splitlines()[0]}: no {what}"
