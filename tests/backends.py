"""Checks that hold for either backend; tests/torch and tests/mlx call them, tests/parity compares the two."""

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from common.backend import Adapter, Backend, OptimizerState, OutOfMemory
from common.data.batching import make_batch, micro_batches, step_rows
from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.load import read_rows
from common.models.adapter_files import read_peft
from common.models.fuse import fuse
from common.models.lora_init import choose_layers, initial_adapter
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import read_header
from common.models.shapes import linear_shapes
from common.recipe import Parent, Plan, Recipe
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import Interrupted, TrainingLoop

DEVICE = os.environ.get("TWINTUNE_TEST_DEVICE", "cpu")  # cuda: for tests/torch on a machine with an NVIDIA GPU
MLX_DEVICE = os.environ.get("TWINTUNE_TEST_MLX_DEVICE", DEVICE)  # gpu: for tests/mlx and tests/parity on a Mac
# How far adapters may be apart under 20 steps, and 1e-3 from then on. AdamW's first steps are of one size whatever the
# gradient, so an entry whose gradient is rounding differs by whole steps.
FIRST_STEPS = 2e-2
TARGETS = ["all-linear"]
METHODS: dict[str, dict] = {
    "lora": {},
    "rslora": {"rslora": True, "rank": 8},
    "dora": {"method": "dora"},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 6}, "alpha_pattern": {"down_proj": 3.0}},
    "layers": {"layers": "last:1"},
    "lora_plus": {"lora_plus": 4.0, "learning_rate": 3e-3},
}

# Families whose linear layers have other names, or that have some which are not adapted.
QUANTIZED = ("gemma4_text", "gemma4", "glm4", "granitemoehybrid", "lfm2", "phi3", "qwen3_5")


def make_recipe(folder: Path, **changes) -> Recipe:
    settings = {
        "model": str(folder),
        "data": "rows",
        "model_hash": "",
        "data_hash": "",
        "template_hash": "",
        "precision": "fp32",
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "targets": TARGETS,
        "batch_size": 4,
        "max_length": 256,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "schedule": "cosine",
        "steps": 10,
        "warmup_steps": 2,
        "eval_every": 4,
        "seed": 0,
    }
    return Recipe(**(settings | changes))


def make_plan(name: str, **changes) -> Plan:
    device = MLX_DEVICE if name == "mlx" else DEVICE
    return Plan(**({"backend": name, "device": device, "micro_batch_tokens": 300, "save_every": 3} | changes))


def create(name: str) -> Backend:
    return importlib.import_module(f"{name}_backend").create()


def start_adapter(folder: Path, recipe: Recipe) -> Adapter | None:
    if recipe.method == "full":
        return None
    model = ModelFolder(folder)
    layers = model.config["num_hidden_layers"]
    return initial_adapter(choose_layers(linear_shapes(model, recipe.targets), recipe.layers, layers), layers, recipe)


def load(name: str, folder: Path, recipe: Recipe, **plan) -> Backend:
    backend = create(name)
    backend.load(recipe, make_plan(name, **plan), folder, start_adapter(folder, recipe))
    return backend


def encode_rows(folder: Path, rows: Path) -> list[Encoded]:
    (encoded,), _ = encode_parts([read_rows(rows)], Encoder(load_tokenizer(folder), MaskingOptions()), "error")
    return [*encoded]


def run_steps(
    backend: Backend, recipe: Recipe, rows: list[Encoded], steps: int, micro_batch_tokens: int = 300
) -> list[float]:
    """The mean token loss of each step."""
    losses = []
    for step in range(1, steps + 1):
        chosen = [rows[i] for i in step_rows(len(rows), recipe.batch_size, recipe.seed, step)]
        result = backend.train_step(micro_batches(chosen, micro_batch_tokens), recipe.learning_rate, step)
        losses.append(float(result.loss_sum) / result.weight_sum)
    return losses


def weighted(rows: list[Encoded]) -> list[Encoded]:
    """The rows with fractions as loss weights, other ones at the end of each row."""
    found = []
    for number, row in enumerate(rows):
        loss_weights = row.loss_weights * np.float32((0.5, 1.0, 0.1, 3.0)[number % 4])
        loss_weights[-4:] *= np.float32(0.3)
        found.append(replace(row, loss_weights=loss_weights))
    return found


def plain_loss(
    hidden: np.ndarray,
    weight: np.ndarray,
    labels: np.ndarray,
    loss_weights: np.ndarray,
    divisor: float,
    cap: float | None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss with all its logits in float64, and its gradients by hidden [N, H] and weight [V, H]."""
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    logits = hidden @ weight.T / divisor
    derivative = np.ones_like(logits)
    if cap:
        derivative = 1 - np.tanh(logits / cap) ** 2
        logits = np.tanh(logits / cap) * cap
    top = logits.max(1, keepdims=True)
    sums = np.log(np.exp(logits - top).sum(1, keepdims=True)) + top
    error = np.exp(logits - sums)
    error[np.arange(len(labels)), labels] -= 1
    error *= loss_weights[:, None] * derivative / divisor
    loss = ((sums[:, 0] - logits[np.arange(len(labels)), labels]) * loss_weights).sum()
    return loss, error @ weight, error.T @ hidden


def relative_difference(one: dict, other: dict) -> float:
    """The largest relative Frobenius difference between matrices of the same name."""
    return max(np.linalg.norm(one[n] - other[n]) / max(np.linalg.norm(one[n]), 1e-12) for n in one)


def trained(backend: Backend) -> tuple[OptimizerState, Adapter]:
    """What it has trained, in arrays that later steps do not change."""
    state = backend.get_optimizer()
    moments = ({name: array.copy() for name, array in part.items()} for part in (state.exp_avg, state.exp_avg_sq))
    return OptimizerState(state.step, *moments), backend.get_adapter().copied()


def matrices(backend: Backend) -> dict[str, np.ndarray]:
    return dict(backend.get_adapter().arrays())


class Quiet:
    """An observer that asks to stop after step `stop_at`."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at, self.at, self.warnings = stop_at, 0, []

    def step(self, line, memory) -> None:
        self.at = line["step"]
        assert memory.peak >= 0
        assert memory.total > 0

    def evaluation(self, line) -> None: ...

    def say(self, text) -> None: ...

    def warn(self, text) -> None:
        self.warnings.append(text)

    def stop_requested(self) -> bool:
        return self.at == self.stop_at - 1  # a step is reported while the next one runs


def check_loss_weights(name: str, folder: Path, rows: list[Encoded]) -> None:
    """The loss and its gradient's norm are those of a plain loop over weighted rows, with transformers' own model."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    rows, recipe = weighted(rows[:6]), make_recipe(folder, method="full", max_grad_norm=0.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None  # the end of a turn, which is a label, serves as pad too
    loss, total = torch.zeros(()), 0.0
    for row in rows:
        ids, loss_weights = torch.from_numpy(row.ids).long(), torch.from_numpy(row.loss_weights[1:])
        losses = cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        loss, total = loss + (losses * loss_weights).sum(), total + float(loss_weights.sum())
    (loss / total).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    backend, batches = load(name, folder, recipe, loss_chunk=7), micro_batches(rows, 120)
    evaluated = [backend.eval_step(batch) for batch in batches]
    result = backend.train_step(batches, 1e-3, 1)
    assert len(batches) > 1
    for results in (evaluated, [result]):
        assert sum(r.weight_sum for r in results) == pytest.approx(total)
        assert sum(r.label_tokens for r in results) == sum(int((row.loss_weights > 0).sum()) for row in rows)
        assert sum(float(r.loss_sum) for r in results) == pytest.approx(loss.item(), rel=1e-5)
    assert float(result.grad_norm) == pytest.approx(norm.item(), rel=1e-4)
    backend.close()


def check_equal_weights(name: str, folder: Path, rows: list[Encoded]) -> None:
    """All rows by half are all rows; a row that weighs 2 is that row twice."""
    half = [replace(row, loss_weights=row.loss_weights * np.float32(0.5)) for row in rows]
    double = replace(rows[0], loss_weights=rows[0].loss_weights * np.float32(2))
    found = []
    for chosen in (rows[:4], half[:4], [double, *rows[1:3]], [rows[0], *rows[:3]]):
        backend = load(name, folder, make_recipe(folder))
        losses = []
        for step in (1, 2, 3):
            result = backend.train_step(micro_batches(chosen, 120), 1e-2, step)
            losses.append(float(result.loss_sum) / result.weight_sum)
        found.append(losses)
        backend.close()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[3], rtol=1e-5)
    assert abs(found[0][0] - found[2][0]) > 1e-3


def check_what_weight_decay_spares(name: str, folder: Path, rows: list[Encoded], **changes) -> set[str]:
    """Norms, biases, embeddings and magnitudes train as without decay; all else is `rate * decay` of itself less.

    Returns the names of what is spared.
    """
    trained = []
    for decay in (0.0, 0.5):
        backend = load(name, folder, make_recipe(folder, weight_decay=decay, **changes))
        before = matrices(backend)
        backend.train_step([make_batch(rows[:4])], 1e-2, 1)
        trained.append(matrices(backend))
        backend.close()
    plain, decayed = trained
    spared = {n for n, array in before.items() if array.ndim == 1 or n.endswith("embed_tokens.weight")}
    for key, array in before.items():
        share = 0.0 if key in spared else 1e-2 * 0.5
        np.testing.assert_allclose(decayed[key], plain[key] - share * array, atol=1e-6, err_msg=key)
    assert any(np.abs(before[key]).max() > 0.1 for key in before.keys() - spared)
    return spared


def check_cutting_changes_nothing(name: str, folder: Path, rows: list[Encoded]) -> None:
    rows, recipe = weighted(rows), make_recipe(folder)
    results = []
    for budget in (1, 60, 10_000):
        backend = load(name, folder, recipe)
        results.append((run_steps(backend, recipe, rows, 4, budget), matrices(backend)))
        backend.close()
    for losses, adapter in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=2e-5)
        assert relative_difference(results[0][1], adapter) < 1e-3


def check_fused_equals_adapter(name: str, folder: Path, rows: list[Encoded], out: Path, **changes) -> None:
    recipe = make_recipe(folder, **changes)
    backend = load(name, folder, recipe)
    run_steps(backend, recipe, rows, 4)
    tuned, base = backend.logits(rows[0].ids), backend.logits(rows[0].ids, adapter=False)
    adapter = backend.get_adapter()
    backend.close()
    assert np.abs(tuned - base).max() > 0.1, "the adapter must change something"
    out.mkdir()
    copy_all_but_weights(folder, out)
    fuse(ModelFolder(folder), adapter, out, lambda share, text: None)
    fused = load(name, out, make_recipe(folder))  # with an adapter of zeros
    np.testing.assert_allclose(fused.logits(rows[0].ids), tuned, atol=2e-4)
    fused.close()


def check_clipping(name: str, folder: Path, rows: list[Encoded]) -> None:
    """A limit below every gradient's norm changes the adapter, one above changes nothing: 0 sets no limit.

    AdamW does not see the scale of gradients, but it does see that steps of other norms become alike.
    """
    trained = {}
    for limit in (0.0, 1e9, 1e-3):
        backend = load(name, folder, recipe := make_recipe(folder, max_grad_norm=limit, batch_size=1))
        run_steps(backend, recipe, rows, 4)
        trained[limit] = matrices(backend)
        backend.close()
    assert relative_difference(trained[0.0], trained[1e9]) == 0
    assert relative_difference(trained[0.0], trained[1e-3]) > 1e-3


def check_adapter_off_is_the_base(name: str, folder: Path, rows: list[Encoded]) -> None:
    recipe = make_recipe(folder)
    backend = load(name, folder, recipe)
    untouched = backend.logits(rows[0].ids)
    run_steps(backend, recipe, rows, 2)
    np.testing.assert_array_equal(backend.logits(rows[0].ids, adapter=False), untouched)
    backend.close()


def check_generation(name: str, folder: Path, rows: list[Encoded], atol: float = 2e-5, **changes) -> None:
    """Greedy tokens and their logits equal those computed again for every prefix, over windows and longrope's split.

    With the adapter and without, both at once in turns.
    """
    recipe = make_recipe(folder, **changes)
    backend = load(name, folder, recipe)
    run_steps(backend, recipe, rows, 3)
    prompt, seen = rows[0].ids[:20], {}

    def watched(adapter):
        def sampler(logits, ids):
            seen[adapter].append((list(ids), logits))
            return int(logits.argmax())

        seen[adapter] = []
        return backend.generate(prompt, 40, [], sampler, adapter)

    tuned, base = map(list, zip(*zip(watched(True), watched(False), strict=True), strict=True))
    assert np.abs(seen[True][0][1] - seen[False][0][1]).max() > 1e-3, "the adapter must change something"
    for adapter, made in ((True, tuned), (False, base)):
        assert [ids for ids, _ in seen[adapter]] == [[*prompt, *made[:n]] for n in range(40)]
        for (ids, logits), token in zip(seen[adapter], made, strict=True):
            fresh = backend.logits(np.array(ids), adapter)[-1]
            np.testing.assert_allclose(logits, fresh, atol=atol)
            assert token == fresh.argmax()
    stop = tuned[7]
    first = tuned.index(stop)
    assert list(backend.generate(prompt, 40, [stop], lambda logits, ids: int(logits.argmax()))) == tuned[:first]
    run_steps(backend, recipe, rows, 1)  # training continues
    backend.close()


def check_resume_is_bit_identical(name: str, folder: Path, rows: list[Encoded], run: Path, dropout: float) -> None:
    """Uninterrupted against stopped by request at step 5 and resumed; tests/e2e kills a process.

    Then both are lengthened from step 10 to 16, and the second is stopped at step 13 and resumed.
    """
    recipe = make_recipe(folder, dropout=dropout)

    def go(where: Path, state: State, stop_at: int = 0) -> State:
        backend = load(name, folder, recipe)
        if found := checkpoint.latest(where, recipe.hash(), parent=recipe.parent):
            state = found[0]
            backend.set_adapter(found[1])
            backend.set_optimizer(found[2])
        try:
            loop = TrainingLoop(backend, recipe, make_plan(name), rows[4:], rows[:4], where, state, Quiet(stop_at))
            return loop.train()
        finally:
            backend.close()

    def losses(where: Path) -> str:
        lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        return repr([(line["step"], line.get("loss"), line.get("valid_loss")) for line in lines])

    uninterrupted, stopped = run / "uninterrupted", run / "stopped"
    for folder_ in (uninterrupted, stopped):
        folder_.mkdir(parents=True)
    final = go(uninterrupted, State(micro_batch_tokens=300))
    try:
        go(stopped, State(micro_batch_tokens=300), stop_at=5)
        raise AssertionError("the stop was ignored")
    except Interrupted:
        pass
    resumed = go(stopped, State())
    assert losses(stopped) == losses(uninterrupted)
    assert (resumed.best_step, resumed.best_valid_loss) == (final.best_step, final.best_valid_loss)
    recipe = recipe.model_copy(update={"steps": 16, "parent": Parent(recipe=recipe.hash(), step=10)})
    go(uninterrupted, State())
    try:
        go(stopped, State(), stop_at=13)
        raise AssertionError("the stop was ignored")
    except Interrupted:
        pass
    go(stopped, State())
    assert "(16, " in losses(uninterrupted)
    assert losses(stopped) == losses(uninterrupted)
    both = [read_peft(checkpoint._folder(where, 16) / "adapter").weights for where in (stopped, uninterrupted)]
    for module, weight in both[0].items():
        np.testing.assert_array_equal(weight.B, both[1][module].B)


def check_an_exchanged_adapter_trains_as_a_loaded_one(name: str, folder: Path, rows: list[Encoded], **changes) -> None:
    recipes = [
        make_recipe(folder, **changes),
        make_recipe(folder, rank=8, dropout=0.1, seed=5, learning_rate=3e-3, **changes),
        make_recipe(folder, rank=2, targets=["q_proj", "down_proj"], **changes),
    ]

    def outcome(backend: Backend, recipe: Recipe) -> tuple:
        losses = run_steps(backend, recipe, rows, 3)
        loss = float(backend.eval_step(make_batch(rows[:4])).loss_sum)
        moments, adapter = trained(backend)
        return losses, loss, adapter.arrays(), moments.step, moments.exp_avg

    expected = []
    for recipe in recipes:
        backend = load(name, folder, recipe, gradient_checkpointing=recipe.rank == 8)
        expected.append(outcome(backend, recipe))
        backend.close()
    backend = load(name, folder, recipes[1])
    run_steps(backend, recipes[1], rows, 1)
    for recipe, wanted in zip(recipes, expected, strict=True):
        plan = make_plan(name, gradient_checkpointing=recipe.rank == 8)
        adapter = start_adapter(folder, recipe)
        assert adapter is not None
        backend.exchange(recipe, plan, adapter)
        found = outcome(backend, recipe)
        assert found[:2] == wanted[:2]
        assert found[3] == wanted[3] == 3
        for key in (2, 4):
            assert found[key].keys() == wanted[key].keys()
            for array in wanted[key]:
                np.testing.assert_array_equal(found[key][array], wanted[key][array])
    backend.close()


def check_optimizer_state_round_trip(name: str, folder: Path, rows: list[Encoded]) -> None:
    recipe = make_recipe(folder)
    backend = load(name, folder, recipe)
    run_steps(backend, recipe, rows, 3)
    state, adapter = trained(backend)
    expected = run_steps(backend, recipe, rows, 3)
    backend.close()
    assert state.step == 3
    name_ = min(adapter.weights)
    assert state.exp_avg[f"{name_}.lora_A"].shape == adapter.weights[name_].A.shape
    assert state.exp_avg_sq[f"{name_}.lora_B"].shape == adapter.weights[name_].B.shape
    other = load(name, folder, recipe)
    other.set_adapter(adapter)
    other.set_optimizer(state)
    assert run_steps(other, recipe, rows, 3) == expected
    other.close()


def check_bf16_base_has_float32_adapter(name: str, folder: Path, rows: list[Encoded]) -> None:
    recipe = make_recipe(folder, precision="bf16")
    backend = load(name, folder, recipe)
    losses = run_steps(backend, recipe, rows, 3)
    assert losses[-1] < losses[0]
    for name_, matrix in matrices(backend).items():
        assert matrix.dtype == np.float32
        assert np.any(matrix != matrix.astype(ml_dtypes.bfloat16).astype(np.float32)), name_
    backend.close()


def check_out_of_memory_is_raised(name: str, folder: Path, rows: list[Encoded], monkeypatch) -> None:
    """An injected out-of-memory in a step and in validation raises OutOfMemory, and leaves the step repeatable."""
    module = importlib.import_module(f"{name}_backend.forward")
    recipe = make_recipe(folder)
    clean = load(name, folder, recipe)
    expected = run_steps(clean, recipe, rows, 2)
    clean.close()
    backend = load(name, folder, recipe)
    real, calls = module.loss_sum, []

    def second_call_fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("[malloc] out of memory: can't allocate memory")
        return real(*arguments)

    monkeypatch.setattr(module, "loss_sum", second_call_fails)
    batches = micro_batches([rows[i] for i in step_rows(len(rows), 4, 0, 1)], 60)
    assert len(batches) > 1
    with pytest.raises(OutOfMemory):
        backend.train_step(batches, recipe.learning_rate, 1)
    np.testing.assert_allclose(run_steps(backend, recipe, rows, 2), expected, rtol=2e-5)
    calls[:] = [1]
    with pytest.raises(OutOfMemory):
        backend.eval_step(batches[0])
    backend.close()


def check_quantized_base(name: str, folder: Path, rows: list[Encoded], scheme: str, out: Path) -> None:
    """A quantized base trains; its dequantized weights fused with the adapter compute what training computed."""
    recipe = make_recipe(folder, quantization=scheme)
    plain = load(name, folder, make_recipe(folder))
    untouched = plain.logits(rows[0].ids)
    plain.close()
    backend = load(name, folder, recipe)
    error = np.abs(backend.logits(rows[0].ids, adapter=False) - untouched).max()
    assert error > 1e-3, "the base is not quantized"
    losses = run_steps(backend, recipe, rows, 6)
    assert losses[-1] < losses[0]
    tuned, adapter, replaced = backend.logits(rows[0].ids), backend.get_adapter(), backend.dequantized()
    assert set(replaced) == {f"{module}.weight" for module in linear_shapes(ModelFolder(folder), TARGETS)}
    out.mkdir()
    copy_all_but_weights(folder, out)
    fuse(ModelFolder(folder), adapter, out, lambda share, text: None, replaced)
    backend.close()
    fused = load(name, out, make_recipe(folder))
    difference = np.abs(fused.logits(rows[0].ids) - tuned).max()
    fused.close()
    if scheme == "int8":  # bitsandbytes rounds the activations to 8 bits too, which no weight can hold
        original = load_file(folder / "model.safetensors")
        for key, tensor in replaced.items():
            step = np.abs(original[key]).max(1, keepdims=True) / 127
            assert (np.abs(tensor() - original[key]) <= 0.55 * step).all(), key  # it goes through float16 first
    else:
        assert difference < 1e-3


def check_full_fusion(name: str, folder: Path, rows: list[Encoded], out: Path) -> None:
    """Full fine-tuning: the fused folder holds just what was trained, head and norms included."""
    recipe = make_recipe(folder, method="full", learning_rate=1e-3)
    backend = load(name, folder, recipe)
    run_steps(backend, recipe, rows, 4)
    tuned, adapter = backend.logits(rows[0].ids), backend.get_adapter().copied()
    backend.close()
    header = read_header(folder / "model.safetensors")[0]
    assert adapter.full.keys() == header.keys()
    out.mkdir()
    copy_all_but_weights(folder, out)
    fuse(ModelFolder(folder), adapter, out, lambda share, text: None)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert [key for key in before if np.array_equal(before[key], after[key])] == []
    fused = load(name, out, make_recipe(folder))
    np.testing.assert_allclose(fused.logits(rows[0].ids), tuned, atol=1e-5)
    fused.close()


def copy_all_but_weights(folder: Path, out: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
