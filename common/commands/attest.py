"""`attest RUN`: a file about a run that a stranger can check, and the check of one."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import strict_json
from common.attest.check import STATES, Outcome, compare, to_collect
from common.attest.document import SECTIONS, Attest, SectionRecord, collect, content_of, own_hash, read_attest
from common.attest.kept import named_files
from common.attest.page import attest_page, page_digest
from common.attest.subject import Subject, other_machine
from common.commands.arguments import add_llama
from common.context import Context
from common.display import Display
from common.errors import UserError
from common.export.model_card import write_card
from common.files import atomic_write, file_digest, scratch_folder
from common.models.load import say_llama
from common.report.page import write_page
from common.run_fields import AttestRecord
from common.run_lock import held, refuse_links
from common.run_record import Run

_LISTED = 20  # figures that differ
_SHOWN = 72  # characters of a figure


def attest_run(path: Path, texts: bool, context: Context) -> None:
    """Write attest.json and attest.html into the run, and its hash into the run's model card.

    Raises UserError where the fused folder is not the adapter fused into its base.
    """
    run, display = Run(path), context.display
    record = run.require_complete()
    with held(path), scratch_folder(path) as scratch:
        say_llama(record, context.llama_cpp, display)
        given = Subject(run, context, scratch, texts)
        sections, faults = collect(given)
        _require_fused(run, sections)
        content = content_of(given, sections, page_digest())
        run.update(attest=None)  # until both files are written: push trusts the record
        with atomic_write(run.attest) as temporary:
            temporary.write_text(
                strict_json.dumps(content, indent=1) + "\n", encoding="utf-8", errors="backslashreplace"
            )
        page = run.attest.with_suffix(".html")
        write_page(page, attest_page(Attest.model_validate(content)))
        files = {path.name: file_digest(path) for path in (run.attest, page)}
        made = AttestRecord(sha256=content["sha256"], date=content["made"]["date"], with_text=texts, files=files)
        run.update(attest=made)
        with display.optional("no model card"):
            write_card(run)
    for name, fault in faults.items():
        display.warn(f"the attest states nothing under {name!r}: {fault.what} {fault.fix}")
    display.show(
        f"The attest is in {run.attest} and {page}; SHA-256 {content['sha256']}", kind="attest", path=str(run.attest)
    )


def _require_fused(run: Run, sections: dict[str, SectionRecord]) -> None:
    files, again = sections["files"].figures, sections["fused again"].figures
    if wrong := [name for name, found in again.items() if files.get(name) not in (None, found)]:
        raise UserError(
            f"{run.path / wrong[0]} is not what the run's adapter gives, fused into its base.",
            f"Make it again: python cli.py fuse {run}",
        )


def check_attest(path: Path, file: Path, context: Context) -> list[Outcome]:
    """The outcome of every figure in `file`. Nothing of the run is changed. Raises UserError where no run is there."""
    run, display = Run(path), context.display
    content, stated = read_attest(file)
    record = run.require_complete()
    refuse_links(path)
    say_llama(record, context.llama_cpp, display)
    outcomes = [*_of_the_file(file, content, stated)]
    for one in outcomes:
        if one.state == "not checkable here":
            display.warn(f"{one.name} is not proven: {one.why}. Trust what stands in {file} alone.")
    with scratch_folder() as scratch:
        given = Subject(run, context, scratch, stated.with_text, again=True)
        figures, empty = to_collect(stated)
        found, faults = collect(given, figures)
        on_record, lacking = collect(replace(given, again=False), empty)
        found, faults, made = found | on_record, faults | lacking, given.made()
        outcomes += _of_its_making(stated.made, made)
        outcomes += compare(stated, found, faults, other_machine(stated.made, made), _name_files(run, stated, found))
    _show(outcomes, display)
    return outcomes


def _name_files(run: Run, stated: Attest, found: dict[str, SectionRecord]) -> list[str]:
    """Add the files that the attest names and run.json does not to what is found; returns those that are not here."""
    named = stated.sections["files"].figures.keys() if "files" in stated.sections else ()
    here = found["files"].figures if "files" in found else {}
    others, absent = named_files(run, [name for name in named if name not in here])
    here |= others
    return absent


def _of_its_making(stated: dict[str, Any], here: dict[str, Any]) -> Iterator[Outcome]:
    """The model's name, and what nobody states of how an attest was made; the machine is not checked."""
    same = stated.get("model") == here["model"]
    yield Outcome("the file", "model", "reproduced" if same else "differs", stated.get("model"), here["model"])
    for name in [name for name in stated if name not in (*here, "date", "page")]:
        yield Outcome("the file", f"made / {name}", "differs", stated[name])


def _of_the_file(file: Path, content: dict[str, Any], stated: Attest) -> list[Outcome]:
    """Whether the file has the hash that it states, and whether the page beside it shows what it states."""
    hashed = own_hash(content)
    own = Outcome("the file", "sha256", "reproduced" if hashed == stated.sha256 else "differs", stated.sha256, hashed)
    page = file.with_suffix(".html")
    if not page.is_file():
        return [own]
    if stated.made.get("page") != page_digest():
        why = "another version of Twintune wrote the page"
        return [own, Outcome("the file", page.name, "not checkable here", why=why)]
    same = page.read_bytes() == attest_page(stated).encode("utf-8", "backslashreplace")
    return [own, Outcome("the file", page.name, "reproduced" if same else "differs", "the page", "the file's figures")]


def _show(outcomes: list[Outcome], display: Display) -> None:
    counts: dict[str, Counter[str]] = {}
    for one in outcomes:
        counts.setdefault(one.section, Counter())[one.state] += 1
    rows = []
    for name, count in counts.items():
        how = SECTIONS[name].how if name in SECTIONS else "computed"
        rows.append([name, how, *(str(count[state]) for state in STATES)])
    display.table("Figures", ["section", "how", *STATES], rows)
    for section in counts:
        whys = dict.fromkeys(one.why for one in outcomes if one.section == section and one.why)
        for why in whys:
            display.say(f"{section}, not checkable here: {why}")
    wrong = [one for one in outcomes if one.state == "differs"]
    if wrong:
        shown = [[one.section, one.name, _short(one.stated), _short(one.found)] for one in wrong[:_LISTED]]
        more = f", the first {_LISTED}" if len(wrong) > _LISTED else ""
        display.table(f"What differs{more}", ["section", "figure", "stated", "found here"], shown)
    total = Counter[str](one.state for one in outcomes)
    display.show(", ".join(f"{total[state]} {state}" for state in STATES), kind="check", **total)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "With --check it writes nothing, and exits with status 1 where a figure differs."
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("run", type=Path, nargs="?", metavar="RUN", help="folder of a finished run")
    given.add_argument("--run", type=Path, dest="named", metavar="RUN", help="the same, by its name")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compute the figures of this attest again from RUN")
    parser.add_argument(
        "--with-text",
        "--with_text",
        action="store_true",
        help="state rows, prompts and answers as text too, and not only by their hashes",
    )
    add_llama(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    run: Path = args.run or args.named
    if args.check is None:
        attest_run(run, args.with_text, context)
        return 0
    if args.with_text:
        raise UserError("--with-text: the file of --check says whether there is text in it.", "Leave one of them out.")
    return 1 if any(one.state == "differs" for one in check_attest(run, args.check, context)) else 0
