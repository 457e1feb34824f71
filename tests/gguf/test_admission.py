"""--try-model with PyTorch alone: llama.cpp's logits of the model's GGUF are what it is compared with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import architecture_configs
from benchmarks.architectures import write_model
from common.llama_cpp import convert as convert_module
from common.llama_cpp.build import own
from common.llama_cpp.convert import convert
from common.llama_cpp.convertible import other_model
from common.models import admitted
from common.models.model_folder import ModelFolder
from common.verify import admission, gguf_peer
from tests.contexts import context
from tests.templates.vocabularies import tokenizer


def rope_of_another_base(folder: Path, *given: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] *= 50
    path.write_text(json.dumps(config), encoding="utf-8")
    convert(folder, *given)


def test_a_model_that_llama_cpp_computes_alike_is_admitted_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(lambda share, text: None)
    monkeypatch.setattr(admitted, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(admission._Trial, "_here", lambda trial: ["torch"])
    monkeypatch.setitem(architecture_configs.SIZES, "vocab_size", 50304)
    model = write_model("seed_oss", tmp_path / "model")
    tokenizer("gpt-2").save_pretrained(model.path)
    verdict = admission.admit(model, context())
    assert verdict.why == ""
    assert verdict.checks[gguf_peer.PEER].startswith("llama.cpp, logits ")
    monkeypatch.setattr(admission, "remembered", lambda *given: None)
    monkeypatch.setattr(gguf_peer, "convert", rope_of_another_base)
    assert admission.admit(model, context()).why.startswith("transformers computes other logits than llama.cpp")


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("lfm2_moe", "mellum", "qwen2_moe"))]
)
def test_llama_cpp_weighs_experts_in_one_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That which is not refused beforehand."""
    from transformers import AutoModelForCausalLM

    own(lambda share, text: None)
    monkeypatch.setitem(architecture_configs.SIZES, "vocab_size", 50304)
    monkeypatch.setattr(convert_module, "check_convertible", lambda folder: None)
    model = write_model(kind, tmp_path / "model")
    tokenizer("gpt-2").save_pretrained(model.path)
    ids = np.random.default_rng(0).integers(300, 5000, 64).astype(np.int32)
    refused = {}
    for normalized in (True, False):
        path = model.path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_topk_prob": normalized}))
        ours = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            expected = ours(torch.tensor(ids[None])).logits[0].numpy()
        found = gguf_peer.gguf_logits(ModelFolder(model.path), ids, tmp_path)
        assert not isinstance(found, str), found
        refused[normalized] = other_model(ModelFolder(model.path)) != ""
        assert (np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()) != refused[normalized]
    assert {*refused.values()} == {True, False}
