"""The loss without logits against the plain one, with all logits in float64."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.data.batching import micro_batches
from common.data.encode import Encoded
from tests.backends import DEVICE, plain_loss
from torch_backend import matmul
from torch_backend.loss import LinearCrossEntropy, pack

N, H, V = 23, 16, 301


def inputs(seed=0, n=N):
    """Hidden states, the head, labels and what each of them weighs."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(n, H)).astype(np.float32) * 3
    head = random.normal(size=(V, H)).astype(np.float32)
    return hidden, head, random.integers(0, V, n), random.choice([0.1, 0.5, 1, 3], n).astype(np.float32)


def run(hidden, weight, labels, loss_weights, divisor, cap, chunk, dtype=torch.float32, trained=True):
    h = torch.tensor(hidden, dtype=dtype, device=DEVICE, requires_grad=True)
    w = torch.tensor(weight, dtype=dtype, device=DEVICE, requires_grad=trained)
    there = torch.tensor(labels, device=DEVICE), torch.tensor(loss_weights, device=DEVICE)
    loss = LinearCrossEntropy.apply(h, w, *there, (divisor, cap), chunk)
    (loss / 2).backward()  # what grows the loss grows its gradients
    return loss.item(), h.grad.float().cpu().numpy() * 2, w.grad.float().cpu().numpy() * 2 if trained else None


@pytest.mark.parametrize("chunk", [1, 7, N - 1, N, N + 5])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (1.0, 5.0), (4.0, None), (2.0, 5.0)])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk, divisor, cap):
    given = inputs()
    loss, by_hidden, by_weight = plain_loss(*given, divisor, cap)
    got = run(*given, divisor, cap, chunk)
    assert got[0] == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(got[1], by_hidden, atol=2e-5)
    np.testing.assert_allclose(got[2], by_weight, atol=2e-5)


def test_bf16_products_are_added_up_in_float32():
    hidden, weight, *labels = inputs()
    hidden, weight = (torch.tensor(a).bfloat16().float().numpy() for a in (hidden, weight))
    loss, by_hidden, _ = plain_loss(hidden, weight, *labels, 1.0, None)
    got = run(hidden, weight, *labels, 1.0, None, 7, torch.bfloat16)
    assert got[0] == pytest.approx(loss, rel=3e-3)
    assert np.linalg.norm(got[1] - by_hidden) < 0.01 * np.linalg.norm(by_hidden)


@pytest.mark.cpu
def test_a_16_bit_head_is_widened_block_by_block(monkeypatch):
    monkeypatch.setattr(matmul, "_BLOCK", 50)  # three rows of the weight
    hidden, weight, *labels = inputs()
    held = torch.tensor(weight).bfloat16()
    loss, by_hidden, _ = plain_loss(hidden, held.float().numpy(), *labels, 1.0, 5.0)
    h = torch.tensor(hidden, requires_grad=True)
    got = LinearCrossEntropy.apply(h, held, *map(torch.tensor, labels), (1.0, 5.0), 7)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(h.grad.numpy(), by_hidden, atol=2e-5)


def test_what_only_fills_up_adds_nothing():
    hidden, weight, labels, loss_weights = inputs()
    more = np.zeros(9, np.int64), np.zeros(9, np.float32)
    added = np.concatenate([labels, more[0]]), np.concatenate([loss_weights, more[1]])
    filled = np.concatenate([hidden, hidden[:9]]), weight, *added
    plain, got = (run(*arrays, 2.0, 5.0, 7) for arrays in ((hidden, weight, labels, loss_weights), filled))
    assert got[0] == pytest.approx(plain[0], rel=1e-6)
    np.testing.assert_allclose(got[1][:N], plain[1], atol=1e-6)
    np.testing.assert_allclose(got[2], plain[2], atol=1e-5)
    assert (got[1][N:] == 0).all()


def test_no_labels_are_no_loss_and_a_frozen_head_gets_no_gradient():
    loss, by_hidden, by_weight = run(*inputs(n=0), 1.0, None, 4, trained=False)
    assert (loss, by_hidden.shape, by_weight) == (0.0, (0, H), None)


class Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, list | tuple) else [result]:
            self.largest = max(self.largest, found.numel() if isinstance(found, torch.Tensor) else 0)
        return result


def test_no_array_of_tokens_by_vocabulary_exists():
    given = inputs(n=400)
    for chunk in (8, 50):
        with Sizes() as sizes:
            run(*given, 1.0, 5.0, chunk)
        assert sizes.largest == max(chunk * V, given[0].size, given[1].size)


def test_padding_lengthens_no_position() -> None:
    """By the highest one some RoPE chooses its frequencies, for every row."""
    rows = [Encoded(np.arange(1, count + 2, dtype=np.int32), np.arange(count + 1) > 0, "a:1") for count in (3, 6)]
    (batch,) = micro_batches(rows, 100, "cpu")
    packed = pack(batch, torch.device("cpu"), False, 8)
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, *[0] * 7]
