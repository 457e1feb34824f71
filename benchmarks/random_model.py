"""A model of a real size with random weights, for memory and speed: what these depend on is its config alone.

python -m benchmarks.random_model qwen3-4b    # writes it, with SmolLM2's tokenizer, whose ids all of them know
"""

import argparse
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common.models.families import architecture_alone
from common.models.resolve import resolve
from common.models.shapes import tensor_shapes
from common.presets import published_configs
from common.system.cache import cache_folder

_IDS = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}


def _named(name: str) -> dict[str, Any]:
    """The published config of the language model alone."""
    given = published_configs()[name]
    text = given.get("text_config")
    return (text | {"architectures": [architecture_alone(text["model_type"])]} if text else given) | _IDS


CONFIGS: dict[str, dict[str, Any]] = {
    re.sub("-(it|instruct|2512-bf16)", "", name.split("/")[1].lower()): _named(name)
    for name in (
        *("google/gemma-3-270m-it", "google/gemma-3-1b-it", "google/gemma-3-4b-it", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"),
        *("Qwen/Qwen3.5-0.8B", "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM3-3B", "LiquidAI/LFM2-1.2B"),
        *("google/gemma-2-2b-it", "google/gemma-4-E2B-it", "zai-org/GLM-4-9B-0414", "ibm-granite/granite-4.0-1b"),
        *("LGAI-EXAONE/EXAONE-4.0-1.2B", "allenai/OLMo-2-0425-1B-Instruct", "microsoft/Phi-4-mini-instruct"),
        "mistralai/Ministral-3-3B-Instruct-2512-BF16",
    )
}


def _cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with so many layers; as large a share of them as before has the keys of earlier ones."""
    shared = layers * config.get("num_kv_shared_layers", 0) // config["num_hidden_layers"]
    cut = {"num_hidden_layers": layers, "num_kv_shared_layers": shared, "layer_types": config.get("layer_types", [])}
    cut["layer_types"] = cut["layer_types"][:layers]
    return config | {key: value for key, value in cut.items() if key in config or key == "num_hidden_layers"}


def folder_of(name: str, layers: int | None = None, dtype: str = "bfloat16", vocabulary: int | None = None) -> Path:
    """Where `random_model` writes."""
    depth, size = layers or CONFIGS[name]["num_hidden_layers"], vocabulary or CONFIGS[name]["vocab_size"]
    return cache_folder() / "random-models" / f"{name}-{depth}-{size}-{dtype}"


def random_model(name: str, layers: int | None = None, dtype: str = "bfloat16", vocabulary: int | None = None) -> Path:
    """A folder in the user's cache with `name`'s config, `layers` deep; written once, tensor by tensor."""
    config = _cut(CONFIGS[name], layers or CONFIGS[name]["num_hidden_layers"])
    config["vocab_size"] = vocabulary or config["vocab_size"]
    folder = folder_of(name, layers, dtype, vocabulary)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CONFIGS))
    folder = random_model(parser.parse_args().model)
    source = resolve("HuggingFaceTB/SmolLM2-135M-Instruct", print).path
    for file in (*source.glob("tokenizer*"), *source.glob("*.jinja"), *source.glob("*tokens*.json")):
        shutil.copyfile(file, folder / file.name)
    print(folder)


if __name__ == "__main__":
    main()
