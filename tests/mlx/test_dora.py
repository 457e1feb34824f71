"""DoRA's layer beside mlx-lm's own."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear

from mlx_backend.layers import replace_call
from mlx_backend.lora import _dora

pytestmark = pytest.mark.slow


def dora_layer(linear, ours):
    mx.random.seed(1)
    layer = DoRALinear.from_base(linear, r=4, scale=2.0)
    if ours:
        layer._squares = mx.square(layer.m)
        replace_call(layer, _dora)
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    layer.m = layer.m * mx.random.uniform(0.8, 1.2, layer.m.shape)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("shape", [(7, 64), (1, 7, 64)])
def test_it_computes_what_the_one_of_mlx_lm_does(bias, bits, shape):
    mx.random.seed(0)
    linear = nn.Linear(64, 32, bias=bias)
    linear = linear if bits is None else nn.QuantizedLinear.from_linear(linear, group_size=32, bits=bits)
    x = mx.random.normal(shape)
    found = []
    for ours in (True, False):
        layer = dora_layer(linear, ours)

        def loss(x, a, b, m, layer=layer):
            layer.lora_a, layer.lora_b, layer.m = a, b, m
            result = layer(x)
            return (result * mx.linspace(-1, 1, result.size).reshape(result.shape)).sum(), result

        start = layer.lora_a, layer.lora_b, layer.m
        (_, result), gradients = mx.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, *start)
        found.append([result, *gradients])
    for one, other in zip(*found, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_in_bf16_a_ratio_is_not_rounded_and_outputs_stay_bf16():
    mx.random.seed(0)
    linear = nn.Linear(64, 32, bias=False)
    linear.weight = linear.weight.astype(mx.bfloat16)
    layer = dora_layer(linear, True)
    layer.lora_b = mx.zeros_like(layer.lora_b)
    layer.m = mx.sqrt(layer._squares) * 1.006  # bf16 has 1.0078
    x = mx.random.normal((200, 64)).astype(mx.bfloat16)
    result, base = layer(x), linear(x)
    assert result.dtype == mx.bfloat16
    ratio = (result.astype(mx.float32).abs().sum() / base.astype(mx.float32).abs().sum()).item()
    assert ratio == pytest.approx(1.006, abs=1e-3)
