"""The load of a mixture's experts: its figures, its warning, and what a run and its page say of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backend import Batch, StepResult
from common.commands.experts import ExpertWatch
from common.commands.train import run_training
from common.export.model_card import card
from common.models.adapter_files import read_peft
from common.models.experts import left_out_by_peft, mixture_tensors
from common.options import Options
from common.report.page import write_report
from common.run_fields import ExpertsRecord, LoadFacts
from common.run_record import Run
from common.training.expert_load import compared, described, drawn, enough, moved, shares
from tests.contexts import context
from tests.report_run import write_run
from tests.tiny import write_rows
from tests.unit.bigram import Bigram, row, rows
from tests.unit.hub import finished_run
from tests.unit.test_sentences import in_japanese

EVEN = {0: [50, 50, 50, 50], 3: [100, 60, 40, 0]}
SKEWED = {0: [99, 51, 48, 2], 3: [60, 60, 40, 40]}


def test_shares_and_their_distance() -> None:
    assert shares([100, 60, 40, 0]) == [2.0, 1.2, 0.8, 0.0]
    assert shares([0, 0]) == [0.0, 0.0]
    assert moved([50, 50, 50, 50], [100, 50, 50, 0]) == 0.25
    assert moved([5, 5], [500, 500]) == 0.0
    assert moved([1, 0], [0, 7]) == 1.0


def test_what_is_recorded_of_two_loads() -> None:
    found = compared(EVEN, SKEWED, 100, "validation")
    assert (found.experts, found.chosen, found.layers, found.tokens) == (4, 2, 2, 100)
    assert found.before is not None
    assert found.after is not None
    assert (found.before.busiest, found.before.busiest_layer, found.before.least_layer) == (2.0, 3, 3)
    assert (found.after.busiest, found.after.busiest_layer, found.after.least) == (1.98, 0, 0.04)
    assert (found.before.never, found.after.never) == (1, 0)
    assert (found.moved, found.most_moved, found.most_moved_layer) == (pytest.approx(0.225), 0.25, 0)
    assert found.fallen == [(0, 3)]
    assert found.warning.startswith(
        "training has put 1 of 8 experts out of use, most of them in layer 0. Usual cause: "
    )
    assert "busiest has 2.0x an even share (layer 3), after training 2.0x (layer 0)" in described(found)


@pytest.mark.parametrize(
    ("before", "after", "fallen"),
    [
        ([50, 50, 50, 50], [66, 66, 65, 3], True),  # from an even share to 0.06 of one: not yet
        ([50, 50, 50, 50], [66, 66, 66, 2], False),
        ([59, 59, 59, 23], [66, 67, 67, 0], True),  # it had less than half an even share
        ([59, 58, 58, 25], [66, 67, 67, 0], False),
        ([15, 15, 15, 15], [20, 20, 20, 0], True),  # too few choices to say so
        ([16, 16, 16, 16], [22, 21, 21, 0], False),
    ],
)
def test_an_expert_that_falls_out_of_use_is_told(before: list[int], after: list[int], fallen: bool) -> None:
    quiet = not compared({0: before}, {0: after}, 1, "validation").warning
    assert quiet == fallen


def test_rows_are_drawn_up_to_a_number_of_tokens() -> None:
    given = rows(40, 1)
    assert sum(map(len, drawn(given, 1000, 3))) == sum(len(one.ids) - 1 for one in given)
    first, second = (b"".join(part.tobytes() for part in drawn(given, 1000, seed)) for seed in (3, 4))
    assert first != second
    assert [len(part) for part in drawn([row(range(100), 1), row(range(100), 1), row([5], 1)], 150, 3)] == [99, 51]
    assert [enough(trained) for trained in (0, 16_000, 1e9)] == [256, 1000, 8192]


def test_a_mixture_is_known_by_its_tensors() -> None:
    experts = {"model.layers.0.mlp.experts.0.up_proj.weight": (6, 4)}
    joined: dict[str, tuple[int, ...]] = {"model.layers.0.block_sparse_moe.input_linear.weight": (2, 12, 4)}
    assert mixture_tensors(experts | {"model.norm.weight": (4,)}) == [*experts]
    assert mixture_tensors(joined) == [*joined]
    assert not mixture_tensors({"model.layers.0.mlp.up_proj.weight": (6, 4)})


@pytest.mark.parametrize("found", [compared(EVEN, SKEWED, 100, "training"), ExpertsRecord(why="layer 3 is odd")])
def test_the_page_and_the_card_say_it(found: ExpertsRecord, tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", experts=found))
    facts = run.read_report_facts().model_copy(update={"experts": LoadFacts(before=EVEN, after=SKEWED)})
    run.write_report_facts(facts if found.before else run.read_report_facts())
    english, japanese = (write_report(run, lang).read_text(encoding="utf-8") for lang in ("en", "ja"))
    tuned = finished_run(tmp_path / "tuned")
    assert "## Experts" not in card(Run(tuned), ["adapter"])
    Run(tuned).update(experts=found)
    text = card(Run(tuned), ["adapter"])
    if not found.before:
        assert "It was not measured: layer 3 is odd" in english
        assert "was not measured" in text
        return
    for said in ("2 of 4 experts are chosen for each token, in 2 layers", "put 1 of 8 experts out of use", "25.0%"):
        assert said in english
        assert said in text
    assert "| busiest expert, times an even share | 2.00 | 3 | 1.98 | 0 |" in text
    assert ">1.98</td>" in english
    assert "20.0%" in english  # of layer 3, which only the page has
    for said in ("学習用の行の 100 トークン", "8 個のエキスパートのうち 1 個", "最大(学習前)"):
        assert said in japanese


def test_a_strangers_loads_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", experts=compared(EVEN, SKEWED, 100, "training")))
    odd = LoadFacts(before={0: [1, 2], 1: [], 2: [0, 0]}, after={0: [1], 1: [], 2: [0, 0], 7: [3]})
    run.write_report_facts(run.read_report_facts().model_copy(update={"experts": odd}))
    page = write_report(run).read_text(encoding="utf-8")
    assert page[page.index("expert-layers") :].split("</table>")[0].count("<tr>") == 2  # the head and layer 2


def test_its_sentences_are_japanese() -> None:
    in_japanese(compared(EVEN, SKEWED, 100, "training").warning)
    for why in (
        "layer 3 has more than one mixture of experts",
        "the mixture in layer 3 does not say which experts it chooses",
        "the library's layers name no experts that a router chooses",
        "a library's layers could not be read",
    ):
        in_japanese(why)


# --- in a run


class Mixture(Bigram):
    """Its experts are chosen as in EVEN until the first step, then as in SKEWED. measured: a matrix, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.measured: list[np.ndarray] = []

    def expert_load(self, rows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        self.rows = rows
        self.measured.append(self.parameters[f"{self.layer}.lora_B"].copy())
        return {layer: np.array(counts) for layer, counts in (SKEWED if self.calls else EVEN).items()}

    def generate(self, token_ids: np.ndarray, *args: Any, **more: Any) -> Iterator[int]:
        yield 5 + int(token_ids.sum()) % 40  # answers that end, and differ


class Silent(Bigram):
    pass


class Failing(Bigram):
    def expert_load(self, rows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        raise RuntimeError("a library's own words")


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.chdir(tmp_path)
    return Options.model_validate(
        {
            **{"model": str(tiny_llama), "data": str(write_rows(tmp_path / "rows.jsonl")), "output": "run"},
            **{"backend": "torch", "device": "cpu", "precision": "fp32", "export": "none", "steps": 3},
        }
    )


def trained(given: Options, backend: Bigram, monkeypatch: pytest.MonkeyPatch, mixture: bool = True) -> Run:
    monkeypatch.setattr(ExpertWatch, "_is_mixture", lambda self: mixture)
    return Run(run_training(given, context("plain", lambda: backend)))


class Worse(Mixture):
    """Each validation is worse than the one before."""

    def eval_step(self, batch: Batch) -> StepResult:
        return StepResult.of([batch], (1.0 + len(self.calls)) * batch.label_tokens, 0.0, 0)


def test_it_is_that_of_the_adapter_that_is_kept(given: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Worse()
    run = trained(given.model_copy(update={"eval_every": 1}), backend, monkeypatch)
    assert run.record.exported_step == 1
    before, after = backend.measured
    assert not before.any()
    assert np.array_equal(after, read_peft(run.adapter).weights[backend.layer].B)


def test_a_run_has_it_on_record(given: Options, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    backend = Mixture()
    run = trained(given, backend, monkeypatch)
    found = run.record.experts
    assert found is not None
    assert (found.rows, found.fallen, found.tokens) == ("validation", [(0, 3)], sum(map(len, backend.rows)))
    assert run.read_report_facts().experts == LoadFacts(before=EVEN, after=SKEWED)
    out, err = capsys.readouterr()
    assert "load of the experts: " in out + err
    assert "training has put 1 of 8 experts out of use" in out + err
    assert run.record.status == "complete"
    assert not run.record.alarms  # no reason to roll back
    assert "expert-layers" in run.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("backend", "why"), [(Silent(), "there are none"), (Failing(), "a library's layers could not be read")]
)
def test_a_failure_costs_no_training(
    backend: Bigram, why: str, given: Options, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained(given, backend, monkeypatch)
    assert run.record.experts == ExpertsRecord(why=why)
    assert run.record.status == "complete"
    out, err = capsys.readouterr()
    assert f"load of the experts: not measured ({why})" in out + err
    assert ("a library's own words" in out + err) == isinstance(backend, Failing)


def test_a_model_without_experts_is_not_asked(given: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(run_training(given, context("quiet", Failing)))
    assert run.record.experts is None
    assert "experts" not in run.record.stage_seconds


def test_an_adapter_that_peft_does_not_load_is_told(
    given: Options, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained(given, Mixture(), monkeypatch)  # its MLP's gate_proj is no expert's
    assert run.record.left_out_by_peft
    out, err = capsys.readouterr()
    assert "PEFT 0.21.2 does not load all of adapter/" in out + err


@pytest.mark.parametrize(
    ("kind", "modules", "left_out"),
    [
        ("qwen3_moe", ["self_attn.q_proj", "mlp.experts.0.gate_proj"], False),
        ("deepseek_v3", ["self_attn.o_proj", "mlp.shared_experts.gate_proj"], True),
        ("qwen2_moe", ["mlp.shared_expert.gate_proj"], False),
        ("qwen2_moe", ["mlp.experts.0.gate_proj"], True),
    ],
)
def test_what_peft_leaves_out(kind: str, modules: list[str], left_out: bool) -> None:
    assert left_out_by_peft(kind, [f"model.layers.0.{name}" for name in modules]) == left_out
