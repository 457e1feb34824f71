"""The gated delta rule in chunks against the definition token by token, and against transformers."""

import numpy as np
import pytest
import torch

from common import memory_terms
from tests.gated_delta import check_close, make_parts, recurrence
from torch_backend.gated_delta import GatedDelta, gated_delta


def tensors(parts, grad=False):
    return [torch.tensor(part, dtype=torch.float32, requires_grad=grad) for part in parts]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("length", "alike"), [(1, False), (5, False), (64, True), (65, False), (150, True)])
def test_outputs_and_gradients_are_those_of_the_definition(length, alike, repeats):
    parts = make_parts(length, alike, repeats)
    grad = np.random.default_rng(1).normal(size=parts[2].shape)
    expected, _, grads = recurrence(parts, grad)
    given = tensors(parts, grad=True)
    outputs = GatedDelta.apply(*given)
    outputs.backward(torch.tensor(grad, dtype=torch.float32))
    check_close([outputs.detach().numpy(), *(part.grad.numpy() for part in given)], [expected, *grads])


def test_a_group_of_heads_after_the_other_is_the_same(monkeypatch):
    parts = make_parts(70)
    results = []
    for at_once in (2**20, 1):
        monkeypatch.setattr(memory_terms, "_AT_ONCE", at_once)
        given = tensors(parts, grad=True)
        outputs = GatedDelta.apply(*given)
        outputs.square().sum().backward()
        results.append([outputs.detach().numpy(), *(part.grad.numpy() for part in given)])
    check_close(*results, rtol=1e-6)


def test_a_row_goes_on_from_its_state():
    parts = make_parts(100)
    expected, last, _ = recurrence(parts, np.zeros_like(parts[2]))
    first, state = gated_delta(tuple(tensors([part[:, :, :70] for part in parts])))
    second, state = gated_delta(tuple(tensors([part[:, :, 70:] for part in parts])), state)
    check_close([torch.cat([first, second], 2).numpy(), state.numpy()], [expected, last])


def test_transformers_computes_the_same():
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    queries, *rest = tensors(make_parts(130))
    turned = [part.transpose(1, 2) for part in (queries * queries.shape[-1] ** 0.5, *rest)]  # it scales queries itself
    expected, _ = torch_chunk_gated_delta_rule(*turned)
    check_close([GatedDelta.apply(queries, *rest).numpy()], [expected.transpose(1, 2).numpy()])


def test_nothing_but_the_inputs_is_kept():
    given = tensors(make_parts(130), grad=True)
    outputs = GatedDelta.apply(*given)
    assert {tensor.data_ptr() for tensor in outputs.grad_fn.saved_tensors} == {part.data_ptr() for part in given}
