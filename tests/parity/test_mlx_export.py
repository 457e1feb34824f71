"""--export mlx: mlx-lm's own loader reads the folder, and computes with its rounded weights what the backends would."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import convert, load
from safetensors.numpy import load_file, save_file

from common.display import Display
from common.errors import UserError
from common.export import mlx
from common.export.fused_folder import ServingConfig, write_fused
from common.export.mlx import check_installed, check_model, write_mlx_model
from common.models.families import normalize_config, text_name
from common.models.model_folder import ModelFolder
from common.system import hardware
from common.verify.tiny_models import TINY, write_tiny
from tests import backends
from tests.progress import silent
from tests.tiny import FAMILIES, MULTIMODAL, write_family, write_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSED = ("olmo3", "phi3")  # with an attention_factor of its own, or longrope
KINDS = [(family, "today") for family in FAMILIES if family not in REFUSED]
KINDS += [(family, "older") for family in ("llama", *MULTIMODAL)]  # a fused config is one of today
KINDS += [(family, "plain") for family in REFUSED]


@pytest.fixture(autouse=True)
def _on_the_cpu():
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()


def write_base(folder, family, layout):
    if layout == "plain":
        changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
        if family == "olmo3":
            kinds = TINY["olmo3"]["rope_parameters"]
            full = {key: value for key, value in kinds["full_attention"].items() if key != "attention_factor"}
            changes = {"rope_parameters": {**kinds, "full_attention": full}}
        write_tiny(folder, family, changes | {"original_max_position_embeddings": 4096})
        write_tokenizer(folder)
    else:
        write_family(folder, family, older=layout == "older")
    (folder / "LICENSE").write_text("terms")
    return folder


def rounded(fused, model, out):
    """The fused folder with every weight that was quantized as mlx-lm sees it, in float32."""
    backends.copy_all_but_weights(fused, out)
    stored = load_file(fused / "model.safetensors")
    names, seen = {text_name(name): name for name in stored}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            seen[text_name(f"{path}.weight")] = np.array(weight.astype(mx.float32))
    for at in [name.removesuffix("mlp.gate_proj.weight") for name in seen.keys() - names if "gate_proj" in name]:
        parts = [seen.pop(f"{at}mlp.{part}_proj.weight") for part in ("gate", "up")]  # of a Granite 4
        seen[f"{at}shared_mlp.input_linear.weight"] = np.concatenate(parts)  # output_linear is too small here
    stored |= {names[name]: weight for name, weight in seen.items()}
    language_model = getattr(model, "language_model", model)
    stored.pop("lm_head.weight" if "lm_head" not in language_model else "", None)  # tied, and saved all the same
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return len(seen)


def in_this_process(command, log, line, env):
    """In place of one of its own, which imports mlx-lm for seconds; other tests here start it."""
    fused, out, scheme = command[-3:]
    mlx.quantize(Path(fused), Path(out), scheme)
    return 0, ""


@pytest.mark.parametrize(("family", "layout"), KINDS, ids=lambda part: part)
def test_mlx_lm_computes_the_fused_model(tmp_path, family, layout, monkeypatch):
    monkeypatch.setattr(mlx, "run_logged", in_this_process)
    base = write_base(tmp_path / "base", family, layout)
    adapter = backends.start_adapter(base, backends.make_recipe(base))
    random = np.random.default_rng(1)
    for weight in adapter.weights.values():
        weight.B[:] = random.normal(0, 0.1, weight.B.shape)
    write_fused(ModelFolder(base), adapter, tmp_path / "fused", ServingConfig([2, 0], TEMPLATE), silent)
    report = write_mlx_model(tmp_path / "fused", tmp_path / "mlx", silent)
    assert (report["bits"], report["folder"]) == (4, "mlx")
    assert not (tmp_path / "mlx.log").exists()

    model, tokenizer = load(str(tmp_path / "mlx"))
    (tmp_path / "rounded").mkdir()
    assert rounded(tmp_path / "fused", model, tmp_path / "rounded") > 7
    ids = random.integers(3, 259, 20).astype(np.int32)  # shorter than every window
    got = np.array(model(mx.array(ids)[None])[0].astype(mx.float32))
    logits = {}
    for name in ("rounded", "fused"):
        backend = backends.load("torch", tmp_path / name, backends.make_recipe(tmp_path / name))
        logits[name] = backend.logits(ids)
        backend.close()
    assert np.abs(got - logits["rounded"]).max() < 1e-4
    assert np.abs(got - logits["fused"]).max() > 1e-2  # it is in 4 bits

    assert set(tokenizer.eos_token_ids) == {2, 0}
    assert tokenizer.chat_template == TEMPLATE
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "mlx" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes(), name
    assert not any("vision" in name for name in load_file(tmp_path / "mlx" / "model.safetensors"))


def test_the_weights_are_those_of_mlx_lms_own_converter(tmp_path):
    base = write_base(tmp_path / "base", "llama", "today")
    write_fused(
        ModelFolder(base),
        backends.start_adapter(base, backends.make_recipe(base)),
        tmp_path / "fused",
        ServingConfig([2]),
        silent,
    )
    write_mlx_model(tmp_path / "fused", tmp_path / "mlx", silent)
    convert(str(tmp_path / "fused"), str(tmp_path / "theirs"), quantize=True)
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("mlx", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_without_a_normalized_config_the_check_above_would_fail(tmp_path):
    """Trap: mlx-lm's llama reads a top-level rope_theta alone, and silently falls back to another."""
    base = write_base(tmp_path / "base", "llama", "today")
    write_fused(
        ModelFolder(base),
        backends.start_adapter(base, backends.make_recipe(base)),
        tmp_path / "fused",
        ServingConfig([2]),
        silent,
    )
    ids, found = mx.arange(3, 23)[None], []
    for rope in (True, False):
        path = tmp_path / "fused" / "config.json"
        config = json.loads(path.read_text())
        if not rope:
            del config["rope_theta"], config["rope_scaling"]
            path.write_text(json.dumps(config))
        write_mlx_model(tmp_path / "fused", tmp_path / "mlx", silent)
        found.append(np.array(load(str(tmp_path / "mlx"))[0](ids)[0]))
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_a_failure_leaves_the_old_folder_and_names_the_log(tmp_path):
    base = write_base(tmp_path / "base", "llama", "today")
    config = normalize_config(json.loads((base / "config.json").read_text()))
    (base / "config.json").write_text(json.dumps(config))
    write_mlx_model(base, tmp_path / "mlx", silent)
    before = (tmp_path / "mlx" / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"mlx-lm could not convert .*mlx\.log, ends with:"):
        write_mlx_model(base, tmp_path / "mlx", silent)
    assert (tmp_path / "mlx" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mlx", "mlx.log"]


def test_without_mlx_lm_it_is_refused_with_the_remedy(monkeypatch):
    check_installed()
    monkeypatch.setattr(hardware, "installed", lambda name: name != "mlx_lm")
    with pytest.raises(UserError, match="--export mlx: mlx-lm is not installed") as caught:
        check_installed()
    assert "or train with --export fused" in caught.value.fix


def test_what_mlx_lm_computes_otherwise_is_refused_or_said_beforehand(tmp_path, capsys):
    with pytest.raises(UserError, match="does not compute RoPE 'longrope' for phi3"):
        check_model(ModelFolder(write_base(tmp_path / "phi3", "phi3", "today")), Display("plain"))
    for family in ("glm4", "granitemoehybrid", "lfm2"):
        rope = {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}
        write_tiny(tmp_path / family, family, {"rope_parameters": rope})
        with pytest.raises(UserError, match=f"does not compute RoPE 'linear' for {family}"):
            check_model(ModelFolder(tmp_path / family), Display("plain"))
    with pytest.raises(UserError, match="does not compute RoPE 'yarn' for olmo3"):
        check_model(ModelFolder(write_base(tmp_path / "olmo3", "olmo3", "today")), Display("plain"))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    for folder, rope in {"rounded": yarn, "unrounded": yarn | {"truncate": False}}.items():
        write_tiny(tmp_path / folder, "qwen3", {"rope_parameters": rope})
    check_model(ModelFolder(tmp_path / "rounded"), Display("plain"))
    with pytest.raises(UserError, match="does not compute RoPE 'yarn' for qwen3"):
        check_model(ModelFolder(tmp_path / "unrounded"), Display("plain"))
    assert capsys.readouterr().out == ""
    check_model(ModelFolder(write_base(tmp_path / "mistral", "mistral", "today")), Display("plain"))
    assert "has no sliding window for mistral: beyond 24 tokens" in capsys.readouterr().out.replace("\n", " ")
    for family in ("gemma3", "llama", "qwen3"):
        check_model(ModelFolder(write_base(tmp_path / family, family, "today")), Display("plain"))
    assert capsys.readouterr().out == ""


def test_a_mixed_scheme_keeps_more_bits_where_it_matters(tmp_path):
    base = write_base(tmp_path / "base", "llama", "today")
    adapter = backends.start_adapter(base, backends.make_recipe(base))
    write_fused(ModelFolder(base), adapter, tmp_path / "fused", ServingConfig([2, 0], TEMPLATE), silent)
    report = write_mlx_model(tmp_path / "fused", tmp_path / "mlx", silent, "mixed-4-6")
    assert (report["scheme"], report["bits"]) == ("mixed-4-6", 4)
    model, _ = load(str(tmp_path / "mlx"))
    bits = {path: module.bits for path, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)}
    assert {bits[path] for path in bits if path.endswith("q_proj")} == {4}
    assert 6 in {bits[path] for path in bits if path.endswith(("v_proj", "down_proj"))}
