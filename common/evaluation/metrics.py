"""What answers are scored by: exact match, a regular expression, a JSON schema, chrF, ROUGE, BLEU.

A metric gives statistics of each answer, of whose sums its figure is computed: a mean, or a score of all answers.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from common.documents import read_json, refuse_constant
from common.errors import UserError, first_line, install_extra
from common.evaluation.bootstrap import FromSums, mean
from common.evaluation.rows import JudgedRow
from common.system.hardware import installed

Reference = Literal["exact", "chrf", "rouge", "bleu"]  # metrics that compare with the row's own answer
REFERENCE: tuple[str, ...] = get_args(Reference)
_MODULES = {"chrf": "sacrebleu", "bleu": "sacrebleu", "rouge": "rouge_score", "json-schema": "jsonschema"}
# ROUGE counts words; a character of Chinese, Japanese or Korean writing is one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True)
class Metric:
    """statistics: of one answer, [S] numbers. figure: of their sums over answers. compares: with the row's answer."""

    name: str
    compares: bool
    statistics: Callable[[JudgedRow, str], Sequence[float]]
    figure: FromSums = mean
    share: bool = False  # each answer has 0 or 1, so that the figure is a share of answers


def _share(name: str, compares: bool, passes: Callable[[JudgedRow, str], bool]) -> Metric:
    return Metric(name, compares, lambda row, answer: (float(passes(row, answer)), 1.0), share=True)


def require(name: str) -> None:
    """Raises UserError where the library of the metric is not installed."""
    module = _MODULES.get(name)
    if module is not None and not installed(module):
        option = f"--metric {name}" if name in REFERENCE else f"--{name}"
        raise UserError(
            f"{option} needs {module.replace('_', '-')}, which is not installed.",
            install_extra("eval"),
        )


def comparing(name: Reference) -> Metric:
    """The metric of that name, which compares an answer with the row's own. Raises UserError as `require`."""
    require(name)
    if name == "exact":
        return _share("exact", True, lambda row, answer: answer.strip() == str(row.reference).strip())
    if name == "rouge":
        return _rouge()
    from sacrebleu.metrics import BLEU, CHRF

    return _sacrebleu("chrF", CHRF()) if name == "chrf" else _sacrebleu("BLEU", BLEU(effective_order=False))


def _sacrebleu(name: str, metric: Any) -> Metric:
    """A corpus score, by the two functions that sacrebleu's own bootstrap uses."""

    def statistics(row: JudgedRow, answer: str) -> Sequence[float]:
        found: Sequence[float] = metric._extract_corpus_statistics([answer], [[str(row.reference)]])[0]
        return found

    def figure(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(np.rint(sums).astype(int).tolist()).score)

    return Metric(name, True, statistics, figure)


class _Words:
    """rouge-score's own tokenizer drops all but the letters a to z."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _rouge() -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())

    def statistics(row: JudgedRow, answer: str) -> Sequence[float]:
        return 100 * scorer.score(str(row.reference), answer)["rougeL"].fmeasure, 1.0

    return Metric("ROUGE-L", True, statistics)


def regex(pattern: str) -> Metric:
    """Whether the pattern is found in the answer. Raises UserError where it cannot be compiled."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"--regex {pattern!r} is not a regular expression of Python's: {error}.",
            "Correct it; in a shell it stands in single quotes.",
        ) from None
    return _share("regex", False, lambda row, answer: compiled.search(answer) is not None)


def json_schema(path: Path) -> Metric:
    """Whether the answer is JSON and follows the schema. Raises UserError where it is not one, and as `require`."""
    require("json-schema")
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    where, fix = f"--json-schema {path}", "Give a file with a JSON schema, as in docs/evaluate.md."
    try:
        schema = read_json(path, fix)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file.", "Check the path.") from None
    kind: Any = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        place = "/".join(map(str, error.path)) or "the schema itself"
        raise UserError(f"{where} is not a JSON schema: {place}: {first_line(error)}", fix) from None
    validator = kind(schema, registry=Registry())  # or it would fetch what a $ref names

    def follows(row: JudgedRow, answer: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(answer, parse_constant=refuse_constant)))
        except Unresolvable as error:
            raise UserError(f"{where}: a $ref leads nowhere: {first_line(error)}", "Write it into the file.") from None
        except (ValueError, RecursionError):  # not JSON, or nested too deeply to be looked at
            return False

    return _share("JSON schema", False, follows)
