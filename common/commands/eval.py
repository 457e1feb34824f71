"""`eval RUN`: losses and scored answers on rows that were not trained on, base and tuned models side by side."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.commands.arguments import add_llama, count
from common.context import Context
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.load import check_fields
from common.data.sources import data_of, encoder_of
from common.display import Display
from common.errors import UserError
from common.evaluation.judge import Evaluation, compared, judge, scores_of
from common.evaluation.metrics import REFERENCE, Metric, comparing, json_schema, regex
from common.evaluation.report import folder_of, show, write
from common.evaluation.rows import JudgedRow, learned_rows, read_test
from common.evaluation.scorer import scorer
from common.evaluation.subjects import KINDS, Lengths, Subject, gguf_subject, model_subject, subjects_of, targets_of
from common.evaluation.suite import Suite, run_suite
from common.inference.chat_models import Kind, Target, choose
from common.models.load import base_of
from common.models.resolve import resolve
from common.option_sources import options_over
from common.paths import source_name, user_path
from common.run_lock import held
from common.run_record import Run


@dataclass(frozen=True)
class Given:
    """What the positional argument names: models to judge, and how rows become tokens (None: nothing says so)."""

    subjects: list[Subject]
    encoder: Encoder | None
    folder: Path  # where results go unless --out says
    fields: dict[str, str] = field(default_factory=dict)  # that rows are read with, as in the run


def run_of(path: Path) -> Run | None:
    """The run that the path names, itself or its fused folder; None for anything else."""
    for folder in (path, *([path.parent] if path.name == "fused" else [])):
        if Run(folder).record_file.exists():
            return Run(folder)
    return None


def given_by(args: argparse.Namespace, run: Run | None, context: Context) -> Given:
    """Raises UserError where something that is named is missing."""
    path, lengths = Path(args.model), Lengths(args.context, args.slots)
    results = Path("eval") / f"{source_name(args.model)}-{args.data.stem}"
    if run is not None:
        if args.chat_template:
            raise UserError("--chat-template: a run has its own.", "Leave it out.")
        targets = targets_of(run, _kinds(args, run), args.quant)
        base = base_of(run, context.display)
        options = options_over(run.record.options, {})
        encoder, subjects = (
            encoder_of(base.path, options, run.recipe),
            subjects_of(run, base, targets, lengths, context),
        )
        return Given(subjects, encoder, run.path / "eval" / args.data.stem, options.field)
    _refuse_forms(args)
    if path.suffix == ".gguf":
        return Given([gguf_subject(choose(path, None, None), lengths, context)], None, results)
    if not path.exists() and path.parent != Path() and path.parent.is_dir():  # no hub name
        raise UserError(f"{path}: no such run or model folder.", "Check the path.")
    model = resolve(args.model, context.display.say)
    tokenizer = load_tokenizer(model.path, args.chat_template)
    template = tokenizer.chat_template if args.chat_template else None
    subject = model_subject(args.model, model, template, lengths, context)
    return Given([subject], Encoder(tokenizer, MaskingOptions()), results)


def _kinds(args: argparse.Namespace, run: Run) -> list[Kind] | None:
    """The forms that were asked for; None where nothing was said."""
    return args.kinds or (["fused"] if Path(args.model).name == "fused" and run.path != Path(args.model) else None)


def _refuse_forms(args: argparse.Namespace) -> None:
    """Raises UserError where a model that is not a run is to have several."""
    if args.kinds or args.quant:
        option = "--with" if args.kinds else "--quant"
        raise UserError(f"{option}: {args.model} is not a run, and has one form only.", "Leave it out.")


def metrics_of(args: argparse.Namespace) -> list[Metric]:
    """What answers are scored by. Raises UserError where a file, a pattern or a library cannot be used."""
    found = [comparing(name) for name in dict.fromkeys(args.metric)]
    found += [regex(args.regex)] if args.regex is not None else []
    found += [json_schema(args.json_schema)] if args.json_schema else []
    found += [scorer(args.scorer)] if args.scorer else []
    return found


def evaluate(args: argparse.Namespace, context: Context) -> None:
    """Judge every subject, show the figures and keep them. Raises UserError before anything is loaded where it can."""
    run = run_of(Path(args.model))
    with ExitStack() as stack:
        if run is not None:
            run.require_complete()
            stack.enter_context(held(run.path))
        suite = suite_of(args, run, context) if args.suite else None
        if args.data:
            _judge(args, run, context)
        if suite:
            suite()


def suite_of(args: argparse.Namespace, run: Run | None, context: Context) -> Callable[[], None]:
    """What has the model, or base and fused folder of the run, do the tasks of --suite.

    Raises UserError where that is not possible.
    """
    if args.chat_template:
        raise UserError("--chat-template: --suite asks a model in its own.", "Leave it out.")
    folders, ggufs = dict[str, Path](), list[Target]()
    if run is not None:
        kinds: list[Kind] = _kinds(args, run) or ["base", "fused"]
        if args.quant and not args.kinds:
            kinds = [*kinds, "gguf"]
        if "adapter" in kinds:
            raise UserError("--suite: an adapter alone is not a model.", "The fused folder is the same: --with fused.")
        for target in targets_of(run, kinds, args.quant):
            if target.kind == "gguf":
                ggufs.append(target)
            elif target.kind == "base":
                folders["base"] = base_of(run, context.display).path
            else:
                folders[target.kind] = run.path / str(run.record.export.fused)
    elif Path(args.model).suffix == ".gguf":
        _refuse_forms(args)
        ggufs.append(choose(Path(args.model), None, None))
    else:
        _refuse_forms(args)
        folders["model"] = resolve(args.model, context.display.say).path
    results = args.out or (run.path / "eval" if run is not None else Path("eval") / source_name(args.model))
    suite = Suite(args.suite, args.suite_tasks, args.limit, results / "suite")
    suite.check(bool(ggufs))
    return lambda: run_suite(suite, folders, ggufs, args.slots, args.context, context)


def _judge(args: argparse.Namespace, run: Run | None, context: Context) -> None:
    """On the rows of --data."""
    display, metrics = context.display, metrics_of(args)
    fields = options_over({}, {"field": args.field}).field
    check_fields(fields)
    given = given_by(args, run, context)
    with display.stage("read the data"):
        rows = _read(args, given, fields)
        if run is not None:
            _warn_of_learned(run, rows, display)
    about = {"data": str(args.data.resolve())} | ({} if run is not None else {"model": _named(args.model)})
    folder = args.out or folder_of(given.folder, about)
    evaluation = Evaluation(rows, metrics, folder, args.context, args.max_tokens, args.seed)
    _check(evaluation, given.subjects, args.data)
    _say_rows(evaluation, display)
    judged = [judge(subject, evaluation, display) for subject in given.subjects]
    scores = scores_of(evaluation, judged)
    write(evaluation, judged, scores, {"model": _named(args.model)} | about)
    show(evaluation, judged, scores, display)
    display.say(f"Answers and figures: {folder}/rows.jsonl, {folder}/scores.json")


def _warn_of_learned(run: Run, rows: Sequence[JudgedRow], display: Display) -> None:
    """Of rows that the run was trained on; of none where its data is another now, or not on this machine."""
    with suppress(UserError):
        options = options_over(run.record.options, {})
        here = all(user_path(source, "--data").exists() for source in options.data)  # the hub is not asked for it
        if here and (learned := learned_rows(rows, data_of(run, options).train)):
            named = ", ".join(learned[:3]) + ", ..." * (len(learned) > 3)
            display.warn(
                f"{len(learned)} of {len(rows)} rows have the prompt of a row that was trained on ({named}): their "
                "figures say little of new rows"
            )


def _named(model: str) -> str:
    """A path in full, as the record may be read from another folder; a name of the hub as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _read(args: argparse.Namespace, given: Given, fields: dict[str, str]) -> list[JudgedRow]:
    """By --field; without one as the run's rows were read, else by the usual names. Raises UserError as read_test."""
    try:
        return read_test(args.data, given.encoder, args.limit, fields or given.fields)
    except UserError:
        if fields or not given.fields:
            raise
        with suppress(UserError):
            return read_test(args.data, given.encoder, args.limit)
        raise


def _check(evaluation: Evaluation, subjects: Sequence[Subject], data: Path) -> None:
    """Raises UserError where there is nothing to judge, or nothing for one of the metrics."""
    if not evaluation.metrics and not any(subject.has_loss for subject in subjects):
        raise UserError(
            "This GGUF belongs to no run, so that nothing says how rows become tokens: its loss cannot be taken.",
            "Score its answers, for example with --metric exact; or give the run folder.",
        )
    if not evaluation.metrics and not evaluation.with_loss:
        raise UserError(
            f"--data {data}: no row has an answer of at most --context {evaluation.context} tokens, so there is no "
            "loss.",
            "Give rows with answers, or score what the model says: --regex, --json-schema, --scorer.",
        )
    for metric in evaluation.metrics:
        if not compared(evaluation, metric):
            what = "ends with an answer to compare with" if evaluation.asked else "has a prompt"
            raise UserError(
                f"{metric.name}: no row of {data} {what}.",
                "Rows of plain text are judged by their loss alone; rows without an answer by --regex, --json-schema "
                "or --scorer.",
            )


def _say_rows(evaluation: Evaluation, display: Display) -> None:
    rows: list[JudgedRow] = evaluation.rows
    without = sum(row.prompt is not None and row.reference is None for row in rows)
    if without:
        display.say(f"{without} of {len(rows)} rows do not end with an answer: they are not compared with one")
    if evaluation.metrics and (plain := len(rows) - len(evaluation.asked)):
        display.say(f"{plain} of {len(rows)} rows are plain text: only their loss is taken")
    long = sum(row.encoded is not None for row in rows) - len(evaluation.with_loss)
    if long:
        display.warn(f"{long} rows are longer than --context {evaluation.context}: their loss is not taken")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Answers to --data are kept: a stopped evaluation continues, and another metric asks for none again."
    )
    parser.add_argument("model", metavar="RUN|MODEL", help="run folder; or a model: hub name, folder or GGUF file")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows to judge on, in any format that train reads")
    parser.add_argument(
        "--with",
        dest="kinds",
        nargs="+",
        choices=KINDS,
        metavar="FORM",
        help="forms of the run to judge: base, adapter, fused, gguf (default: all that it has)",
    )
    parser.add_argument("--quant", nargs="+", metavar="TYPE", help="GGUFs of the run to judge; all unless given")
    parser.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="PART=COLUMN",
        help="names that the rows use for the parts of a row, as for train; a run knows its own",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="judge the first N rows only")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: RUN/eval/NAME of the data)"
    )
    group = parser.add_argument_group("Scores of answers")
    group.add_argument(
        "--metric", nargs="+", default=[], choices=REFERENCE, metavar="NAME", help="exact, chrf, rouge, bleu"
    )
    group.add_argument("--regex", metavar="PATTERN", help="share of answers in which this regular expression is found")
    group.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="share of answers that are JSON and follow the schema"
    )
    group.add_argument("--scorer", type=Path, metavar="FILE.py", help="mean of its score(row, answer); the file is run")
    group.add_argument(
        "--max-tokens", type=count, default=512, metavar="N", help="most tokens of an answer (default: 512)"
    )
    group.add_argument(
        "--slots",
        type=count,
        default=1,
        metavar="N",
        help="answers that llama.cpp makes at once (default: 1, as more may change an answer from run to run)",
    )
    tasks = parser.add_argument_group("Tasks of lm-evaluation-harness, where that is installed")
    tasks.add_argument("--suite", nargs="+", metavar="NAME", help="tasks for base and fused folder, or those of --with")
    tasks.add_argument("--suite-tasks", type=Path, metavar="DIR", help="folder of your own task files; may hold code")
    more = parser.add_argument_group("More")
    more.add_argument("--context", type=count, default=4096, metavar="N", help="most tokens of a row (default: 4096)")
    more.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the intervals (default: 0)")
    more.add_argument("--chat-template", metavar="NAME", help="for a model without one: a built-in template, or a file")
    add_llama(parser)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def run(args: argparse.Namespace, context: Context) -> None:
    if args.data is None and not args.suite:
        raise UserError("No data is given.", "Add --data FILE, with rows that were not trained on; or --suite NAME.")
    if args.data is None and (args.metric or args.regex is not None or args.json_schema or args.scorer):
        raise UserError(
            "Answers are scored on rows, and --data is not given.", "Add --data FILE, or leave the score out."
        )
    evaluate(args, context)
