"""mlx-lm reads what Twintune writes, and Twintune what mlx-lm writes: the same logits, for every method."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

from common.errors import UserError
from common.models.adapter_files import read_any, write_both
from common.models.families import is_multimodal
from common.models.model_folder import ModelFolder
from tests import backends
from tests.backends import METHODS
from tests.tiny import write_family, write_rows


@pytest.fixture(scope="module")
def rows(tiny_llama, tmp_path_factory):
    return backends.encode_rows(tiny_llama, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


@pytest.fixture(autouse=True)
def _on_the_cpu():
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()


def base(folder):
    from common.models.families import normalize_config

    config = normalize_config(json.loads((folder / "config.json").read_text()))
    return load_model(folder, model_config=config)[0]


def logits(model, rows):
    model.eval()
    return np.array(model(mx.array(rows[0].ids)[None])[0])


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_mlx_lm_loads_an_adapter_of_ours(tiny_llama, rows, tmp_path, changes):
    recipe = backends.make_recipe(tiny_llama, **changes)
    backend = backends.load("mlx", tiny_llama, recipe)
    backends.run_steps(backend, recipe, rows, 3)
    write_both(tmp_path, backend.get_adapter())
    expected = backend.logits(rows[0].ids)
    backend.close()
    found = logits(load_adapters(base(tiny_llama), str(tmp_path / "adapter-mlx")), rows)
    assert abs(found - expected).max() < 1e-4


def test_mlx_lm_adapts_a_qwen_vl_whose_files_name_a_text_models_layers(rows, tmp_path):
    folder = write_family(tmp_path / "base", "qwen2_5_vl", older=True)
    recipe = backends.make_recipe(folder)
    backend = backends.load("mlx", folder, recipe)
    backends.run_steps(backend, recipe, rows, 3)
    assert min(backend.get_adapter().weights).startswith("model.layers.0.")
    write_both(tmp_path, backend.get_adapter(), is_multimodal(ModelFolder(folder).written_config))
    expected = backend.logits(rows[0].ids)
    backend.close()
    found = logits(load_adapters(base(folder), str(tmp_path / "adapter-mlx")), rows)
    assert abs(found - expected).max() < 1e-4


def write_mlx_lms_own(tiny_llama, rows, folder, kind="lora", num_layers=2, keys=None):
    """An adapter as mlx_lm.lora saves it, with random matrices; its logits."""
    model = base(tiny_llama)
    model.freeze()
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, num_layers, settings, use_dora=kind == "dora")
    mx.random.seed(0)
    changed = {"lora_b": lambda p: 0.1 * mx.random.normal(p.shape), "m": lambda p: 1.1 * p}
    model.update(
        tree_map_with_path(lambda k, p: changed.get(k.split(".")[-1], lambda p: p)(p), model.trainable_parameters())
    )
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings, "model": "some/model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return logits(model, rows)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kind": "dora"}, {"num_layers": 1}, {"keys": ["self_attn.v_proj"]}],
    ids=["lora", "dora", "last layer", "keys"],
)
def test_an_adapter_of_mlx_lms_is_gone_on_with(tiny_llama, rows, tmp_path, settings):
    expected = write_mlx_lms_own(tiny_llama, rows, tmp_path / "theirs", **settings)
    adapter = read_any(tmp_path / "theirs", 2)
    recipe = backends.make_recipe(tiny_llama)
    for name in ("torch", "mlx"):
        backend = backends.create(name)
        backend.load(recipe, backends.make_plan(name), tiny_llama, adapter)
        assert abs(backend.logits(rows[0].ids) - expected).max() < 1e-4, name
        losses = backends.run_steps(backend, recipe, rows, 4)
        assert losses[-1] < losses[0]
        backend.close()


def test_an_adapter_that_is_no_adapter_is_refused_by_name(tiny_llama, rows, tmp_path):
    write_mlx_lms_own(tiny_llama, rows, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora"', '"full"'))
    with pytest.raises(UserError, match="its fine_tune_type is full"):
        read_any(tmp_path / "theirs", 2)
