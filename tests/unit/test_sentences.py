"""Sentences that a run records in English have their Japanese: each that the program can produce, with its values."""

import ast
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.commands.compare import compare
from common.display import Display
from common.evaluation.alarms import Alarms
from common.options import Options
from common.report.page import write_report
from common.report.texts import sentence, sentences
from common.run_fields import AlarmRecord
from common.run_record import Run
from common.training.auto_recipe import chosen_values
from common.verify.divergence import Divergence
from common.verify.judge import judge_fused, judge_quants
from common.verify.server_checks import Check
from common.verify_record import COMPARED
from tests import ROOT
from tests.report_run import write_run
from tests.unit.test_alarms import FALLING, answers

JAPANESE = re.compile("[ぁ-んァ-ン一-龥]")
# Where the program makes the sentences: functions, and constants of a module or class.
MADE: dict[str, set[str]] = {
    "common/evaluation/alarms.py": {"_RATE", "_TEMPLATE", "_SHORTER", "step", "validation", "answers", "drift"},
    "common/data/findings.py": {
        *("LEFT_IN", "REPEATS", "SEVERAL_ANSWERS", "BROKEN_OFF"),
        *("quality_warnings", "control_tokens", "beyond_context"),
    },
    "common/data/messages.py": {"kind"},
    "common/training/expert_load.py": {"_CAUSE", "_REMEDY", "_warning", "about", "spread_rows"},
    "common/system/hardware.py": {"apple_precision", "nvidia_precision", "choose_backend", "_auto"},
    "torch_backend/devices.py": {"choose_device", "_named", "_freest", "choose_precision", "free_memory"},
    "mlx_backend/devices.py": {"choose_device", "_first_of", "choose_precision", "free_memory"},
    "common/commands/prepare.py": {"choose_hardware"},
    "common/training/planner.py": {"_budget"},
    "common/training/auto_recipe.py": {"chosen_values", "_learning_rate"},
    "common/verify/server_checks.py": {"_COMPOSED", "_tokens", "_prompts", "_stops", "_answers"},
    "common/verify/judge.py": {"judge_fused", "judge_quants"},
    "common/verify/verify.py": {"_full_weights"},
    "common/verify_record.py": {"COMPARED"},
    "common/commands/compare.py": {"_rows", "_notes", "_shares", "_moved", "_agreement"},
}
# Functions that are given the sentence, read it from the record, or take that of an error.
PASSED = {
    "common/commands/watch.py": {"rolling_back"},
    "common/evaluation/alarms.py": {"sign"},
    "common/data/findings.py": {"warning"},
    "common/verify/verify.py": {"_verify"},
}
MAKERS = {"Alarm", "Check", "Choice", "QualityWarning"}  # what is called with one
# In these functions too, and on no page: warnings of the terminal, errors.
BESIDES = (
    *("MLX will be about 15 times slower", " does not know this CPU, and was loaded with its slowest kernels"),
    *(" with CUDA_VISIBLE_DEVICES=", " in the environment", ", or auto"),
)


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def called(node: ast.AST) -> str:
    return str(getattr(node.func, "id", getattr(node.func, "attr", ""))) if isinstance(node, ast.Call) else ""


def literals(node: ast.AST) -> Iterator[str]:
    """The texts of several words in the node: whole ones, and the pieces between an f-string's values."""
    if isinstance(node, ast.Raise) or called(node) == "UserError":
        return
    if isinstance(node, ast.Constant):
        yield from [node.value] if isinstance(node.value, str) and re.search(r"\w* \w|\w \w*", node.value) else []
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from literals(part if isinstance(part, ast.Constant) else part.value)
    else:
        for child in body(node):
            yield from literals(child)


def body(node: ast.AST) -> Iterable[ast.AST]:
    """What is in the node; of a function, what follows its docstring."""
    children = list(ast.iter_child_nodes(node))
    documented = isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None
    return [child for child in children if not (documented and child is node.body[0])]


def named(path: str, names: set[str]) -> dict[str, list[ast.AST]]:
    """The functions and constants of the module, wherever they stand in it."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree(path)):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        name = node.name if isinstance(node, ast.FunctionDef) else getattr(target, "id", "")
        if name in names:
            found.setdefault(name, []).append(node)
    return found


def test_no_sentence_is_made_elsewhere() -> None:
    """Else the other tests would not look at it."""
    for path in (path for name in ("common", "torch_backend", "mlx_backend") for path in (ROOT / name).rglob("*.py")):
        place = str(path.relative_to(ROOT))
        for node in ast.walk(tree(place)):
            if isinstance(node, ast.FunctionDef) and any(called(one) in MAKERS for one in ast.walk(node)):
                known = MADE.get(place, set()) | PASSED.get(place, set())
                assert node.name in known, (
                    f"{place}, {node.name}: add it to MADE, and its sentences to ja.sentences.yaml"
                )


@pytest.mark.parametrize("path", MADE)
def test_every_sentence_of_the_program_has_its_japanese(path: str) -> None:
    english = [re.sub(r"\{\w+\}", "{}", text) for text in sentences("ja")]
    found = named(path, MADE[path])
    assert found.keys() == MADE[path]
    pieces = [piece for nodes in found.values() for node in nodes for piece in literals(node)]
    assert pieces
    missing = {piece for piece in pieces if not any(piece.strip(". ") in text for text in english)}
    assert {piece for piece in missing if not piece.startswith(BESIDES)} == set()


def in_japanese(text: str) -> str:
    """The text's Japanese, which it must have."""
    found = sentence(text, "ja")
    assert JAPANESE.search(found), text
    assert not re.search(r"[a-z] [a-z]+ [a-z]", found), (text, found)
    return found


def test_every_alarm() -> None:
    alarms = Alarms(2)
    alarms.validation({"step": 0, "valid_loss": 0.5})
    for number, loss in enumerate([*FALLING, 9.0, 9.0, 9.0]):
        alarms.step({"step": number + 1, "loss": loss, "grad_norm": 1.0 if loss < 9 else 99.0})
        if number in (20, 36, 38):
            alarms.validation({"step": number, "valid_loss": 0.4 * number})
    signs: list[list[dict[str, Any]]] = [
        answers("ab " * 60, "ab " * 60),
        answers("", " "),
        answers("a long answer " * 9, "another long one " * 9, ended=False),
        answers("of a row", "of a row too", reference="quite other words", copied=True),
        answers("<|im_end|>", "<|im_end|> a"),
        answers("alike", "alike"),
    ]
    for lines in signs:
        for step in (40, 50):
            alarms.answers(step, lines)
    alarms.drift(0, 0.0, 0.5)
    alarms.drift(50, 9.0, 2.0)
    made = {alarm.name for alarm in alarms.raised}
    assert made == {
        *("loss", "gradient", "overfitting", "worse", "repetition", "empty", "endless", "copies", "markers", "same"),
        "drift",
    }
    for alarm in alarms.raised:
        for text in (alarm.seen, alarm.cause, alarm.remedy):
            in_japanese(text)
    assert "--learning-rate" in in_japanese(alarms.raised[0].remedy)


def test_every_warning_about_rows() -> None:
    """As the record joins its parts."""
    made = []
    constants = {
        node.targets[0].id: node.value for node in tree("common/data/findings.py").body if isinstance(node, ast.Assign)
    }
    for node in ast.walk(tree("common/data/findings.py")):
        if called(node) == "warning":
            what, _, to_do = (constants.get(getattr(one, "id", ""), one) for one in node.args)
            made.append(f"7 {what.value}. {to_do.value}")
    assert len(made) == 8
    left_out = ("rows without an answer", "rows with train: false or weight: 0")
    made += [f"7 {kind}, left out. Give them an answer that is trained." for kind in left_out]
    for text in made:
        assert "7 行" in in_japanese(text)


def test_the_reasons_of_the_recipe() -> None:
    class Rows:
        label_tokens = np.array([30, 40])

        def __len__(self) -> int:
            return 400

    for given in ({}, {"method": "full"}, {"rank": 4}, {"batch_size": 2}):
        options = Options.model_validate({"model": "m", "data": "d"} | given)
        _, why = chosen_values(options, {"hidden_size": 576, "model_type": "llama"}, 1000, Rows())  # type: ignore[arg-type]
        said = in_japanese(why)
        assert "400 行、ラベル 70 トークン" in said
        assert "隠れ次元 576" in said
        assert ("1 ステップ 2 行(通常は 8 行)" in said) == ("batch_size" in given)


def test_the_reasons_of_the_hardware() -> None:
    assert in_japanese("no Apple silicon and no NVIDIA GPU that torch can use: the CPU").startswith("Apple シリコン")
    assert in_japanese("85 % of the free memory, 24.36 GB") == "空きメモリ 24.36 GB の 85 %"
    assert "NVIDIA H200" in in_japanese("the freest of 2 NVIDIA GPUs: NVIDIA H200, 139.1 GB free")
    assert "OpenBLAS" in in_japanese("MLX has no GPU here; OpenBLAS computes its products")


def link(kl: float) -> Divergence:
    return Divergence(kl, kl, 0.99, 1.0, 1.0, 0.1, 10)


def test_every_judgement_of_a_divergence() -> None:
    made: list[Check] = []
    for tune in (4.0, 1e-4, 1e-9):
        for kl in (1e-6, 0.01, 0.5, 3.0, math.nan):
            links = {"base": link(tune), "fused": link(kl), "BF16": link(kl), "Q4_K_M": link(kl)}
            made += [*judge_fused(links), *judge_quants(["Q4_K_M", "BF16"], links)]
    assert {check.state for check in made} == {"ok", "note", "broken"}
    for check in made:
        in_japanese(check.text)
    assert in_japanese(
        "KL 0.6 from the bf16 GGUF, 14.6% of the tune's own 4.1: a noticeable part of the tune is lost; "
        "try --quant Q5_K_M"
    ).startswith("bf16 の GGUF からの KL は 0.6、学習による変化 4.1 の 14.6%。")


def test_a_text_of_the_program_inside_another_is_translated_and_a_strangers_is_not() -> None:
    text = "629 of 636 texts and rows tokenized as in training; 'the free memory': [1, 2] for [3]"
    found = sentence(text, "ja")
    assert "'the free memory': [1, 2] for [3]" in found
    for text in ("", "the free memory of others", "a {row} with braces", "rank 1 2", "x" * 5000):
        assert sentence(text, "ja") == text
    assert sentence("asked for: {0}{free}", "ja") == "指定による({0}{free})"
    assert sentence("asked for", "en") == "asked for"


def test_a_strangers_long_text_takes_little_time() -> None:
    began = time.monotonic()
    for text in (
        "; x computes its products" * 80,
        " at step" * 250,
        ": the same recipe as" * 100,
        "a, " * 660,
        "KL " * 660,
    ):
        sentence(text, "ja")
    assert time.monotonic() - began < 2


def test_the_pages_have_no_english_sentence(tmp_path: Path) -> None:
    checks = [
        {"name": "token ids", "state": "ok", "text": "636 of 636 texts and rows tokenized as in training"},
        {"name": "stop, Q8_0", "state": "broken", "text": "<b>a stranger's words</b>"},
    ]
    alarm = AlarmRecord(
        name="same",
        seen="every prompt has the same answer at step 5",
        cause="one answer in most rows",
        remedy="vary the rows",
        since=5,
    )
    verify = {"verdict": "broken", "checks": checks, "divergence": {}, "rows": 3}
    folder = write_run(tmp_path / "run", alarms=[alarm], verify=verify)
    facts = json.loads((folder / "report.json").read_text())
    facts["data"]["warnings"] = [
        "7 rows with a placeholder left in. Fill in the placeholders, or leave these rows out."
    ]
    facts["reasons"] = {"device": "no NVIDIA GPU that torch can use", "backend": "<i>not of the program</i>"}
    (folder / "report.json").write_text(json.dumps(facts))
    html = write_report(Run(folder), "ja").read_text(encoding="utf-8")
    for said in (
        "636 件の文と行のうち 636 件",
        "不合格",
        "停止(Q8_0)",
        "よくある原因: ほとんどの行の回答が同じ",
        "7 行にプレースホルダー",
        "torch が使える",
    ):
        assert said in html, said
    assert "tokenized as in" not in html
    assert "&lt;b&gt;a stranger" in html
    assert "&lt;i&gt;not of the program" in html
    assert "636 of 636" in write_report(Run(folder), "en").read_text(encoding="utf-8")


def test_a_comparison_is_japanese(tmp_path: Path) -> None:
    first, other = (write_run(tmp_path / name, steps=steps) for name, steps in (("one", 20), ("two", 40)))
    same = write_run(tmp_path / "same", steps=20)
    compare([first, other, same], Display("quiet"), tmp_path / "c.html", "ja")
    html = (tmp_path / "c.html").read_text(encoding="utf-8")
    for said in ("異なるレシピです", "同じレシピです", "いいえ", "テスト損失", "steps 20 / 40"):
        assert said in html, said
    body = html[html.index("<main") : html.index("</main>")]
    labels = [label for label in re.findall(r'<th scope="row">(.*?)</th>', body) if not re.fullmatch("[0-9]+", label)]
    assert len(labels) > 15
    assert {label for label in labels if not JAPANESE.search(label)} <= {"one", "two", "same"}


def test_what_was_compared_has_its_japanese() -> None:
    for what in {name for pair in COMPARED.values() for name in pair}:
        in_japanese(what)
