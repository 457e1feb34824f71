"""Micro-batches padded for CUDA graphs and a CPU's bf16 products, and what is replayed on a GPU."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.backend import Batch, OutOfMemory
from common.data.batching import make_batch, micro_batches, step_rows
from common.memory_terms import MicroBatchShape as Shape
from common.training.planner import Work
from tests import backends
from tests.tiny import write_family, write_rows
from tests.unit.bigram import RECIPE
from tests.unit.test_layouts import chat_rows, encoded
from torch_backend import attention, cuda_graphs
from torch_backend import forward as forward_module
from torch_backend.cuda_graphs import Layout
from torch_backend.loss import loss_of, loss_sum

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return backends.encode_rows(model, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


def row_by_row(query, key, value, scaling, rows, window):
    """What `_flash` computes, without its kernel."""
    found = []
    for start, end in zip(rows.cu_seqlens[:-1].tolist(), rows.cu_seqlens[1:].tolist(), strict=True):
        assert end - start <= rows.width
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        positions = torch.arange(end - start)
        distance = positions[:, None] - positions
        seen = (distance >= 0) & (distance < (window or end + 1))
        found.append(functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True))
    assert end == query.shape[2], "every token must belong to a row: what no row holds is never written"
    return torch.cat(found, 2).transpose(1, 2)


@pytest.mark.cpu
def test_what_a_graph_is_padded_with_adds_nothing(model, rows, monkeypatch):
    monkeypatch.setattr(attention, "_flash", row_by_row)
    backend = backends.load("torch", model, backends.make_recipe(model, lora_plus=2.0))
    for parameter in backend.parameters.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = make_batch(backends.weighted(rows[:3]))
    layout = Layout.of(batch.shape)
    assert layout.tokens > batch.tokens
    assert layout.labels > batch.label_tokens
    assert layout.rows > 3
    found = []
    for loss in (
        loss_sum(backend.model, batch, backend.device, 7, False),
        loss_of(backend.model, layout.unpack(torch.from_numpy(layout.pack(batch))), 7),
        loss_sum(backend.model, batch, backend.device, 7, False, 16),
    ):
        backend.optimizer.zero_grad()
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in backend.parameters.items()}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)
    backend.close()


class Unrecorded(cuda_graphs.Graphs):
    """With a stand-in for a graph."""

    def _record(self, layout):
        self.recorded.append(layout)
        return torch.zeros(sum(layout.sizes()), dtype=torch.int64), self

    def replay(self):
        self.replayed += 1


@pytest.fixture
def unrecorded(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    made = Unrecorded(lambda packed: made.stepped.append(packed), torch.device("cpu"))
    made.stepped, made.recorded, made.replayed = [], [], 0
    return made


@pytest.mark.cpu
def test_the_first_micro_batch_warms_up_and_graphs_are_few(unrecorded, monkeypatch):
    random = np.random.default_rng(0)

    def run(count, least, most):
        for _ in range(count):
            lengths = np.sort(random.integers(least, most, 8)).astype(np.int32)
            ids = np.ones((8, lengths[-1]), np.int32)
            weights = (np.arange(lengths[-1]) < lengths[:, None]).astype(np.float32)
            unrecorded.run(Batch(ids, ids, weights, lengths))

    def fails(packed):
        raise RuntimeError("out of memory")

    good, unrecorded.step = unrecorded.step, fails
    with pytest.raises(RuntimeError):
        run(1, 100, 200)
    unrecorded.step = good
    run(1, 100, 200)
    assert (len(unrecorded.stepped), unrecorded.recorded) == (1, []), "nothing is recorded cold"
    run(300, 20, 500)
    assert unrecorded.replayed == 300
    assert len(unrecorded.recorded) < 30
    monkeypatch.setattr(cuda_graphs, "_KEPT", 3)
    unrecorded.graphs.clear()
    run(60, 20, 500)
    assert len(unrecorded.graphs) == 3
    assert len(unrecorded.stepped) == 1


@pytest.mark.cpu
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_a_run_records_at_most_eight_graphs_and_pads_little(unrecorded, spread):
    rows, recipe = chat_rows(400, spread), RECIPE.model_copy(update={"steps": 1000, "batch_size": 16})
    shapes = Work.of(rows, recipe).shapes_of(1000, 4096, "cuda")
    assert len({Layout.of(own) for own in shapes}) > 25
    unrecorded.expect(shapes)
    tokens = padded = 0
    for step in range(1, 101):
        chosen = [rows[i] for i in step_rows(len(rows), 16, recipe.seed, step)]
        for batch in micro_batches(chosen, 4096, "cuda"):
            unrecorded.run(batch)
            tokens, padded = tokens + batch.tokens, padded + unrecorded.layout(batch).tokens
    assert len(unrecorded.recorded) <= 8
    assert len(unrecorded.stepped) == 1, "the first one alone runs without a graph"
    assert padded < 1.2 * tokens
    unrecorded.run(make_batch(encoded(np.full(40, 500))))
    assert len(unrecorded.stepped) == 2, "nor does one that is larger than all that were expected"
    assert len(unrecorded.recorded) <= 8


def test_a_short_run_records_fewer_graphs():
    few, many = Counter({Shape(8, 200, 1000, 400): 3, Shape(8, 400, 2000, 800): 3}), Counter[Shape]()
    for own in few:
        many[own] = 1000
    assert cuda_graphs.choose_layouts(few) == [Layout(2048, 1024, 8, 2048)]
    assert len(cuda_graphs.choose_layouts(many)) == 2
    assert cuda_graphs.choose_layouts(Counter()) == []


class Replayed(cuda_graphs.Graphs):
    """Whose graphs compute again what they are recorded with."""

    def _record(self, layout):
        memory = torch.zeros(sum(layout.sizes()), dtype=torch.int64)
        return memory, SimpleNamespace(replay=lambda: self.step(layout.unpack(memory)))


@pytest.mark.cpu
def test_padding_to_the_sizes_of_a_run_changes_no_loss(model, rows, unrecorded, monkeypatch):
    monkeypatch.setattr(attention, "_flash", row_by_row)
    recipe, losses = backends.make_recipe(model), []
    for graphed in (True, False):
        backend = backends.load("torch", model, recipe)
        if graphed:
            graphs = backend.graphs = Replayed(backend._micro_step, backend.device)
            backend.expect(lambda: Work.of(rows, recipe).shapes_of(recipe.steps, 300, "cpu"))
        losses.append(backends.run_steps(backend, recipe, rows, recipe.steps))
        backend.close()
    assert 0 < len(graphs.graphs) <= 8
    assert len(graphs.layouts) <= 8
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.cpu
@pytest.mark.parametrize("held", [False, True])
def test_validation_is_tried_again_without_the_graphs_memory(model, rows, monkeypatch, held):
    backend = backends.load("torch", model, backends.make_recipe(model))
    batch = make_batch(rows[:2])
    expected = float(backend.eval_step(batch).loss_sum)
    backend.graphs = cuda_graphs.Graphs(lambda packed: None, backend.device)
    if held:
        backend.graphs.graphs[Layout(1, 1, 1, 1)] = (torch.zeros(1), None)
    real, calls = forward_module.loss_sum, []

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(forward_module, "loss_sum", fails_once)
    if held:
        assert float(backend.eval_step(batch).loss_sum) == expected
    else:
        with pytest.raises(OutOfMemory):
            backend.eval_step(batch)
    assert backend.graphs.graphs == {}
    backend.close()


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_graph_computes_what_the_model_does(model, rows, checkpointing, quantization, monkeypatch):
    recipe = backends.make_recipe(model, precision="bf16", quantization=quantization)
    found, recorded = [], []
    real = cuda_graphs.Graphs._record
    monkeypatch.setattr(cuda_graphs.Graphs, "_record", lambda *a: recorded.append(1) or real(*a))
    for graphed in (True, True, False):
        backend = backends.load("torch", model, recipe, gradient_checkpointing=checkpointing)
        assert backend.graphs is not None
        backend.expect(lambda: Work.of(rows, recipe).shapes_of(8, 300, "cpu"))
        if not graphed:
            backend.graphs = None
        losses = []
        for step in range(1, 9):
            chosen = [rows[i] for i in step_rows(len(rows), 4, 0, step)]
            result = backend.train_step(micro_batches(chosen, 300), 1e-3, step)
            losses.append(float(result.loss_sum) / result.weight_sum)
        found.append((losses, backends.matrices(backend)))
        backend.close()
    assert 0 < len(recorded) <= 16, "at most eight in each of two runs"
    assert found[0][0] == found[1][0]
    assert backends.relative_difference(found[0][1], found[1][1]) == 0, "the same run twice, to the last bit"
    np.testing.assert_allclose(found[0][0], found[2][0], rtol=1e-2)
    assert found[0][0][-1] < found[0][0][0]


@pytest.mark.gpu
def test_out_of_memory_while_a_graph_is_recorded_is_told_and_the_step_can_be_done_again(model, rows, monkeypatch):
    recipe = backends.make_recipe(model, precision="bf16")
    backend = backends.load("torch", model, recipe)
    batches = micro_batches(rows[:4], 300)
    backend.train_step(batches, 1e-3, 1)
    real, calls = backend._micro_step, []

    def fails(packed):
        calls.append(1)
        real(packed)
        torch.empty(2**50, device="cuda")

    backend.graphs.step = fails
    with pytest.raises(OutOfMemory):
        backend.train_step(batches, 1e-3, 2)
    assert calls
    backend.graphs.step = real
    backend.apply_plan(backend.plan)
    result = backend.train_step(batches, 1e-3, 2)
    assert np.isfinite(float(result.loss_sum))
    backend.close()
