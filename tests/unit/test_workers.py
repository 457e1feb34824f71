"""One training on several computers: coordinator and workers in one process, over a real line."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cli
from common.backend import Batch, OutOfMemory
from common.commands import worker as command
from common.data.batching import micro_batches, single_rows
from common.errors import UserError
from common.options import Options
from common.training.checkpoint import State
from common.training.dealing import deal_by_speed, regrouped
from common.training.loop import TrainingLoop
from common.training.messages import adapter_parts, batch_arrays, decoded, encoded
from common.training.shared_backend import SharedPackage
from common.training.transport import SECRET, Line, grpc, secret, serve
from common.training.worker import Worker
from tests.backends import Quiet
from tests.contexts import context
from tests.unit.bigram import LAYER, Bigram, PartBigram, plan, recipe, rows
from tests.unit.test_ranks import start

SHARED = "a secret that nobody guesses"


class Package:
    memory_terms = SimpleNamespace(loss_chunk=lambda vocabulary, device: 64)
    fault = choose_device = choose_precision = quantization_scheme = is_deterministic = plain_layers = None

    def __init__(self, **settings: Any) -> None:
        self.settings, self.created = settings, list[PartBigram]()

    def create(self) -> PartBigram:
        self.created.append(PartBigram(**self.settings))
        return self.created[-1]

    def free_memory(self, device: str) -> tuple[int, str]:
        return 10**9, "the free memory"


class Here:
    """A worker of this process. fails_at: the step that it cannot compute."""

    def __init__(self, folder: Path, fails_at: int = 0, **settings: Any) -> None:
        self.package, self.said, self.fails_at = Package(**settings), list[str](), fails_at
        self.worker = Worker(self.package, "mlx", "cpu", lambda recipe: folder, self.said.append)
        self.server, port = serve(self.answer, "127.0.0.1:0", SHARED)
        self.address = f"127.0.0.1:{port}"

    def answer(self, data: bytes) -> bytes:
        message = decoded(data)
        if message.kind == "gradients" and message.values["step"] == self.fails_at:
            self.fails_at = 0
            raise RuntimeError("an unknown fault")
        return self.worker.answer(data)

    @property
    def computed(self) -> list[int]:
        return [count for model in self.package.created for count in model.computed]


@pytest.fixture
def worker(tiny_llama: Path) -> Iterator[Callable[..., Here]]:
    made = []

    def make(**settings: Any) -> Here:
        made.append(Here(tiny_llama, **settings))
        return made[-1]

    yield make
    for one in made:
        one.server.stop(0).wait()


class Noted:
    """A display of which only these are used."""

    def __init__(self, said: list[str]) -> None:
        self.say = self.warn = said.append


def trained(backend: Any, run: Path) -> tuple[State, Any]:
    run.mkdir()
    some, chosen = recipe(batch_size=8), plan()
    backend.load(some, chosen, Path("here"), start())
    state = State.before_training(chosen)
    TrainingLoop(backend, some, chosen, rows(20, 1), rows(7, 2), run, state, Quiet()).train()
    adapter = backend.get_adapter()
    backend.close()
    return state, adapter


def shared(addresses: Sequence[str], said: list[str]) -> Any:
    return SharedPackage(Package(), [Line(address, SHARED) for address in addresses], Noted(said)).create()


@pytest.mark.parametrize("count", [1, 3])
def test_workers_change_no_more_than_rounding(count: int, worker: Callable[..., Here], tmp_path: Path) -> None:
    expected, adapter = trained(Bigram(), tmp_path / "alone")
    workers, said = [worker() for _ in range(count)], list[str]()
    backend = shared([one.address for one in workers], said)
    state, found = trained(backend, tmp_path / "together")
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    for name, array in adapter.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, atol=1e-6)
    assert sorted(said) == sorted(f"{one.address} helps: mlx on cpu" for one in workers)
    assert all(sum(one.computed) > 0 for one in workers)
    shares = backend.shares()
    assert [share["who"] for share in shares] == ["here", *(one.address for one in workers)]
    assert sum(share["tokens"] for share in shares) == expected.tokens
    assert all(one.package.created[0].closed for one in workers)


def test_a_worker_that_fails_costs_one_step_and_comes_again(
    worker: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.shared_backend._RETRY", 0)
    expected, _ = trained(Bigram(), tmp_path / "alone")
    one, said = worker(fails_at=1), list[str]()
    state, _ = trained(shared([one.address], said), tmp_path / "together")
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    assert said[:2] == [f"{one.address} helps: mlx on cpu", f"{one.address} does not help: unknown"]
    assert said[2:] in ([], [f"{one.address} helps: mlx on cpu"])  # as the few steps left allow


@pytest.mark.parametrize(("given", "why"), [("another secret, as long", f"another {SECRET}"), (SHARED, "reached")])
def test_why_a_worker_does_not_help(given: str, why: str, worker: Callable[..., Here], tmp_path: Path) -> None:
    one, said = worker(), list[str]()
    address = one.address
    if given == SHARED:
        one.server.stop(0).wait()
    backend = SharedPackage(Package(), [Line(address, given)], Noted(said)).create()
    trained(backend, tmp_path / "run")
    assert len(said) == 1
    assert why in said[0]
    assert not one.package.created


def test_a_worker_with_another_model_does_not_help(worker: Callable[..., Here], tmp_path: Path) -> None:
    one, said = worker(), list[str]()

    def base(given: Any) -> Path:
        raise UserError("some/model is another model here.", "Give the same.")

    one.worker.base = base
    trained(shared([one.address], said), tmp_path / "run")
    assert said == [f"{one.address} does not help: some/model is another model here."]


def test_a_worker_helps_one_training_at_a_time(worker: Callable[..., Here]) -> None:
    one = worker()
    values, arrays = adapter_parts(start())
    told = {"recipe": recipe().content(), "micro_batch_tokens": 64, "adapter": values}
    kinds = []
    told["backend"] = "torch"
    for session in ("first", "second", "first"):
        kinds.append(decoded(one.worker.answer(encoded("load", told | {"session": session}, arrays))).kind)
    assert kinds == ["ready", "fault", "ready"]
    one.worker._asked -= 100
    assert decoded(one.worker.answer(encoded("load", told | {"session": "second"}, arrays))).kind == "ready"
    late = decoded(one.worker.answer(encoded("gradients", {"session": "first"}, {})))
    assert (late.kind, late.values["what"]) == ("fault", "it helps another training now")


def test_a_worker_cuts_finer_where_its_memory_is_short(worker: Callable[..., Here], tmp_path: Path) -> None:
    expected, _ = trained(Bigram(), tmp_path / "alone")
    one, said = worker(memory_limit=14), list[str]()
    state, _ = trained(shared([one.address], said), tmp_path / "together")
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    assert said == [f"{one.address} helps: mlx on cpu"]
    assert any("memory ran out" in text for text in one.said)


def test_a_worker_without_memory_for_one_row_costs_one_step_and_is_left_out(
    worker: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.shared_backend._RETRY", 0)
    expected, _ = trained(Bigram(), tmp_path / "alone")
    one, said = worker(memory_limit=2), list[str]()
    backend = shared([one.address], said)
    state, _ = trained(backend, tmp_path / "together")
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    why = "its memory does not suffice, even for one row at a time; it is not asked again"
    assert said == [f"{one.address} helps: mlx on cpu", f"{one.address} does not help: {why}"]
    assert [model.closed for model in one.package.created] == [True]
    assert len(backend.local.computed) == recipe(batch_size=8).steps + 1


def test_a_worker_that_cannot_load_the_model_is_asked_once(
    worker: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.shared_backend._RETRY", 0)
    one, said, asked = worker(), list[str](), list[Path]()

    def load(self: PartBigram, some: Any, chosen: Any, folder: Path, adapter: Any) -> None:
        asked.append(folder)
        raise OutOfMemory

    one.package.create = type("Large", (PartBigram,), {"load": load})
    trained(shared([one.address], said), tmp_path / "run")
    assert (len(said), len(asked)) == (1, 1)
    assert "its memory does not suffice" in said[0]


def test_a_worker_with_one_long_row_computes_each_layer_twice(worker: Callable[..., Here], tmp_path: Path) -> None:
    one, plans = worker(), []

    class Short(PartBigram):
        """Memory for any row with gradient checkpointing, and for none without."""

        def accumulate(self, some: Sequence[Batch], weight: float, step: int) -> int:
            if some and not self.plan.gradient_checkpointing:
                raise OutOfMemory
            return super().accumulate(some, weight, step)

        def apply_plan(self, plan: Any) -> None:
            plans.append(plan)
            super().apply_plan(plan)

    one.package.create = Short
    said = list[str]()
    state, _ = trained(shared([one.address], said), tmp_path / "together")
    assert state.train_loss == pytest.approx(trained(Bigram(), tmp_path / "alone")[0].train_loss, rel=1e-6)
    assert said == [f"{one.address} helps: mlx on cpu"]
    assert [plan.gradient_checkpointing for plan in plans] == [True]


def test_a_quantized_base_needs_a_worker_of_the_same_backend(worker: Callable[..., Here]) -> None:
    one, (values, arrays) = worker(), adapter_parts(start())
    told = {"session": "s", "recipe": recipe(quantization="nf4").content(), "micro_batch_tokens": 64, "adapter": values}
    answer = decoded(one.worker.answer(encoded("load", told | {"backend": "torch"}, arrays)))
    assert (answer.kind, answer.values["what"]) == ("fault", "the base is quantized by torch (nf4), and this is mlx")
    assert decoded(one.worker.answer(encoded("load", told | {"backend": "mlx"}, arrays))).kind == "ready"


def test_a_message_of_another_version_is_answered(worker: Callable[..., Here]) -> None:
    one = worker()
    answer = decoded(one.worker.answer(encoded("load", {"session": "s", "recipe": {"new": 1}}, {})))
    assert (answer.kind, answer.values["fix"]) == ("fault", "Give both sides the same version.")


def test_a_training_that_begins_again_has_its_workers_again(worker: Callable[..., Here], tmp_path: Path) -> None:
    one, said = worker(), list[str]()
    package = SharedPackage(Package(), [Line(one.address, SHARED)], Noted(said))
    for name in ("first", "second"):  # as after a rollback
        trained(package.create(), tmp_path / name)
    assert said == [f"{one.address} helps: mlx on cpu"] * 2


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({f"a:{LAYER}.lora_A": np.zeros((3, 6), "float32")}, "other tensors"),
        ({"b:0.input_ids": np.full((1, 3), 10**6, "int32")}, "a token that the model has not"),
    ],
)
def test_a_worker_computes_only_what_fits(changed: dict, what: str, worker: Callable[..., Here]) -> None:
    one, adapter = worker(), start()
    values, arrays = adapter_parts(adapter)
    told = {"session": "s", "recipe": recipe().content(), "micro_batch_tokens": 64, "adapter": values}
    one.worker.answer(encoded("load", told, arrays))
    (batch,) = micro_batches(rows(1, 3), 64)
    sent = {f"a:{n}": a for n, a in arrays.items()} | {f"b:{n}": a for n, a in batch_arrays([batch]).items()}
    asked = encoded("gradients", {"session": "s", "step": 1, "weight": 1.0, "ranks": [1]}, sent | changed)
    answer = decoded(one.worker.answer(asked))
    assert answer.kind == "fault"
    assert what in answer.values["what"]


def test_rows_are_dealt_by_speed() -> None:
    batches = micro_batches(rows(60, 4), 100)
    shares = deal_by_speed(batches, [3.0, 1.0, 0.0])
    tokens = [sum(batch.tokens for batch in share) for share in shares]
    assert sum(tokens) == sum(batch.tokens for batch in batches)
    assert tokens[0] / tokens[1] == pytest.approx(3, rel=0.1)
    assert not shares[2]
    assert {batch.rank for batch in shares[1]} == {1}
    assert max(batch.input_ids.size for share in shares for batch in share) <= 100
    weights = sum(float(batch.loss_weights.sum()) for share in shares for batch in share)
    assert weights == sum(float(batch.loss_weights.sum()) for batch in batches)


def test_rows_that_are_grouped_again_are_the_same() -> None:
    (batch,) = micro_batches(rows(9, 2), 1000)
    again = regrouped(single_rows(batch), 1000)
    assert [part.lengths.tolist() for part in again] == [batch.lengths.tolist()]
    for name in ("input_ids", "targets", "loss_weights"):
        assert np.array_equal(getattr(again[0], name), getattr(batch, name))


@pytest.mark.parametrize("given", ["", "short", "日本語の合言葉は長くても駄目です。", "long enough, but a line\r\n"])
def test_a_secret_that_can_be_guessed_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {SECRET: given})
    with pytest.raises(UserError, match=f"{SECRET} is not set, or has fewer than 16"):
        secret()


@pytest.mark.parametrize("given", ["localhost", "http://box:1", "box:", "box:123456", "a b:1"])
def test_an_address_is_host_and_port(given: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Options.model_validate({"with": [given]})


def test_what_workers_cannot_help_with() -> None:
    with pytest.raises(ValueError, match="devices and with cannot be combined"):
        Options.model_validate({"with": ["box:1"], "devices": "2"})
    with pytest.raises(ValueError, match="with cannot be combined with method full"):
        Options.model_validate({"with": ["box:1"], "method": "full"})


@pytest.mark.parametrize("host", ["192.0.2.1", "[192.0.2.1]"])
def test_a_host_that_is_not_this_machine_is_said(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, SHARED)
    args = cli.build_parser("worker").parse_args(["worker", "--host", host])
    with pytest.raises(UserError, match=r"--port 7070 on 192\.0\.2\.1 cannot be used: .*Cannot assign"):
        command.run(args, context())


def test_a_port_that_is_taken_is_said(worker: Callable[..., Here]) -> None:
    with pytest.raises(UserError, match="is not free"):
        serve(lambda data: data, worker().address, SHARED)


def test_the_extra_is_named_where_grpc_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(UserError, match="grpcio is not installed") as caught:
        grpc()
    assert caught.value.fix == 'pip install "twintune[workers]", or in a checkout: pip install -e ".[workers]"'
