"""Fine-tune a model without the command line: read rows, encode them, train an adapter, fuse it.

    python -m examples.minimal MODEL ROWS OUT

`OUT/adapter` opens in PEFT, `OUT/adapter-mlx` in mlx-lm, `OUT/fused` is a complete Hugging Face folder.
"""

import sys
from pathlib import Path

import torch_backend
from common.data.encode import load_tokenizer
from common.data.training_rows import encode_data, read_data
from common.display import Display
from common.export.fused_folder import ServingConfig, write_fused
from common.models.adapter_files import write_both
from common.models.training_base import find_base, start_adapter
from common.options import Options
from common.recipe import Plan
from common.training.checkpoint import State
from common.training.loop import TrainingLoop
from common.training.observer import DisplayObserver
from common.training.setup import make_recipe


def fine_tune(options: Options, out: Path, display: Display) -> None:
    """Train `options.model` on `options.data` in float32 on the CPU. Raises UserError naming what is wrong."""
    out.mkdir(parents=True)
    base = find_base(options, "torch", "none", display)
    tokenizer = load_tokenizer(base.model.path, options.chat_template)
    with display.stage("encode") as progress:
        rows = encode_data(options, read_data(options, display), tokenizer, progress)

    recipe = make_recipe(options, base, rows, "fp32")  # what changes the result
    plan = Plan(backend="torch", device="cpu", micro_batch_tokens=2048, save_every=recipe.steps)  # what does not

    backend = torch_backend.create()
    backend.load(recipe, plan, base.training_base, start_adapter(recipe, base))
    state, observer = State.before_training(plan), DisplayObserver(display)
    loop = TrainingLoop(backend, recipe, plan, rows.train.rows, rows.valid.rows, out, state, observer)
    with display.training(recipe.steps, done=0):
        loop.train()
    adapter = state.best or backend.get_adapter().copied()  # the best by validation loss, if any
    backend.close()

    write_both(out, adapter)
    with display.stage("fuse") as progress:
        write_fused(base.model, adapter, out / "fused", ServingConfig(rows.stops, rows.template), progress)


if __name__ == "__main__":
    model, data, folder = sys.argv[1:]
    fine_tune(Options(model=model, data=[data]), Path(folder), Display())
