"""An adapter to a LoRA GGUF and back by llama.cpp's converter, and in llama.cpp beside the fused model."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.architectures import write_model
from common.backend import LoraWeight
from common.commands.adapter import convert_adapter
from common.errors import UserError
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.build import ensure
from common.llama_cpp.convert import convert
from common.llama_cpp.lora import holds_experts
from common.llama_cpp.server import Server, ServerOptions
from common.models.adapter_files import read_any, write_peft
from common.models.lora_init import initial_adapter
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from tests import backends
from tests.contexts import context
from tests.progress import silent
from tests.tiny import write_family, write_tokenizer

CHANGES = {
    "lora": {},
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 6}, "alpha_pattern": {"down_proj": 3.0}},
    "layers": {"layers": "last:1"},
}


@pytest.fixture(scope="module")
def llama():
    return ensure(None, silent)


def write_adapter(base, folder, size=0.3, **changes):
    """A random adapter on `base` in PEFT's layout."""
    adapter = backends.start_adapter(base, backends.make_recipe(base, **changes))
    random = np.random.default_rng(1)
    for weight in adapter.weights.values():
        weight.B[:] = random.normal(0, size, weight.B.shape)
    write_peft(folder, adapter)
    return adapter


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", "lora"),
        *(pytest.param("llama", kind, marks=pytest.mark.long) for kind in CHANGES if kind != "lora"),
        *(pytest.param("qwen3", kind, marks=pytest.mark.long) for kind in CHANGES),
        ("qwen3_5", "lora"),
        ("gemma4_unified", "lora"),
        ("granitemoehybrid", "lora"),
        pytest.param("glm4", "lora", marks=pytest.mark.long),
        ("lfm2", "lora"),
    ],
)
def test_a_gguf_and_back_is_the_same_update(tmp_path, changes, family, tiny_llama, llama, monkeypatch):
    if family == "lfm2":  # the tiny one's convolutions have biases, which llama.cpp refuses and no adapter holds
        monkeypatch.setattr("common.llama_cpp.lora.other_model", lambda model: "")
    base, changes = tiny_llama if family == "llama" else write_family(tmp_path / "base", family), CHANGES[changes]
    wanted = write_adapter(base, tmp_path / "peft", **changes)
    convert_adapter(tmp_path / "peft", tmp_path / "lora.gguf", "gguf", str(base), context())
    convert_adapter(tmp_path / "lora.gguf", tmp_path / "again", "peft", str(base), context())
    again = read_any(tmp_path / "again")
    assert again.weights.keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        found = again.weights[name]
        assert found.rank == weight.rank
        np.testing.assert_allclose(
            found.scale * found.B @ found.A, weight.scale * weight.B @ weight.A, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "targets",
    [
        ["all-linear", "experts"],
        *(pytest.param(one, marks=pytest.mark.long) for one in (["experts"], ["all-linear"])),
    ],
)
def test_a_gguf_of_a_mixture_and_back_is_the_same_update(tmp_path, targets, llama):
    base = mixture("qwen2_moe", tmp_path / "base")  # with shared experts
    wanted = write_adapter(base, tmp_path / "peft", targets=targets)
    convert_adapter(tmp_path / "peft", tmp_path / "lora.gguf", "gguf", str(base), context())
    assert holds_experts(tmp_path / "lora.gguf") == ("experts" in targets)
    convert_adapter(tmp_path / "lora.gguf", tmp_path / "again", "peft", str(base), context())
    again = read_any(tmp_path / "again")
    assert again.weights.keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        found = again.weights[name]
        np.testing.assert_allclose(
            found.scale * found.B @ found.A, weight.scale * weight.B @ weight.A, rtol=1e-5, atol=1e-6
        )


def test_a_gguf_of_other_experts_is_refused(tmp_path, llama):
    two, four = (mixture("qwen3_moe", tmp_path / name) for name in ("two", "four"))
    fewer(two)
    write_adapter(four, tmp_path / "peft", targets=["experts"])
    convert_adapter(tmp_path / "peft", tmp_path / "lora.gguf", "gguf", str(four), context())
    with pytest.raises(UserError, match=r"has no layer for blk\.0\.ffn_down_exps\.weight, expert 2"):
        convert_adapter(tmp_path / "lora.gguf", tmp_path / "again", "peft", str(two), context())


def mixture(kind, folder):
    write_model(kind, folder)
    write_tokenizer(folder)
    return folder


def fewer(base):
    """Leave two of the four experts."""
    path = base / "config.json"
    path.write_text(re.sub(r'"num_(local_)?experts": 4', '"num_experts": 2', path.read_text()))
    tensors = load_file(base / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not re.search(r"experts\.[23]\.", n)}
    kept |= {n: t[:2].copy() for n, t in kept.items() if n.endswith("mlp.gate.weight")}
    save_file(kept, base / "model.safetensors", {"format": "pt"})


def test_dora_is_refused_by_name(tmp_path, tiny_llama, llama):
    adapter = initial_adapter(
        linear_shapes(ModelFolder(tiny_llama), ["q_proj"]), 2, backends.make_recipe(tiny_llama, method="dora")
    )
    for name, weight in adapter.weights.items():
        adapter.weights[name] = LoraWeight(weight.A, weight.B, 8.0, False, np.ones(len(weight.B), np.float32))
    write_peft(tmp_path / "dora", adapter)
    with pytest.raises(UserError, match="cannot hold DoRA's row lengths"):
        convert_adapter(tmp_path / "dora", tmp_path / "a.gguf", "gguf", str(tiny_llama), context())
    assert not (tmp_path / "a.gguf").exists()


def test_llama_cpp_answers_with_the_lora_as_with_the_fused_model(tmp_path, llama):
    """SmolLM2 with rsLoRA and patterns at once: the scales that a LoRA GGUF has no place for."""
    smollm2 = resolve("HuggingFaceTB/SmolLM2-135M-Instruct", print).path
    changes = CHANGES["patterns"] | {"rslora": True, "alpha": 2.0}
    adapter = write_adapter(smollm2, tmp_path / "peft", size=0.1, **changes)
    convert_adapter(tmp_path / "peft", tmp_path / "lora.gguf", "gguf", str(smollm2), context())
    write_fused(ModelFolder(smollm2), adapter, tmp_path / "fused", ServingConfig([2]), silent)
    for name, folder in (("base", smollm2), ("fused", tmp_path / "fused")):
        convert(folder, tmp_path / f"{name}.gguf", name, llama, silent)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    answers = []
    for gguf, lora in (("base", []), ("base", [tmp_path / "lora.gguf"]), ("fused", [])):
        with Server(llama, tmp_path / f"{gguf}.gguf", ServerOptions(context=512, lora=lora)) as server:
            answers.append(server.chat(prompt, 24))
    base, with_lora, fused = answers
    assert with_lora != base
    assert with_lora[:20] == fused[:20], answers  # bf16 roundings may part the answers later


def test_a_qwen3_5_without_the_layers_that_predict_more_is_refused_by_name(tmp_path, llama):
    base = write_family(tmp_path / "base", "qwen3_5_text")
    write_adapter(base, tmp_path / "peft")
    with pytest.raises(UserError, match=r"llama\.cpp converts no adapter of .* it wants the layers that predict more"):
        convert_adapter(tmp_path / "peft", tmp_path / "lora.gguf", "gguf", str(base), context())
