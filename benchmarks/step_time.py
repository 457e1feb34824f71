"""Where a step's time goes on torch, beside the machine's own product rate in the same run.

python -m benchmarks.step_time --data rows.jsonl [--model MODEL]
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.one_step import recipe_of
from common.data.batching import micro_batches, step_rows
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.load import read_rows
from common.models.lora_init import initial_adapter, layer_count
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.recipe import Plan
from common.training.memory_estimate import model_dims
from torch_backend.backend import TorchBackend

ROOT = Path(__file__).resolve().parent.parent


def peak_rate(rows: int, hidden: int, inner: int) -> float:
    """FLOP/s of the model's largest product in float32, the best of five runs."""
    x, weight = torch.randn(rows, hidden), torch.randn(inner, hidden)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            x @ weight.T
        best = min(best, time.perf_counter() - started)
    return 10 * 2 * rows * hidden * inner / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=str(ROOT / "examples" / "data" / "train.jsonl"))
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    model = resolve(arguments.model, print)
    recipe = recipe_of({"rows": arguments.batch, "width": 1023, "precision": "fp32"})
    encoder = Encoder(load_tokenizer(model.path, None), MaskingOptions())
    (rows,), _ = encode_parts([read_rows(Path(arguments.data))], encoder, "error")
    shapes = linear_shapes(model, ["all-linear"])
    backend = TorchBackend()
    plan = Plan(backend="torch", device="cpu", micro_batch_tokens=2048, save_every=1)
    backend.load(recipe, plan, model.path, initial_adapter(shapes, layer_count(shapes), recipe))
    sizes = model_dims(model.config)
    rate = peak_rate(800, sizes.hidden, sizes.inner)

    def step(number: int) -> tuple[int, int]:
        chosen = [rows[i] for i in step_rows(len(rows), arguments.batch, 0, number)]
        result = backend.train_step(micro_batches(chosen, 2048), 1e-4, number)
        return result.tokens, result.label_tokens

    step(1)
    started = time.perf_counter()
    counts = [step(number) for number in range(2, 6)]
    seconds = time.perf_counter() - started
    tokens, labels = (sum(column) for column in zip(*counts, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(6)
    events = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(events.values())
    products = sum(events.get(name, 0) for name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"))
    # forward, and the gradient of the input: four operations a weight; the head's at labels only
    work = 4 * sizes.linear * tokens + 4 * sizes.vocabulary * sizes.hidden * labels
    print(f"{tokens / seconds:.1f} tokens/s, {labels / seconds:.1f} label tokens/s")
    print(f"the base's products: {work / seconds / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s ({work / seconds / rate:.0%})")
    print(f"share of a step's time in all products: {products / total:.0%}; then:")
    for name, microseconds in sorted(events.items(), key=lambda item: -item[1])[:12]:
        print(f"  {name:50} {microseconds / total:6.1%}")


if __name__ == "__main__":
    main()
