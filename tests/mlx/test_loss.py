"""The loss without logits against the plain one, with all logits in float64."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_backend.loss import linear_cross_entropy
from tests.backends import plain_loss

N, H, V = 23, 64, 301


@pytest.fixture(autouse=True)
def on_the_cpu():
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()


class Model(nn.Module):
    def __init__(self, tied, divisor=1.0, cap=None, dtype=mx.float32):
        super().__init__()
        weight = mx.array(np.random.default_rng(1).normal(size=(V, H)).astype(np.float32)).astype(dtype)
        if tied:
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(V, H)
            self.model.embed_tokens.weight = weight
        else:
            self.lm_head = nn.Linear(H, V, bias=False)
            self.lm_head.weight = weight
        self.forward_config = SimpleNamespace(logit_divisor=divisor, logit_softcap=cap)


def inputs(n=N):
    """Hidden states, labels and what each of them weighs."""
    random = np.random.default_rng(0)
    hidden, labels = random.normal(size=(n, H)).astype(np.float32) * 2, random.integers(0, V, n)
    return hidden, labels, random.choice([0.1, 0.5, 1, 3], n).astype(np.float32)


def layer(model, tied):
    return model.model.embed_tokens if tied else model.lm_head


def by_hidden(model, hidden, *rest):
    return mx.value_and_grad(lambda h: loss_of(model, h, *rest) * 2)(hidden)


def loss_of(model, hidden, labels, loss_weights, chunk):
    return linear_cross_entropy(model, hidden, mx.array(labels), mx.array(loss_weights), chunk)


@pytest.mark.parametrize("chunk", [1, 7, N - 1, N, N + 5])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (1.0, 5.0), (4.0, None), (2.0, 5.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk, divisor, cap, tied):
    model, (hidden, *labels) = Model(tied, divisor, cap), inputs()
    weight = np.array(layer(model, tied).weight)
    loss, expected, by_weight = plain_loss(hidden, weight, *labels, divisor, cap)
    both = nn.value_and_grad(model, lambda h: loss_of(model, h, *labels, chunk))
    got, gradients = both(mx.array(hidden))
    assert got.item() == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(np.array(weight_of(gradients)), by_weight, atol=5e-5)
    model.freeze()
    got, gradient = by_hidden(model, mx.array(hidden), *labels, chunk)
    assert got.item() == pytest.approx(2 * loss, rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), 2 * expected, atol=5e-5)
    model.eval()
    assert loss_of(model, mx.array(hidden), *labels, chunk).item() == pytest.approx(loss, rel=1e-6)


def weight_of(gradients):
    return (gradients.get("lm_head") or gradients["model"]["embed_tokens"])["weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_has_the_loss_of_its_dequantized_weights(tied, bits):
    model, (hidden, *labels) = Model(tied), inputs()
    nn.quantize(model, 64, bits)
    model.freeze()
    kept = layer(model, tied)
    weight = np.array(mx.dequantize(kept.weight, kept.scales, kept.biases, 64, bits))
    loss, expected, _ = plain_loss(hidden, weight, *labels, 1.0, None)
    got, gradient = by_hidden(model, mx.array(hidden), *labels, 7)
    assert got.item() == pytest.approx(2 * loss, rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), 2 * expected, atol=1e-3)


def test_bf16_products_are_added_up_in_float32():
    model, (hidden, *labels) = Model(True, dtype=mx.bfloat16), inputs()
    model.freeze()
    rounded = mx.array(hidden).astype(mx.bfloat16)
    weight = np.array(model.model.embed_tokens.weight.astype(mx.float32))
    loss, expected, _ = plain_loss(np.array(rounded.astype(mx.float32)), weight, *labels, 1.0, None)
    got, gradient = by_hidden(model, rounded, *labels, 7)
    assert (got.dtype, gradient.dtype) == (mx.float32, mx.bfloat16)
    assert got.item() == pytest.approx(2 * loss, rel=3e-3)
    difference = np.array(gradient.astype(mx.float32)) - 2 * expected
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(2 * expected)


def test_no_array_of_tokens_by_vocabulary_exists():
    model, (hidden, *labels) = Model(True), inputs(4000)
    model.freeze()
    h = mx.array(hidden)
    mx.eval(h, model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(by_hidden(model, h, *labels, 40))
    assert mx.get_peak_memory() - before < 4000 * V * 4 / 1.5
