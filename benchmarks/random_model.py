"""A model of a real size with random weights, for memory and speed: what these depend on is its config alone."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common.models.shapes import tensor_shapes
from common.presets import published_configs
from common.system.cache import cache_folder

_IDS = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    name.split("/")[1].lower().removesuffix("-it").removesuffix("-instruct"): published_configs()[name] | _IDS
    for name in (
        *("google/gemma-3-270m-it", "google/gemma-3-1b-it", "google/gemma-3-4b-it", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"),
        *("Qwen/Qwen3.5-0.8B", "HuggingFaceTB/SmolLM2-135M-Instruct", "LiquidAI/LFM2-1.2B"),
    )
}


def random_model(name: str, layers: int | None = None, dtype: str = "bfloat16", vocabulary: int | None = None) -> Path:
    """A folder in the user's cache with `name`'s config, `layers` deep; written once, tensor by tensor."""
    config = CONFIGS[name] | ({"num_hidden_layers": layers} if layers else {})
    config["vocab_size"] = vocabulary or config["vocab_size"]
    folder = cache_folder() / "random-models" / f"{name}-{config['num_hidden_layers']}-{config['vocab_size']}-{dtype}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype])
    shapes = tensor_shapes(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        code = {"bfloat16": "BF16", "float32": "F32"}[dtype]
        header[tensor] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    tile = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7).astype(kind)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for left in range(math.prod(shape), 0, -len(tile)):
                file.write(tile[: min(left, len(tile))].tobytes())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    return folder
