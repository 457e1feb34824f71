"""A step as a GPU computes it: two compiled functions, few shapes, few operations beside the model's own."""

import io

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from common.data.batching import make_batch, micro_batches, step_rows
from common.data.encode import Encoded
from common.data.layouts import choose_layouts
from common.memory_terms import MicroBatchShape
from common.training.planner import Work
from mlx_backend.trained import Trained
from tests import backends
from tests.tiny import write_model, write_rows

pytestmark = pytest.mark.slow

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
        if compile_ and changes.get("method") == "dora":
            continue
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


def test_two_hundred_steps_are_traced_at_most_eight_times(model, compiled):
    lengths = np.clip(np.random.default_rng(0).lognormal(3.6, 0.6, 400), 6, 120).astype(int)
    rows = [Encoded(np.arange(n, dtype=np.int32) % 250, np.arange(n) > n // 2, f"a:{n}") for n in lengths.tolist()]
    recipe = backends.make_recipe(model, batch_size=2, steps=200)
    backend = backends.load("mlx", model, recipe)
    compiled()
    shapes = Work.of(rows, recipe).shapes_of(200, 256, "gpu")
    backend.layouts = choose_layouts(shapes)
    traces, loss = list[MicroBatchShape](), backend._training_loss
    backend._training_loss = lambda tensors, inputs, key: traces.append(inputs.shape) or loss(tensors, inputs, key)
    backend.apply_plan(backend.plan)
    for step in range(1, 201):
        chosen = [rows[i] for i in step_rows(len(rows), 2, recipe.seed, step)]
        float(backend.train_step(micro_batches(chosen, 256, "gpu"), 1e-3, step).loss_sum)
    assert len(shapes) > 100
    assert len(traces) == len({*traces}) <= 8
    backend.close()
