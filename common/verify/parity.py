"""`doctor --parity MODEL`: logits, training steps and adapter of both backends side by side, or against a record."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import Adapter
from common.backend_package import Backends
from common.context import Context
from common.data.batching import micro_batches, step_rows
from common.data.encode import Encoded
from common.data.load import load_data
from common.errors import UserError
from common.files import scratch_folder
from common.model_files import open_tokenizer
from common.models.lora_init import initial_adapter, layer_count
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes, target_names
from common.options import EXAMPLE
from common.recipe import Plan, Recipe
from common.verify.tiny_models import TINY, write_tiny

RECORD = Path(__file__).with_name("parity_reference.json")
MEASURED = Path(__file__).with_name("parity_measured.json")  # by family; `python -m benchmarks.parity` writes it
TINY_STEPS, REAL_STEPS = 20, 10
# What float32 allows: logits as they are, losses and adapters relative to their size.
BOUNDS = {"logits": 1e-4, "step losses": 1e-4, "adapters": 1e-3}
REAL_BOUNDS = {"logits": 1e-3, "step losses": 1e-3, "adapters": 5e-2}  # sums are longer, and Adam divides by little
_SAMPLE = 8  # logits of the first row's last token that are recorded


@dataclass(frozen=True)
class Result:
    """What one backend computed."""

    logits: np.ndarray  # [T, vocabulary] of the first row, before training
    losses: np.ndarray  # [steps]
    adapter: Mapping[str, np.ndarray]  # every A and B after training


def parity(name: str, context: Context) -> bool:
    """Whether all differences are within bounds; prints the table. name: a family's model type or what --model takes.

    With one backend only the family's tiny model is trained, and compared with common/verify/parity_reference.json.
    Raises UserError where no backend is installed or the model is not supported.
    """
    display, here = context.display, [name for name in ("torch", "mlx") if context.backends(name).fault() is None]
    if not here:
        raise UserError("Neither backend is installed.", "python cli.py doctor says how to install one.")
    with scratch_folder() as scratch:
        folder = None if name in TINY else resolve(name, display.say).path
        if len(here) == 1:
            family = name if folder is None else str(ModelFolder(folder).config["model_type"])
            display.say(f"Only {here[0]} is installed: the tiny {family} is compared with recorded numbers")
            folder, steps, rows, bounds = write_tiny(scratch, family), TINY_STEPS, tiny_rows(), BOUNDS
            found = _compare(run(here[0], context.backends, folder, rows, steps), recorded(family))
            title = f"{family}: {here[0]} and the record"
        else:
            tiny = folder is None
            folder = folder or write_tiny(Path(scratch), name)
            rows = tiny_rows() if tiny else _text_rows(folder)
            steps, bounds = (TINY_STEPS, BOUNDS) if tiny else (REAL_STEPS, REAL_BOUNDS)
            torch, mlx = (run(backend, context.backends, folder, rows, steps) for backend in here)
            found = _compare(torch, mlx)
            title = f"{name}: torch and mlx"
            if not tiny:
                steps_side_by_side = zip(torch.losses, mlx.losses, strict=True)
                lines = [[str(i + 1), f"{a:.6f}", f"{b:.6f}"] for i, (a, b) in enumerate(steps_side_by_side)]
                display.table("Step losses", ["step", "torch", "mlx"], lines)
    table = [
        [what, f"{value:.1e}", f"{bounds[what]:.0e}", "yes" if value < bounds[what] else "NO"]
        for what, value in found.items()
    ]
    display.table(f"{title}, {steps} steps in float32", ["largest difference", "found", "bound", "within"], table)
    return all(value < bounds[what] for what, value in found.items())


def run(
    name: str,
    backends: Backends,
    folder: Path,
    rows: list[Encoded],
    steps: int,
    targets: Sequence[str] = ("all-linear",),
) -> Result:
    """The result of `steps` steps of four rows on one backend, in float32, from the seeded adapter."""
    losses = []
    with loaded(name, backends, folder, targets, steps) as (backend, recipe, _):
        logits = backend.logits(rows[0].ids)
        for step in range(1, steps + 1):
            chosen = [rows[i] for i in step_rows(len(rows), recipe.batch_size, recipe.seed, step)]
            result = backend.train_step(micro_batches(chosen, 1024), recipe.learning_rate, step)
            losses.append(float(result.loss_sum) / result.weight_sum)
        trained = dict(backend.get_adapter().arrays())
    return Result(logits, np.array(losses), trained)


def tiny_parity(family: str, backends: Backends) -> dict[str, float]:
    """The largest difference of each kind between torch and MLX, on the tiny model of the family.

    Raises UserError where a backend is not installed.
    """
    for name in ("torch", "mlx"):
        if fault := backends(name).fault():
            raise UserError(f"{name} is not installed here: {fault}", "python cli.py doctor says how to install it.")
    with scratch_folder() as scratch:
        folder, rows = write_tiny(scratch, family), tiny_rows()
        return _compare(*(run(name, backends, folder, rows, TINY_STEPS) for name in ("torch", "mlx")))


def measured(family: str) -> dict[str, Any]:
    """`differences`, `date`, `commit` and `versions` of the family's last record; empty where there is none."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8")).get(family, {})
    return found


@contextmanager
def loaded(
    name: str, backends: Backends, folder: Path, targets: Sequence[str], steps: int = TINY_STEPS
) -> Iterator[tuple[Any, Recipe, Adapter]]:
    """`(a backend, its recipe of `steps` steps, the seeded adapter)`, in float32. Raises UserError."""
    shapes = linear_shapes(ModelFolder(folder), [*targets])
    recipe = _recipe(folder, max(steps, 1), target_names(shapes))
    plan = Plan(backend=name, device="cpu", micro_batch_tokens=1024, save_every=max(steps, 1))  # type: ignore[arg-type]
    backend = backends(name).create()
    start = initial_adapter(shapes, layer_count(shapes), recipe)
    backend.load(recipe, plan.on(backends(name).choose_device("auto").value), folder, start)
    try:
        yield backend, recipe, start
    finally:
        backend.close()


def tiny_rows() -> list[Encoded]:
    """24 rows of 20 to 110 ids, each rising by its own step: there is something to learn."""
    random, rows = np.random.default_rng(3), []
    for i in range(24):
        ids = 3 + (random.integers(256) + random.integers(1, 6) * np.arange(20 + i * 90 // 23)) % 256
        rows.append(Encoded(ids.astype(np.int32), np.arange(len(ids)) >= len(ids) // 2, f"row {i}"))
    return rows[::-1]  # the longest first: its logits are compared


def record(backends: Backends, path: Path = RECORD) -> None:
    """Write to `path` what torch computes on this machine for every family's tiny model."""
    numbers = {}
    for family in TINY:
        with scratch_folder() as scratch:
            result = run("torch", backends, write_tiny(scratch, family), tiny_rows(), TINY_STEPS)
        numbers[family] = {
            "logits": [round(float(value), 6) for value in result.logits[-1, :_SAMPLE]],
            "losses": [round(float(value), 6) for value in result.losses],
        }
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def recorded(family: str) -> Result:
    """What the reference file holds of a family: no adapter."""
    known = json.loads(RECORD.read_text(encoding="utf-8"))[family]
    return Result(np.array([known["logits"]]), np.array(known["losses"]), {})


def _compare(one: Result, other: Result) -> dict[str, float]:
    """The largest difference of each kind; the reference file holds some logits and no adapter."""
    width = other.logits.shape[1]
    ours = one.logits if one.logits.shape == other.logits.shape else one.logits[-1:, :width]
    found = {
        "logits": float(np.abs(ours - other.logits).max()),
        "step losses": float((np.abs(one.losses - other.losses) / other.losses).max()),
    }
    if other.adapter:
        differences = [np.linalg.norm(one.adapter[n] - m) / np.linalg.norm(m) for n, m in other.adapter.items()]
        found["adapters"] = float(max(differences))
    return found


def _recipe(folder: Path, steps: int, targets: list[str]) -> Recipe:
    return Recipe(
        model=str(folder),
        data="",
        model_hash="",
        data_hash="",
        template_hash="",
        precision="fp32",
        rank=4,
        alpha=8.0,
        dropout=0.0,
        targets=targets,
        batch_size=4,
        max_length=128,
        learning_rate=2e-3 if steps == TINY_STEPS else 2e-4,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        max_grad_norm=1.0,
        schedule="constant",
        steps=steps,
        warmup_steps=0,
        eval_every=steps,
        seed=0,
    )


def _text_rows(folder: Path) -> list[Encoded]:
    """The built-in example's answers as plain text: a base model has no chat template."""
    tokenizer = open_tokenizer(folder)
    rows = []
    for example in load_data(str(EXAMPLE), 0, 0).train[:40]:
        text = "\n".join(str(message["content"]) for message in example.messages)
        ids = np.array(tokenizer(text)["input_ids"][:128], np.int32)
        rows.append(Encoded(ids, np.ones(len(ids), bool), example.source))
    return rows
