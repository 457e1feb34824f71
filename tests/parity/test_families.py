"""Every family on both backends, in float32 from one adapter start: tiny models in today's layout and an older one."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from common.export.fused_folder import ServingConfig, write_fused
from common.models.adapter_files import read_mlx, read_peft, write_both
from common.models.families import forward_config, normalize_config, text_config
from common.models.model_folder import ModelFolder
from common.models.resolve import check_folder
from common.verify.tiny_models import TINY, write_tiny
from tests import backends
from tests.tiny import FAMILIES, write_family, write_rows

_PARTS = {"targets": ["mlp"], "rank_pattern": {"input_linear": 2}, "alpha_pattern": {"output_linear": 3.0}}
# Plans under which the two backends must agree; each is a dict of changes to tests.backends.make_plan.
PLANS = {"plain": {}, "checkpointing": {"gradient_checkpointing": True}}
# mlx-lm's bf16 norms and scalars round a little more than transformers' (CONTRIBUTING.md)
BF16_ROUNDING = 1.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of a family in a layout, made once."""
    made = {}

    def folder(family, layout="today"):
        if (family, layout) not in made:
            where = tmp_path_factory.mktemp("families") / f"{family}-{layout}"
            made[family, layout] = write_family(where, family, older=layout == "older")
        return made[family, layout]

    return folder


@pytest.fixture(scope="module")
def rows(folders, tmp_path_factory):
    """48 to 105 tokens: some longer than the models' windows and original contexts, some not."""
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", longest=60)
    return backends.encode_rows(folders("llama"), path)


@pytest.mark.parametrize(
    ("layout", "plan", "steps"),
    [
        ("today", "plain", 20),
        ("older", "plain", 3),
        ("today", "checkpointing", 4),
        pytest.param("today", "plain", 50, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_agree(family, layout, plan, steps, folders, rows):
    folder = folders(family, layout)
    check_folder(ModelFolder(folder), family)
    recipe = backends.make_recipe(folder, learning_rate=2e-3)
    results = []
    for name in ("torch", "mlx"):
        backend = backends.load(name, folder, recipe, **PLANS[plan])
        logits = [backend.logits(row.ids) for row in (rows[0], rows[-1])]
        losses = np.array(backends.run_steps(backend, recipe, rows, steps, micro_batch_tokens=1000))
        results.append((logits, losses, backends.matrices(backend)))
        backend.close()
    torch, mlx = results
    far = max(np.abs(a - b).max() for a, b in zip(torch[0], mlx[0], strict=True))
    apart = (np.abs(mlx[1] - torch[1]) / torch[1]).max()
    adapters = backends.relative_difference(torch[2], mlx[2])
    print(f"{family} {layout} {plan}: logits {far:.1e}, step losses {apart:.1e}, adapters {adapters:.1e}")
    assert far < 1e-4
    assert apart < 1e-4
    assert adapters < (1e-3 if steps >= 20 else backends.FIRST_STEPS)
    assert steps < 20 or torch[1][-1] < torch[1][0] / 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_older_layout_is_the_same_model(family, folders):
    new, old = (
        text_config(json.loads((folders(family, layout) / "config.json").read_text())) for layout in ("today", "older")
    )
    assert forward_config(new) == forward_config(old)
    same = set(new) & set(old) - {"dtype", "torch_dtype"}
    assert {key: new[key] for key in same} == {key: old[key] for key in same}


@pytest.mark.parametrize("family", TINY)
def test_transformers_saves_a_tiny_model_as_it_is_written_here(family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_tiny(tmp_path / "ours", family)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert forward_config(text_config(ours)) == forward_config(text_config(theirs))
    assert {key: theirs[key] for key in ours if key != "rope_parameters"} == {
        key: ours[key] for key in ours if key != "rope_parameters"
    }


def test_without_our_normalized_config_mlx_lm_is_silently_wrong(folders, rows, tmp_path):
    import torch
    from mlx_lm.utils import load_model
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.float32)
    saved.save_pretrained(tmp_path)
    folder, ids = tmp_path, rows[-1].ids
    raw = load_model(folder)[0]
    naive = np.array(raw(mx.array(ids)[None])[0])
    logits = {}
    for name in ("torch", "mlx"):
        backend = backends.load(name, folder, backends.make_recipe(folder))
        logits[name] = backend.logits(ids)
        backend.close()
    assert np.abs(naive - logits["torch"]).max() > 0.1
    assert np.abs(logits["mlx"] - logits["torch"]).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_base_rounds_alike(family, folders, rows):
    folder, logits = folders(family), {}
    for name, precision in (("torch", "fp32"), ("torch", "bf16"), ("mlx", "bf16")):
        backend = backends.load(name, folder, backends.make_recipe(folder, precision=precision))
        logits[name, precision] = np.concatenate([backend.logits(row.ids) for row in rows[::6]])
        backend.close()
    rounded = logits["torch", "fp32"]
    torch, mlx = (np.sqrt(np.mean((logits[name, "bf16"] - rounded) ** 2)) for name in ("torch", "mlx"))
    assert mlx < BF16_ROUNDING * torch


@pytest.mark.parametrize(("method", "bits"), [("lora", 16), ("dora", 16), ("full", 32)])
def test_a_frozen_table_of_embeddings_of_each_layer_stays_as_it_is_stored(method, bits, folders, rows, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, found = tmp_path / "half", {}
    AutoModelForCausalLM.from_pretrained(folders("gemma4_text"), dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("torch", "mlx"):
        backend = backends.load(name, folder, backends.make_recipe(folder, method=method))
        table = backend.model.model.embed_tokens_per_layer.weight
        assert 8 * table.itemsize == bits
        found[name] = backend.logits(rows[-1].ids)
        backend.close()
    np.testing.assert_allclose(found["mlx"], found["torch"], atol=1e-4)


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_longrope_rows_loss_is_its_own_whatever_rows_lie_beside_it(name, folders, rows):
    from common.data.batching import make_batch

    folder = folders("phi3")
    backend = backends.load(name, folder, backends.make_recipe(folder))
    chosen = [min(rows, key=lambda row: len(row.ids)), max(rows, key=lambda row: len(row.ids))]
    assert len(chosen[0].ids) <= 48 < len(chosen[1].ids)
    alone = [float(backend.eval_step(make_batch([row])).loss_sum) for row in chosen]
    together = float(backend.eval_step(make_batch(chosen)).loss_sum)
    backend.close()
    assert together == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("layout", ["today", "older"])
def test_a_multimodal_models_text_part_is_trained_and_the_rest_kept(layout, folders, rows, tmp_path):
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from peft import PeftModel
    from transformers import Gemma3ForConditionalGeneration

    folder, ids = folders("gemma3", layout), rows[-1].ids
    recipe = backends.make_recipe(folder)
    inputs = torch.from_numpy(ids.astype(np.int64))[None]

    def logits_of(model):
        with torch.no_grad():
            return model.eval()(input_ids=inputs, token_type_ids=torch.zeros_like(inputs)).logits[0].float().numpy()

    tuned = {}
    for name in ("torch", "mlx"):
        backend = backends.load(name, folder, recipe)
        base = logits_of(Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))
        np.testing.assert_allclose(backend.logits(ids), base, atol=1e-4)
        backends.run_steps(backend, recipe, rows, 3)
        tuned[name], adapter = backend.logits(ids), backend.get_adapter()
        backend.close()
    assert min(adapter.weights) == "model.language_model.layers.0.mlp.down_proj"
    assert np.abs(tuned["mlx"] - base).max() > 0.1
    np.testing.assert_allclose(tuned["mlx"], tuned["torch"], atol=1e-3)

    write_both(tmp_path, adapter)
    peft, mlx = (
        load_file(tmp_path / file) for file in ("adapter/adapter_model.safetensors", "adapter-mlx/adapters.safetensors")
    )
    assert min(peft) == "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    assert min(mlx) == "language_model.model.layers.0.mlp.down_proj.lora_a"
    assert read_peft(tmp_path / "adapter").weights.keys() == read_mlx(tmp_path / "adapter-mlx").weights.keys()
    model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_allclose(
        logits_of(PeftModel.from_pretrained(model, tmp_path / "adapter")), tuned["mlx"], atol=1e-4
    )

    fused = tmp_path / "fused"
    write_fused(ModelFolder(folder), adapter, fused, ServingConfig([2]), lambda share, text: None)
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert (fused / name).read_bytes() == (folder / name).read_bytes()
    before, after = load_file(folder / "model.safetensors"), load_file(fused / "model.safetensors")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert len(changed) == len(adapter.weights)
    assert all("language_model" in name for name in changed)
    reloaded = logits_of(Gemma3ForConditionalGeneration.from_pretrained(fused, dtype=torch.float32))
    np.testing.assert_allclose(reloaded, tuned["mlx"], atol=2e-4)
    if layout == "today":  # mlx-lm reads no other
        config = normalize_config(json.loads((folder / "config.json").read_text()))
        model = load_adapters(load_model(folder, model_config=config)[0], str(tmp_path / "adapter-mlx"))
        found = model.language_model.model.layers[0].mlp.down_proj.lora_b
        np.testing.assert_array_equal(np.array(found).T, adapter.weights[min(adapter.weights)].B)


def test_a_granite_4_without_positions_is_computed_alike(rows, tmp_path):
    changes = {"position_embedding_type": None}  # transformers' way to say it
    folder, logits = write_tiny(tmp_path, "granitemoehybrid", changes), {}
    for name in ("torch", "mlx"):
        backend = backends.load(name, folder, backends.make_recipe(folder))
        logits[name] = backend.logits(rows[-1].ids)
        backend.close()
    np.testing.assert_allclose(logits["mlx"], logits["torch"], atol=1e-4)
    backend = backends.load("mlx", write_tiny(tmp_path, "granitemoehybrid"), backends.make_recipe(folder))
    assert np.abs(backend.logits(rows[-1].ids) - logits["mlx"]).max() > 1e-2
    backend.close()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(("glm4", {}), ("lfm2", {}), ("lfm2", {"method": "dora"})),
        *(("granitemoehybrid", changes) for changes in ({}, {"method": "dora"}, _PARTS)),
    ],
)
def test_peft_and_mlx_lm_read_an_adapter_of_matrices_with_names_of_their_own(family, changes, folders, rows, tmp_path):
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, ids = folders(family), rows[-1].ids
    recipe = backends.make_recipe(folder, **changes)
    backend = backends.load("torch", folder, recipe)
    base = backend.logits(ids)
    backends.run_steps(backend, recipe, rows, 3)
    tuned, adapter = backend.logits(ids), backend.get_adapter().copied()
    backend.close()
    assert np.abs(tuned - base).max() > 0.1
    write_both(tmp_path, adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        found = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, tuned, atol=1e-4)
    config = normalize_config(json.loads((folder / "config.json").read_text()))
    with mx.stream(mx.cpu):
        model = load_adapters(load_model(folder, model_config=config)[0], str(tmp_path / "adapter-mlx"))
        np.testing.assert_allclose(np.array(model(mx.array(ids)[None])[0]), tuned, atol=1e-4)


@pytest.mark.parametrize("size", [259, 256, 200, 262144])
def test_the_loss_over_a_large_vocabulary_is_exact(size):
    from mlx_backend.loss import log_sum_exp

    logits = np.random.default_rng(0).normal(0, 2, (8, size)).astype(np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    with mx.stream(mx.cpu):
        np.testing.assert_allclose(np.array(log_sum_exp(mx.array(logits))), exact, atol=5e-6)
