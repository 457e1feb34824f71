"""A device whose errors come late, as Metal's do: simulated on the CPU, because there is no Metal in these tests."""

import gc
import json
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from common.backend import OutOfMemory
from common.data.batching import micro_batches
from common.errors import UserError
from common.training.checkpoint import State
from common.training.loop import TrainingLoop
from mlx_backend.confirmation import device_errors
from tests import backends
from tests.tiny import write_model, write_rows

pytestmark = pytest.mark.slow

MEMORY = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:...OutOfMemory)"
ASKED = 21  # by a sound run
HANG = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:...Timeout)"


class Device:
    """Fails in the `fails`-th of what it is given to compute, from now on.

    What that should have written stays 0. Its error comes at the next use of the stream, where `mx.eval` is none.
    """

    def __init__(self, monkeypatch):
        self.fails, self.text, self.error = [], MEMORY, None
        self.asked, self.synchronized = 0, 0
        self.launch = mx.async_eval
        monkeypatch.setattr(mx, "async_eval", self.async_eval)
        monkeypatch.setattr(mx, "synchronize", self.synchronize)

    def fail(self, *numbers, text=MEMORY):
        self.fails, self.text = [self.asked + number for number in numbers], text

    def check(self):
        error, self.error = self.error, None
        if error:
            raise RuntimeError(error)

    def async_eval(self, *trees):
        self.check()
        self.launch(*trees)
        self.asked += 1
        if self.asked in self.fails:
            self.error = self.text
            for _, array in tree_flatten(trees):
                array[...] = mx.zeros_like(array)

    def synchronize(self):
        self.synchronized += 1
        self.check()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return backends.encode_rows(model, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def load(model, budget=10**12, **changes):
    backend = backends.load("mlx", model, backends.make_recipe(model, **changes))
    backend.confirmation.late, backend.confirmation.budget = True, budget
    return backend


def steps(backend, rows, first, last):
    """The results of steps with the same rows in one micro-batch, each of which the device is asked for twice."""
    batches = micro_batches(rows[:4], 10_000)
    assert len(batches) == 1
    return [backend.train_step(batches, 1e-2, step) for step in range(first, last + 1)]


def state(backend):
    """Weights and moments."""
    adapter = backend.get_adapter().arrays()
    optimizer = backend.get_optimizer()
    return [optimizer.step, adapter, optimizer.exp_avg, optimizer.exp_avg_sq]


def same(one, other):
    return one[0] == other[0] and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one[1:], other[1:], strict=True)
    )


@pytest.fixture(scope="module")
def sound(model, rows):
    """What is after 0, 1, 2 and 3 steps, and the losses."""
    found, losses = [], []
    for count in range(4):
        backend = backends.load("mlx", model, backends.make_recipe(model))
        losses = [float(result.loss_sum) for result in steps(backend, rows, 1, count)]
        found.append(state(backend))
        backend.close()
    return found, losses


def test_where_nothing_fails_all_is_as_on_another_device(model, rows, device, sound):
    backend = load(model)
    results = steps(backend, rows, 1, 3)
    assert [float(result.loss_sum) for result in results] == sound[1]
    assert same(state(backend), sound[0][3])
    backend.close()


def test_the_device_is_synchronized_where_sizes_are_new_and_where_results_are_read(model, rows, device):
    backend, one = load(model), micro_batches(rows[:1], 10_000)
    device.synchronized = 0
    steps(backend, rows, 1, 1)
    assert device.synchronized == 1
    results = steps(backend, rows, 2, 3)
    backend.train_step(one, 1e-2, 4)
    assert device.synchronized == 1, "these sizes are not new"
    float(results[0].loss_sum)
    assert device.synchronized == 1, "the next step has waited for it"
    backend.get_adapter()
    assert device.synchronized == 2
    backend.apply_plan(backend.plan)
    backend.train_step(one, 1e-2, 5)
    assert device.synchronized == 3, "another plan takes other memory"
    backend.close()


@pytest.mark.parametrize("budget", [0, 1])
def test_the_device_is_synchronized_at_every_step_where_memory_is_short_or_not_known(model, rows, device, budget):
    backend = load(model, budget)
    device.synchronized = 0
    steps(backend, rows, 1, 3)
    assert device.synchronized == 3
    backend.close()


def test_a_step_that_takes_less_is_not_synchronized_because_one_before_took_much(model, rows, device, monkeypatch):
    backend, peak, used = load(model, 100), 0, 0

    def reset():
        nonlocal peak
        peak = 0

    def read():
        nonlocal peak
        peak = max(peak, used)
        return peak

    monkeypatch.setattr(mx, "reset_peak_memory", reset)
    monkeypatch.setattr(mx, "get_peak_memory", read)
    synchronized = []
    for step, takes in enumerate([95, 95, 50, 50, 95], 1):
        used, device.synchronized = takes, 0
        steps(backend, rows, step, step)
        synchronized.append(device.synchronized)
    assert synchronized == [1, 1, 0, 0, 1]
    used = 50
    steps(backend, rows, 6, 6)
    assert backend.memory().peak == 95
    backend.close()


@pytest.mark.parametrize("asked", [1, 2], ids=["its gradients", "its update"])
def test_a_step_of_a_new_size_fails_in_itself_and_is_undone(model, rows, device, sound, asked):
    backend = load(model)
    device.fail(asked)
    with pytest.raises(OutOfMemory, match="Insufficient Memory") as caught:
        steps(backend, rows, 1, 1)
    assert not caught.value.undid_previous
    assert same(state(backend), sound[0][0])
    steps(backend, rows, 1, 3)
    assert same(state(backend), sound[0][3])
    backend.close()


@pytest.mark.parametrize("asked", [2, 3], ids=["its update", "the next one's gradients"])
def test_the_next_step_undoes_the_one_that_was_not_written(model, rows, device, sound, asked):
    backend = load(model)
    steps(backend, rows, 1, 1)
    device.fail(asked)
    (second,) = steps(backend, rows, 2, 2)
    with pytest.raises(OutOfMemory) as caught:
        steps(backend, rows, 3, 3)
    assert caught.value.undid_previous
    with pytest.raises(OutOfMemory):
        float(second.loss_sum)
    assert same(state(backend), sound[0][1])
    steps(backend, rows, 2, 3)
    assert same(state(backend), sound[0][3])
    backend.close()


def test_gradients_that_were_not_written_are_never_applied(model, rows, device, sound):
    backend = load(model)
    steps(backend, rows, 1, 2)
    device.fail(1)
    with pytest.raises(OutOfMemory) as caught:
        steps(backend, rows, 3, 3)
    assert caught.value.undid_previous, "whose error it was cannot be known"
    assert same(state(backend), sound[0][1])
    backend.close()


READERS = {
    "loss": lambda backend, result, rows: float(result.loss_sum),
    "norm": lambda backend, result, rows: float(result.grad_norm),
    "adapter": lambda backend, result, rows: backend.get_adapter(),
    "optimizer": lambda backend, result, rows: backend.get_optimizer(),
    "validation": lambda backend, result, rows: backend.eval_step(micro_batches(rows[:1], 1)[0]),
    "logits": lambda backend, result, rows: backend.logits(rows[0].ids),
    "generation": lambda backend, result, rows: next(
        iter(backend.generate(rows[0].ids[:9], 3, [], lambda logits, ids: int(logits.argmax())))
    ),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_whoever_reads_a_step_that_was_not_written_hears_of_it(model, rows, device, sound, read):
    backend = load(model)
    steps(backend, rows, 1, 1)
    device.fail(2)
    (second,) = steps(backend, rows, 2, 2)
    with pytest.raises(OutOfMemory):
        read(backend, second, rows)
    assert same(state(backend), sound[0][1])
    steps(backend, rows, 2, 3)
    assert same(state(backend), sound[0][3])
    backend.close()


@pytest.mark.parametrize("name", ["validation", "logits", "generation"])
def test_results_that_were_not_written_are_not_returned(model, rows, device, name):
    backend = load(model)
    device.error = MEMORY  # of what these compute: it comes when they synchronize
    with pytest.raises(OutOfMemory):
        READERS[name](backend, None, rows)
    backend.close()


def test_another_fault_of_the_device_is_said_and_undone_too(model, rows, device, sound):
    backend = load(model)
    steps(backend, rows, 1, 1)
    device.fail(2, text=HANG)
    steps(backend, rows, 2, 2)
    with pytest.raises(UserError, match=r"^The device failed: \[METAL\] .*GPU Timeout") as caught:
        steps(backend, rows, 3, 3)
    assert not isinstance(caught.value, OutOfMemory)
    assert same(state(backend), sound[0][1])
    backend.close()


@pytest.mark.parametrize(
    ("text", "raised", "said"),
    [
        ("cublasLtMatmul(handle, desc, alpha) failed with code: 3.", OutOfMemory, "code: 3"),
        ("cudnnExecute failed: CUDNN_STATUS_ALLOC_FAILED", OutOfMemory, "ALLOC_FAILED"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", OutOfMemory, "out of memory"),
        ("[metal::malloc] Attempting to allocate 9 bytes", OutOfMemory, "Attempting"),
        ("cublasLtMatmul(handle, desc, alpha) failed with code: 13.", UserError, "^The device failed"),
        ("cuGraphLaunch(graph, stream) failed: unspecified launch failure", UserError, "^The device failed"),
        ("cudaStreamSynchronize(stream) failed: an illegal memory access", UserError, "^The device failed"),
        ("[metal::Device] Unable to build: Threadgroup memory size exceeds 32768", UserError, "^The device failed"),
        ("GatherQMM has no CUDA implementation.", UserError, "^GatherQMM has no CUDA"),
        ("[matmul] Last dimension of first input must match", RuntimeError, "matmul"),
    ],
)
def test_errors_are_told_apart_by_their_texts(text, raised, said):
    with pytest.raises(raised, match=said) as caught, device_errors():
        raise RuntimeError(text)
    assert isinstance(caught.value, OutOfMemory) is (raised is OutOfMemory)


def trained(backend):
    """Weak references to the weights and moments as they are."""
    return [weakref.ref(array) for _, array in tree_flatten([backend.tensors, backend.states])]


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


def test_what_was_before_a_step_is_let_go_once_the_next_is_accepted(model, rows, device):
    backend = load(model)
    first, before = steps(backend, rows, 1, 1), trained(backend)
    second = steps(backend, rows, 2, 2)
    assert len(alive(before)) == len(before), "the second step may still have to be undone"
    third = steps(backend, rows, 3, 3)
    assert not alive(before)
    before = trained(backend)
    fourth = steps(backend, rows, 4, 4)
    backend.confirmation.confirm()
    assert not alive(before)
    assert all(float(result.loss_sum) > 0 for result in first + second + third + fourth)
    backend.close()


def test_the_wait_is_for_the_step_before_and_not_for_the_one_being_launched(model, rows, device):
    backend = load(model)
    steps(backend, rows, 1, 2)
    written = tree_flatten(backend.confirmation._step.written)
    backend.update(backend.tensors, backend.states, backend.tensors, mx.array(1.0), mx.array(1e-2))
    now = tree_flatten(backend.confirmation._step.written)
    assert len(now) == len(written)
    assert all(one is other for (_, one), (_, other) in zip(written, now, strict=True))
    backend.close()


def test_all_weights_are_confirmed_at_every_step_and_none_is_kept(model, rows, device):
    backend = load(model, method="full")
    before = trained(backend)
    results = steps(backend, rows, 1, 1)
    assert backend.confirmation._step is None
    assert not alive(before)
    assert float(results[0].loss_sum) > 0
    before = state(backend)
    device.fail(2)
    with pytest.raises(OutOfMemory) as caught:
        steps(backend, rows, 2, 2)
    assert not caught.value.undid_previous
    assert same(state(backend), before)
    backend.close()


def run(model, rows, folder, device, fails):
    """Two micro-batches a step at first: five steps, a validation after the third and the last."""
    recipe = backends.make_recipe(model, steps=5, eval_every=3)
    backend, watch = load(model), backends.Quiet()
    device.fail(*fails)
    plan = backends.make_plan("mlx")
    TrainingLoop(backend, recipe, plan, rows[4:], rows[:4], folder, State(micro_batch_tokens=200), watch).train()
    adapter = backend.get_adapter().arrays()
    backend.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return adapter, lines, watch.warnings


@pytest.fixture(scope="module")
def sound_run(model, rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = Device(monkeypatch)
        adapter, lines, warnings = run(model, rows, tmp_path_factory.mktemp("sound"), device, [])
    assert (warnings, device.asked) == ([], ASKED)
    return adapter, lines


@pytest.mark.parametrize("asked", range(1, ASKED + 5))
def test_a_run_in_which_the_device_fails_ends_where_a_sound_one_ends(model, rows, device, sound_run, tmp_path, asked):
    adapter, lines = sound_run
    other, others, warnings = run(model, rows, tmp_path, device, [asked])
    assert len(warnings) == (asked <= ASKED)
    assert [(line["step"], line.keys()) for line in lines] == [(line["step"], line.keys()) for line in others]
    for key in ("loss", "valid_loss"):
        one, two = ([line[key] for line in found if key in line] for found in (lines, others))
        np.testing.assert_allclose(one, two, rtol=2e-5)
    assert backends.relative_difference(adapter, other) < 1e-3
