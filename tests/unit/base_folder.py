"""A model folder of a few small matrices, written with numpy: all that reading, hashing and fusing look at."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "torch_dtype": "bfloat16",
    "transformers_version": "5.0.0",
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}


def tensors(dtype: str = "BF16", seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (5, 8),
        f"{Q}.weight": (8, 8),
        f"{Q}.bias": (8,),
        f"{DOWN}.weight": (8, 12),
        "model.norm.weight": (8,),
    }
    return {name: random.normal(0, 0.05, shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def write_base(folder: Path, dtype: str = "BF16", shards: int = 1, weights: dict | None = None) -> Path:
    """A folder with config, a stand-in for a tokenizer, and weights in so many shards."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or tensors(dtype)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
    index = {name: files[i % shards] for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
