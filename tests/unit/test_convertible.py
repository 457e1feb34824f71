"""What llama.cpp's converter would turn into another model is refused before training."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.display import Display
from common.errors import UserError
from common.export.preflight import _check_form
from common.llama_cpp.convert import complete_config, lacks_mtp
from common.llama_cpp.convertible import check_convertible, lost_window, other_model
from common.models.model_folder import ModelFolder
from common.options import Options
from common.verify.tiny_models import TINY, write_tiny
from tests.tiny import write_family, write_model, write_tokenizer

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_MINISTRAL = {
    "sliding_window": None,
    "rope_parameters": {**TINY["ministral3"]["rope_parameters"], "mscale_all_dim": 1.0},
}
_WITHOUT = {key: value for key, value in _MINISTRAL["rope_parameters"].items() if key != "mscale_all_dim"}
# Family, what makes it one that llama.cpp computes alike, what makes it another, and the words of the error.
OTHERS = [
    ("smollm3", {"no_rope_layer_interval": 4}, {"no_rope_layer_interval": 2}, "RoPE out of every fourth layer"),
    ("exaone4", {"sliding_window": None}, {"sliding_window": 24}, "windows in an EXAONE 4 of 64 layers"),
    ("exaone4", {"sliding_window": None}, {"sliding_window": None, "num_hidden_layers": 64}, "EXAONE 4 of 64 layers"),
    ("exaone4", {"sliding_window": None}, {"sliding_window": None, "head_dim": 24}, "together as wide as the model"),
    ("ministral3", _MINISTRAL, _MINISTRAL | {"sliding_window": 24}, "no windows in a Ministral 3"),
    ("ministral3", _MINISTRAL, {"sliding_window": None, "rope_parameters": _WITHOUT}, "needs mscale_all_dim"),
    (
        "ministral3",
        _MINISTRAL,
        {"sliding_window": None, "rope_parameters": _MINISTRAL["rope_parameters"] | {"mscale": 0.5}},
        "how far this YaRN scales",
    ),
    (
        "mistral",
        {"rope_parameters": _YARN},
        {"rope_parameters": _YARN | {"attention_factor": 1.3}},
        "how far this YaRN",
    ),
    (
        "gemma4_text",
        {},
        {"layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"], "per_layer_config": None},
        "llama.cpp shares the keys of a sliding layer",
    ),
    ("gemma4_text", {}, {"final_logit_softcapping": None}, "caps the logits of every Gemma 4"),
    (
        "gemma4_unified_text",
        {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "hidden_size_per_layer_input": 0},
        {},
        "a part of it only",
    ),
    ("granitemoehybrid", {}, {"position_embedding_type": "nope"}, "rotates queries and keys of every Granite 4"),
    ("lfm2", {"conv_bias": False}, {"conv_bias": True}, "no biases in the convolutions of an LFM2"),
    ("olmo2", {"attention_bias": False}, {"attention_bias": True}, "no biases in the attention of olmo2"),
    ("olmo2", {"attention_bias": False}, {"attention_bias": False, "tie_word_embeddings": True}, "does not tie the"),
]


@pytest.mark.parametrize(("family", "alike", "other", "words"), OTHERS)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(
    family: str, alike: dict[str, Any], other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folders = [tmp_path / "alike", tmp_path / "other"]
    for folder, changes in zip(folders, (alike, other), strict=True):
        layers = changes.get("num_hidden_layers")
        kinds = {"layer_types": ["full_attention"] * layers} if layers else {}
        write_tiny(folder, family, changes | kinds)
        write_tokenizer(folder)
    check_convertible(folders[0])
    with pytest.raises(UserError, match=words):
        check_convertible(folders[1])


_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_LLAMA3 = TINY["llama"]["rope_parameters"]
_HALF = {"partial_rotary_factor": 0.25}
# tests/gguf/test_rope_scaling.py compares these lists with llama.cpp's own logits.
KEPT = [
    *((family, _LLAMA3) for family in ("exaone4", "llama", "mistral")),
    *((family, rope) for family in ("llama", "olmo2", "qwen3", "smollm3") for rope in (_LINEAR, _YARN)),
    ("qwen3_5_text", _LINEAR | _HALF),
    # As published. llama.cpp reads neither key, and of these transformers reads attention_factor alone.
    ("olmo3", _YARN | {"factor": 8.0, "attention_factor": 1.2079441541679836}),
    ("qwen3", _YARN | {"attn_factor": 0.8782488562869419, "extrapolation_factor": 0.5}),
    ("ministral3", _MINISTRAL["rope_parameters"] | {"beta_slow": 2.0}),
]
LOST = [
    *((family, _LLAMA3) for family in ("gemma2", "gemma3_text", "granite", "granitemoehybrid", "olmo2", "olmo3")),
    *((family, _LLAMA3) for family in ("lfm2", "qwen2", "qwen3", "smollm3")),
    *((family, _LLAMA3 | _HALF) for family in ("glm4", "phi3", "qwen3_5_text")),
    ("phi3", _LINEAR),
]
OTHER_YARNS = [
    *((family, _YARN | {"beta_slow": 2.0}, "knows YaRN with a beta_fast of 32") for family in ("olmo3", "qwen3")),
    ("qwen3", _YARN | {"factor": None}, "drops a YaRN that states no factor"),
    ("qwen3", _YARN | {"truncate": False}, "rounds the range over which YaRN blends"),
    ("ministral3", _MINISTRAL["rope_parameters"] | {"truncate": False}, "rounds the range over which YaRN blends"),
]
_ALIKE: dict[str, dict[str, Any]] = {  # what llama.cpp computes alike, but for the RoPE
    "exaone4": {"sliding_window": None},
    "lfm2": {"conv_bias": False},
    "ministral3": {"sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 4},
}


def write_scaled(folder: Path, family: str, rope: dict[str, Any]) -> None:
    """The family's tiny model with this RoPE in its layers, of full attention where they differ."""
    changes: dict[str, Any] = _ALIKE.get(family, {})
    if "full_attention" in TINY[family].get("rope_parameters", {}):
        rope = TINY[family]["rope_parameters"] | {"full_attention": rope}
    write_tiny(folder, family, changes | {"attention_bias": False, "rope_parameters": rope})
    write_tokenizer(folder)


@pytest.mark.parametrize(("family", "rope"), KEPT)
def test_a_rope_scaling_that_llama_cpp_knows_is_exported(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    write_scaled(tmp_path, family, rope)
    check_convertible(tmp_path)


@pytest.mark.parametrize(("family", "rope"), LOST)
def test_a_rope_scaling_that_llama_cpp_drops_is_refused(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    write_scaled(tmp_path, family, rope)
    with pytest.raises(UserError, match=f"the RoPE scaling '{rope['rope_type']}' in a model of type {family}"):
        check_convertible(tmp_path)


@pytest.mark.parametrize(("family", "rope", "words"), OTHER_YARNS)
def test_a_yarn_that_llama_cpp_computes_otherwise_is_refused(
    family: str, rope: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_scaled(tmp_path, family, rope)
    with pytest.raises(UserError, match=words):
        check_convertible(tmp_path)


@pytest.mark.parametrize(("kind", "lost"), [("seed_oss", True), ("apertus", False), ("exaone_moe", False)])
def test_of_an_architecture_that_is_tried_too(kind: str, lost: bool, tmp_path: Path) -> None:
    """Its GGUF would be found to differ only after training, and on short rows hardly."""
    folder = write_model(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["OtherForCausalLM"], "model_type": kind}
    for rope in (_LINEAR, _LLAMA3):
        path.write_text(json.dumps(config | {"rope_parameters": rope}))
        if lost and rope is _LLAMA3:
            with pytest.raises(UserError, match=f"'llama3' in a model of type {kind}"):
                check_convertible(folder)
        else:
            check_convertible(folder)


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("mistral", {}, 24),
        ("mistral", {"sliding_window": None}, None),
        ("phi3", {"sliding_window": 56}, 56),
        ("phi3", {"sliding_window": 4096}, None),  # as Phi-4-mini's, longer than its context
        ("qwen2", {}, 24),
        ("qwen2", {"use_sliding_window": False}, None),
        ("gemma2", {}, None),
        ("olmo3", {}, None),
        ("qwen3_5_text", {}, None),
    ],
)
def test_a_window_that_llama_cpp_does_not_compute_is_warned_of(
    family: str, changes: dict[str, Any], window: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelFolder(write_tiny(tmp_path, family, changes))
    assert lost_window(model.config) == window
    options = Options(model="m", data=["d"], export="gguf")
    _check_form(options, "lora", model, Display("plain"))
    said = f"no sliding window for {family}: beyond {window} tokens" in capsys.readouterr().out.replace("\n", " ")
    assert said == (window is not None)


def test_what_llama_cpp_wants_of_a_glm_4(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "glm4")
    with pytest.raises(UserError, match=r"wants the token <\|user\|> in a GLM-4's tokenizer"):
        check_convertible(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|user|>"))
    check_convertible(folder)


def test_which_qwen3_5_lacks_the_layers_that_predict_more(tmp_path: Path) -> None:
    folders = {family: write_family(tmp_path / family, family) for family in ("qwen3", "qwen3_5", "qwen3_5_text")}
    assert [family for family, folder in folders.items() if lacks_mtp(ModelFolder(folder))] == ["qwen3_5_text"]


def test_gemma_4_12b_as_transformers_saves_it_is_named_for_the_converter(tmp_path: Path) -> None:
    file = write_family(tmp_path / "model", "gemma4_unified") / "config.json"
    given = json.loads(file.read_text())
    assert given["text_config"]["architectures"] == ["Gemma4UnifiedForCausalLM"]
    assert "moe_intermediate_size" not in given["text_config"]
    complete_config(file)
    del given["text_config"]["architectures"]
    given["text_config"]["moe_intermediate_size"] = None
    assert json.loads(file.read_text()) == given


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}, ""),
        ("qwen3_moe", {}, "lets the chosen experts of a qwen3_moe weigh 1 together, and this model does not"),
        ("qwen2_moe", {}, ""),
        ("qwen2_moe", {"norm_topk_prob": True}, "does not let the chosen experts of a qwen2_moe weigh 1"),
        ("lfm2_moe", {}, ""),
        ("lfm2_moe", {"norm_topk_prob": False}, "lets the chosen experts of a lfm2_moe weigh 1 together"),
        ("seed_oss", {"norm_topk_prob": False}, ""),
    ],
)
def test_a_router_that_llama_cpp_computes_otherwise_is_refused(
    kind: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """tests/gguf/test_admission.py compares with llama.cpp's own logits."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 259}
    config = {"model_type": kind, "architectures": ["X"], **sizes, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = other_model(ModelFolder(tmp_path))
    assert (words in found) if words else found == ""
