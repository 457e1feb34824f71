"""A step as a GPU computes it: two compiled functions, few shapes, few operations beside the model's own."""

import io
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from common.backend import OutOfMemory
from common.data.batching import make_batch, micro_batches, step_rows
from common.data.layouts import _chosen
from common.memory_terms import MicroBatchShape
from common.training.checkpoint import State
from common.training.loop import TrainingLoop
from common.training.planner import Work
from common.training.validation import evaluate
from mlx_backend.trained import Trained
from tests import ROOT, backends
from tests.tiny import write_family, write_model, write_rows
from tests.unit.bigram import row
from tests.unit.test_layouts import chat_rows

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "data"
LAYOUT = MicroBatchShape(5, 128, 512, 256)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return backends.encode_rows(model, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


@pytest.fixture
def compiled():
    """Compiling on, as on a GPU; loading a backend on a CPU turns it off, so it is a function to call after that."""
    yield mx.enable_compile
    mx.enable_compile()


def trained(backend, rows, steps=3):
    results = [backend.train_step(micro_batches(rows[:4], 300), 1e-2, step) for step in range(1, steps + 1)]
    figures = [(float(result.loss_sum), float(result.grad_norm)) for result in results]
    return figures, backend.get_adapter().arrays(), float(backend.eval_step(make_batch(rows[4:7])).loss_sum)


@pytest.mark.parametrize("changes", [{}, {"method": "dora"}, {"dropout": 0.3}, {"lora_plus": 4.0, "weight_decay": 0.1}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layouts_and_compiling_change_no_figure(model, rows, changes, checkpointing, compiled):
    recipe, found = backends.make_recipe(model, **changes), []
    for layouts, compile_ in (([], False), ([LAYOUT], False), ([], True)):
        backend = backends.load("mlx", model, recipe, gradient_checkpointing=checkpointing)
        backend.layouts = layouts if not changes.get("dropout") else []  # the masks of other shapes are others
        if compile_:
            compiled()
        found.append(trained(backend, rows))
        backend.close()
    for figures, adapter, loss in found[1:]:
        assert np.allclose(figures, found[0][0], rtol=1e-5)
        assert abs(loss / found[0][2] - 1) < 1e-5
        for name, array in adapter.items():
            assert np.allclose(array, found[0][1][name], rtol=1e-3, atol=1e-5), name


def nodes(*outputs):
    """How many operations compute these arrays."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs)
    return graph.getvalue().count("shape=rectangle")


def test_the_operations_of_an_update_do_not_depend_on_how_many_modules_are_adapted(model, rows):
    found = {}
    for targets in (["q_proj"], ["all-linear"]):
        backend = backends.load("mlx", model, backends.make_recipe(model, targets=targets))
        gradients = [mx.ones_like(tensor) for tensor in backend.tensors]
        mx.eval(gradients)
        tensors, states, norm = backend.update(
            backend.tensors, backend.states, gradients, mx.array(3.0), mx.array(1e-2)
        )
        moments = [array for _, array in tree_flatten(states)]
        found[targets[0]] = nodes(*tensors, *moments, norm)
        assert len(backend.tensors) == 1
        backend.close()
    assert found["q_proj"] == found["all-linear"] < 80


def test_the_operations_of_a_gradient_do_not_grow(model, rows):
    """Of two layers and their 14 adapted matrices, forwards and backwards: 893 with MLX 0.32.4."""
    backend = backends.load("mlx", model, backends.make_recipe(model))
    backend.model.train()
    (inputs,) = backend.forward.inputs(make_batch(rows[:4]), backend.layouts)
    loss, gradients = backend.gradient(backend.tensors, inputs, mx.random.key(0))
    assert (len(backend.model.layers), len(backend.layers), len(gradients)) == (2, 14, 1)
    assert nodes(loss, *gradients) < 940
    backend.close()


def test_a_compiled_step_puts_arrays_into_the_model_only_while_it_is_traced(model, rows, compiled, monkeypatch):
    backend = backends.load("mlx", model, backends.make_recipe(model))
    compiled()
    put = []
    monkeypatch.setattr(
        "mlx_backend.trained.setattr", lambda *given: put.append(given) or setattr(*given), raising=False
    )
    trained(backend, rows, 1)
    assert put
    put.clear()
    for step in (2, 3):
        backend.train_step(micro_batches(rows[:4], 300), 1e-2, step)
    assert len(put) == len(backend.trained.cut(backend.tensors)), "what the validation was traced with is let go, once"
    backend.close()


def test_a_gpu_computes_rounded_shapes_without_layouts_too(gpu, tmp_path):
    """Of a model whose longer rows rotate by other frequencies: rounding makes no row such a one."""
    model = write_family(tmp_path / "phi3", "phi3")
    rows = backends.encode_rows(model, write_rows(tmp_path / "rows.jsonl"))
    found = []
    for device in ("cpu", "gpu"):
        backend = backends.load("mlx", model, backends.make_recipe(model), device=device)
        limit = backend.model.forward_config.rope_split
        batch = make_batch([*rows[:4], row([5] * (limit - 10), 9)])
        parts = backend.forward.inputs(batch, backend.layouts)
        rounded = [part.width % 128 == 0 or part.width == limit for part in parts]
        assert (all(rounded), len(parts)) == (device == "gpu", 2)
        found.append(float(backend.eval_step(batch).loss_sum))
        backend.close()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_validation_that_runs_out_of_memory_is_repeated_in_smaller_shapes(model, rows, monkeypatch):
    def fails(*given):
        raise RuntimeError("[malloc_or_wait] Unable to allocate 9 bytes.")

    backend = backends.load("mlx", model, backends.make_recipe(model))
    backend.layouts = [LAYOUT]
    monkeypatch.setattr(backend, "loss", fails)
    with pytest.raises(OutOfMemory):
        backend.eval_step(make_batch(rows[:2]))
    assert backend.layouts == []
    backend.close()


def test_the_gradient_of_a_joined_tensor_is_concatenated(model):
    """MLX makes more than ten parts by slicing: the gradient of each slice would be as long as the tensor."""
    names = [f"{number}" for number in range(420)]
    module = nn.Module()
    for name in names:
        setattr(module, name, mx.ones((3, 2)))
    joined = Trained(module, {name: name for name in names}, [names], join=True, stacks={})
    (tensor,) = joined.read()
    weights = {name: float(name) for name in names}
    gradient = mx.grad(lambda t: sum(weights[name] * part.sum() for name, part in joined.cut([t]).items()))(tensor)
    graph = io.StringIO()
    mx.export_to_dot(graph, gradient)
    assert "SliceUpdate" not in graph.getvalue()
    assert 0 < graph.getvalue().count("Concatenate") < 105
    assert np.array_equal(np.array(gradient), np.repeat([weights[name] for name in names], 6))


@pytest.fixture
def gpu(monkeypatch):
    """MLX's CPU takes the part of its GPU: steps are compiled, and their errors come late."""
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    _chosen.cache_clear()
    yield
    _chosen.cache_clear()


def counted(backend):
    """By compiled function, the shapes that it was traced for; of an update None."""
    traces = {"gradient": [], "loss": [], "update": []}
    loss, update = backend._loss, backend.optimizer.update

    def traced_loss(tensors, inputs):
        traces["gradient" if backend.model.training else "loss"].append(inputs.shape)
        return loss(tensors, inputs)

    def traced_update(*given):
        traces["update"].append(None)
        return update(*given)

    backend._loss, backend.optimizer.update = traced_loss, traced_update
    backend.apply_plan(backend.plan)
    return traces


@pytest.fixture(scope="module")
def example(model):
    """The built-in example's rows, to train on and to validate on; of these one is three times as long as any."""
    rows, valid = (backends.encode_rows(model, EXAMPLE / f"{name}.jsonl") for name in ("train", "valid"))
    ids, loss_weights = (np.tile(array, 3) for array in (rows[0].ids, rows[0].loss_weights))
    return rows, [*valid, replace(rows[0], ids=ids, loss_weights=loss_weights)]


def test_each_function_of_a_run_is_traced_once_for_each_of_few_layouts(model, example, gpu, tmp_path, monkeypatch):
    """Validations too, of which the first is before the first step: their micro-batches have many times a step's rows.

    Nor does that change their losses.
    """
    monkeypatch.setattr("common.data.layouts._LAYOUT_COST", 300)  # of so few steps few layouts would be chosen
    recipe = backends.make_recipe(model, steps=16, eval_every=8, learning_rate=1e-3, rank=2)
    plan = backends.make_plan("mlx", device="gpu", micro_batch_tokens=4000)
    backend = backends.load("mlx", model, recipe, device="gpu")
    traces, (rows, valid) = counted(backend), example
    state = State.before_training(plan)
    TrainingLoop(backend, recipe, plan, rows, valid, tmp_path, state, backends.Quiet()).train()
    layouts, adapter = backend.layouts, backend.get_adapter().copied()
    backend.close()
    assert 2 < len(layouts) <= 8
    for name in ("gradient", "loss"):
        assert 1 < len(traces[name]) == len({*traces[name]})
        assert {*traces[name]} <= {*layouts}
    assert traces["update"] == [None]
    plain = backends.load("mlx", model, recipe)
    batches = micro_batches(valid, 4000)
    assert max(len(batch.lengths) for batch in batches) > 2 * max(layout.rows for layout in layouts)
    assert evaluate(plain, batches) == pytest.approx(state.start_valid_loss, rel=1e-5)
    plain.set_adapter(adapter)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert evaluate(plain, batches) == pytest.approx(
        [e["valid_loss"] for e in lines if "valid_loss" in e][-1], rel=1e-5
    )
    plain.close()


def test_two_hundred_steps_on_rows_as_long_as_chats_are_traced_as_often_as_there_are_layouts(model, gpu):
    recipe, rows = backends.make_recipe(model, steps=200, batch_size=8, rank=2), chat_rows(400, 0.6)
    backend = backends.load("mlx", model, recipe, device="gpu", micro_batch_tokens=4096)
    backend.expect(lambda: Work.of(rows, recipe).shapes_of(200, 4096, "gpu"))
    traces, shapes = counted(backend), set()
    backend.model.train()
    for step in range(1, 201):
        for batch in micro_batches([rows[i] for i in step_rows(400, 8, recipe.seed, step)], 4096, "gpu"):
            shapes.add(batch.shape)
            for inputs in backend.forward.inputs(batch, backend.layouts):
                backend.gradient(backend.tensors, inputs, mx.random.key(step))  # traced, and never computed
    assert len(shapes) > 150
    assert 1 < len(backend.layouts) <= 8
    assert sorted(traces["gradient"]) == sorted(backend.layouts)
    backend.close()


@pytest.mark.parametrize(("changes", "dtype"), [({}, mx.bfloat16), ({"method": "dora"}, mx.float32)])
def test_the_model_computes_with_an_adapter_in_16_bits_and_trains_it_in_32(model, rows, changes, dtype):
    """Else each of its inputs would be widened to float32, and kept: 34 % of a step's activations on SmolLM2."""
    backend = backends.load("mlx", model, backends.make_recipe(model, precision="bf16", **changes))
    trained(backend, rows)
    backend.logits(np.arange(4))
    adapted = backend.layers["model.layers.0.self_attn.q_proj"]
    assert {adapted.lora_a.dtype, adapted.lora_b.dtype} == {dtype}
    assert {tensor.dtype for tensor in backend.tensors} == {mx.float32}
    assert {array.dtype for array in backend.get_adapter().arrays().values()} == {np.dtype(np.float32)}
    backend.close()
