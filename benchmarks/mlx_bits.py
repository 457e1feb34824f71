"""How far each `--mlx-bits` is from the model that it is made of: KL, top-1 agreement, size.

    python -m benchmarks.mlx_bits MODEL [MODEL ...]

A model is a name or a folder, such as a run's fused one. The positions are chosen as `verify` does: label tokens of the
built-in example's validation rows, as the model's chat template writes them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.load import read_rows
from common.display import gigabytes
from common.export.mlx import write_mlx_model
from common.models.resolve import resolve
from common.options import EXAMPLE
from common.verify.divergence import LogitsAt, Reference, choose_positions

SCHEMES = ("4", "mixed-4-6", "6", "8")


def logits_of(model: Any) -> LogitsAt:
    import torch

    def logits(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(ids).long()[None]).logits[0, torch.from_numpy(positions)].numpy()

    return logits


def round_weights(model: Any, folder: Path) -> None:
    """Give the model the weights that mlx-lm sees in `folder`. Why in torch: MLX on a CPU takes many times longer."""
    import mlx.core as mx
    import mlx.nn as nn
    import torch
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    parameters = dict(model.named_parameters())
    for path, module in load_model(folder)[0].named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            seen = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            parameters[f"{path}.weight"].data = torch.from_numpy(np.array(seen.astype(mx.float32)))


def measure(name: str, template: str | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve(name, print).path
    encoder = Encoder(load_tokenizer(folder, template), MaskingOptions())
    (rows,), _ = encode_parts([read_rows(EXAMPLE / "valid.jsonl")], encoder, "error")
    at = choose_positions([rows[number] for number in range(min(32, len(rows)))], encoder.tokenizer.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    reference = Reference(at, logits_of(model.eval()))
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as scratch:
            made = write_mlx_model(folder, Path(scratch) / "mlx", lambda share, text: None, scheme)
            round_weights(model, Path(scratch) / "mlx")
        found = reference.divergence(logits_of(model))
        print(
            f"| {name}, {scheme} bits | {found.same_top:.1%} | {found.mean_kl:.4f} | {gigabytes(made['bytes'])} |"
            f" {found.positions} tokens",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--chat-template")
    given = parser.parse_args()
    for model in given.models:
        measure(model, given.chat_template)
