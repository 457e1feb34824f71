"""What one process says to another that trains with it: a kind, plain values, and arrays of declared shapes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.backend import Adapter, Batch, LoraWeight

_HEADER = "message"  # the name of the array that holds kind and values, as JSON
_BATCH = ("input_ids", "targets", "loss_weights", "lengths")
Arrays = Mapping[str, np.ndarray]


class Message(NamedTuple):
    kind: str
    values: dict[str, Any]
    arrays: Arrays


def encoded(kind: str, values: Mapping[str, Any], arrays: Arrays) -> bytes:
    """As a safetensors file, which holds numbers and nothing that could be executed."""
    from safetensors.numpy import save

    header = np.frombuffer(json.dumps([kind, values]).encode(), np.uint8)
    return save({_HEADER: header} | {name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decoded(data: bytes) -> Message:
    from safetensors.numpy import load

    arrays = load(data)
    kind, values = json.loads(arrays.pop(_HEADER).tobytes())
    return Message(kind, values, arrays)


def adapter_parts(adapter: Adapter) -> tuple[dict[str, Any], Arrays]:
    """`(its settings, its arrays)`"""
    values = {name: getattr(adapter, name) for name in ("base_model", "layers", "dropout", "dora")}
    weights = {name: [weight.alpha, weight.rslora] for name, weight in adapter.weights.items()}
    return values | {"weights": weights}, adapter.arrays()


def adapter_of(values: Mapping[str, Any], arrays: Arrays) -> Adapter:
    rest = dict(values)
    weights = {
        name: LoraWeight(
            arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"], alpha, rslora, arrays.get(f"{name}.magnitude")
        )
        for name, (alpha, rslora) in rest.pop("weights").items()
    }
    return Adapter(**rest, weights=weights, full={} if weights else arrays)


def batch_arrays(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    return {f"{number}.{name}": getattr(batch, name) for number, batch in enumerate(batches) for name in _BATCH}


def batches_of(arrays: Arrays, ranks: Sequence[int]) -> list[Batch]:
    """ranks: of each batch."""
    return [
        Batch(**{name: arrays[f"{number}.{name}"] for name in _BATCH}, rank=rank)  # type: ignore[arg-type]
        for number, rank in enumerate(ranks)
    ]
