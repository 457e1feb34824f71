"""A config becomes explicit as transformers 5 understands it; what the backends would compute otherwise is refused."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from common.backend import Batch
from common.data.batching import split_batch
from common.models import granite4, lfm2
from common.models.config_faults import config_faults, unsupported
from common.models.config_kinds import kind_faults
from common.models.families import (
    ARCHITECTURES,
    DEFAULTS,
    SUPPORTED,
    context_length,
    forward_config,
    hf_name,
    is_known,
    mlx_name,
    normalize_config,
    text_config,
    text_name,
)
from common.models.rope_config import for_transformers_4
from common.verify.tiny_models import TINY, tiny_config
from mlx_backend.rope import rope

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 259}


def test_every_family_is_in_every_table() -> None:
    assert set(ARCHITECTURES.values()) == set(DEFAULTS) == set(TINY)


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "tiny"])
def test_a_config_is_understood_as_transformers_understands_it(kind: str, sparse: bool) -> None:
    from transformers import AutoConfig

    given = tiny_config(kind)
    if sparse:
        dense = {"num_local_experts": 0, "layer_types": ["full_attention"] * 6} if kind == granite4.KIND else {}
        given = {"architectures": given["architectures"], "model_type": kind, **SIZES, **dense}
    ours = normalize_config(given)
    given = deepcopy(given)
    theirs = AutoConfig.for_model(**{key: value for key, value in given.items() if key != "architectures"}).to_dict()
    ignored = {
        "architectures",
        "sliding_window_pattern",
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "_sliding_window_pattern",
    }
    if kind == "ministral3" and sparse:
        ignored.add("rope_parameters")  # one that has none is refused
    if kind == granite4.KIND:  # older names, and what no layer reads
        ignored |= {"layer_types", "position_embedding_type", "intermediate_size", "num_experts_per_tok"}
        ignored |= {name for name in ours if name.startswith("mamba_")}
    if kind == lfm2.KIND:
        ignored.add("full_attn_idxs")  # what the layer_types say
    if ours.get("use_sliding_window") is False:
        ignored.add("sliding_window")  # transformers forgets it there
    assert {key: ours[key] for key in ours.keys() & theirs.keys() - ignored} == {
        key: theirs[key] for key in ours.keys() & theirs.keys() - ignored
    }
    assert DEFAULTS[kind].keys() <= ours.keys()
    assert DEFAULTS[kind].keys() <= theirs.keys()
    assert normalize_config(ours) == ours
    again = AutoConfig.for_model(**{key: value for key, value in ours.items() if key != "architectures"}).to_dict()
    again["rope_parameters"].pop("type", None)
    again["rope_parameters"].get("full_attention", {}).pop("type", None)
    assert {key: again[key] for key in theirs.keys() - ignored} == {key: theirs[key] for key in theirs.keys() - ignored}


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 5e3},
    {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0},
    TINY["llama"]["rope_parameters"],
    TINY["mistral"]["rope_parameters"],
    {**TINY["mistral"]["rope_parameters"], "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20, "truncate": False},
    {**TINY["mistral"]["rope_parameters"], "attention_factor": 1.3},
    TINY["phi3"]["rope_parameters"],
    {**TINY["phi3"]["rope_parameters"], "factor": 2.0},
]


@pytest.mark.parametrize("parameters", ROPES)
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = "phi3" if parameters["rope_type"] == "longrope" else "llama"
    config = AutoConfig.for_model(kind, **SIZES, max_position_embeddings=256, rope_parameters=dict(parameters))
    if kind == "phi3":
        config.original_max_position_embeddings = 48
    known = {**ROPE_INIT_FUNCTIONS, "default": LlamaRotaryEmbedding.compute_default_rope_parameters}
    found = rope(parameters, 16, 256)
    for length, inverse in ((None, found.inverse), (100, found.inverse_long)):
        longer = {} if parameters["rope_type"] == "default" else {"seq_len": length}
        wanted, factor = known[parameters["rope_type"]](config, device="cpu", **longer)
        np.testing.assert_allclose(inverse, wanted.numpy(), rtol=3e-7)
        assert found.factor == pytest.approx(factor, rel=1e-12)


def faults(family: str, **changes: Any) -> list[str]:
    config = tiny_config(family, changes)
    return unsupported(config) or kind_faults(config) or config_faults(config)


def test_an_exaone_4_without_windows_is_supported() -> None:
    assert faults("exaone4", sliding_window=None, sliding_window_pattern=None) == []


@pytest.mark.parametrize("family", TINY)
def test_a_tiny_model_of_each_family_is_supported(family: str) -> None:
    assert faults(family) == []


_LONG = {"rope_type": "default", "rope_theta": 1e4}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"architectures": ["GPT2LMHeadModel"]}, f"not supported; supported: {', '.join(SUPPORTED)}"),
    ("llama", {"model_type": "cohere"}, "its model_type cohere is not LlamaForCausalLM's, llama"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "its RoPE scaling 'dynamic' is not computed alike by both backends",
    ),
    ("qwen2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "its RoPE scaling 'longrope'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "its partial_rotary_factor is not computed by both backends",
    ),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0] * 6,
                "long_factor": [1.0] * 4,
                "original_max_position_embeddings": 48,
            }
        },
        "its short_factor has 6 numbers and needs 4",
    ),
    ("phi3", {"pad_token_id": 5000}, "its pad_token_id 5000 is beyond its vocabulary of"),
    ("llama", {"hidden_act": "gelu"}, "its activation gelu is not the family's own, silu"),
    ("gemma2", {"hidden_activation": "gelu"}, "its activation gelu is not the family's own, gelu_pytorch_tanh"),
    ("qwen3", {"attention_bias": True}, "its attention has biases"),
    ("granite", {"head_dim": 24}, "its head_dim 24 is not hidden_size / num_attention_heads"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "its attention looks ahead"),
    ("gemma2", {"attn_logit_softcapping": None}, "attention that is not capped"),
    ("gemma2", {"tie_word_embeddings": False}, "embeddings that are not tied"),
    ("gemma3_text", {"attn_logit_softcapping": 30.0}, "its capped attention"),
    ("gemma4_text", {"enable_moe_block": True}, "the mixtures of experts in this Gemma4ForCausalLM are not supported"),
    ("gemma4_text", {"num_kv_shared_layers": 4}, "no layer whose keys and values the others could share"),
    ("gemma4_text", {"layer_types": ["full_attention", *["sliding_attention"] * 4]}, "its last layer is not one of"),
    ("gemma4_text", {"vocab_size_per_layer_input": 200}, "its embeddings of each layer have 200 rows"),
    ("gemma4_text", {"hidden_size_per_layer_input": 0}, "its layers share keys and values without embeddings"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "its attention looks ahead"),
    ("gemma4_text", {"attention_bias": True}, "its attention has biases"),
    ("gemma4_text", {"per_layer_config": {"2": {"head_dim": 24}}}, "its per_layer_config is not the same"),
    ("gemma4_text", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "its rope_parameters lack sliding"),
    (
        "gemma4_text",
        {"per_layer_config": {layer: {"num_key_value_heads": 1} for layer in ("2", "4")}},
        "key heads of their own without attention_k_eq_v",
    ),
    (
        "gemma4_unified_text",
        {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _LONG)},
        "its RoPE is not 'proportional' in full attention",
    ),
    ("qwen3_5_text", {"linear_num_value_heads": 3}, "its 3 heads of values in linear attention do not fit its 2"),
    (
        "qwen3_5_text",
        {"layer_types": ["full_attention", *["linear_attention"] * 2, "full_attention"]},
        "its layer_types do not repeat one order",
    ),
    ("qwen3_5_text", {"layer_types": ["linear_attention"] * 4}, "its layer_types do not repeat one order"),
    ("qwen3_5_text", {"layer_types": None, "full_attention_interval": 5}, "its layer_types do not repeat one order"),
    ("qwen3_5_text", {"attn_output_gate": False}, "its attention has no gate"),
    ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 4}, "can name full_attention and linear_attention"),
    ("ministral3", {"rope_parameters": None, "rope_theta": 1e6}, "its RoPE scaling is not 'yarn' with"),
    (
        "ministral3",
        {"rope_parameters": TINY["ministral3"]["rope_parameters"] | {"llama_4_scaling_beta": None}},
        "a llama_4_scaling_beta, which a Ministral 3 has",
    ),
    ("exaone4", {"sliding_window_pattern": "LLXG"}, "its sliding_window or sliding_window_pattern is not a whole"),
    ("olmo3", {"layer_types": ["linear_attention"] * 4}, "can name full_attention and sliding_attention"),
    (
        "olmo3",
        {
            "rope_parameters": TINY["olmo3"]["rope_parameters"]
            | {"full_attention": TINY["olmo3"]["rope_parameters"]["full_attention"] | {"truncate": False}}
        },
        "the truncate of its RoPE is not computed alike",
    ),
    ("glm4", {"tie_word_embeddings": True}, "its embeddings are tied, which mlx-lm does not compute"),
    ("granitemoehybrid", {"head_dim": 24}, "its head_dim 24 is not hidden_size / num_attention_heads"),
    ("granitemoehybrid", {"num_local_experts": 4}, "the Mamba layers and mixtures of experts in this Granite"),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "the Mamba layers and mixtures of experts in this"),
    ("granitemoehybrid", {"shared_intermediate_size": 0}, "the Mamba layers and mixtures of experts in this Granite"),
    ("granitemoehybrid", {"layer_types": None}, "the Mamba layers and mixtures of experts in this Granite"),
    ("lfm2", {"tie_embedding": False}, "its embeddings are not tied, which mlx-lm does not compute for an LFM2"),
    ("lfm2", {"layer_types": ["conv"] * 4}, "its layers are all of one kind"),
    ("lfm2", {"layer_types": None}, "its layers are all of one kind"),
    ("lfm2", {"layer_types": ["conv", *["sliding_attention"] * 3]}, "can name full_attention and conv"),
    ("lfm2", {"head_dim": 24}, "its head_dim 24 is not hidden_size / num_attention_heads"),
    ("lfm2", {"conv_L_cache": 1}, "conv_L_cache is '1', and should be a whole number from 2"),
    ("lfm2", {"block_ffn_dim_multiplier": None}, "block_ffn_dim_multiplier is 'None', and should be a number above 0"),
    ("llama", {"layer_types": ["linear_attention"] * 2}, "can name full_attention and sliding_attention"),
]


@pytest.mark.parametrize(("family", "changes", "said"), REFUSED)
def test_what_the_backends_would_compute_otherwise_is_refused(family: str, changes: dict, said: str) -> None:
    found = faults(family, **changes)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_unified_text"])
def test_a_gemma_4_names_its_wider_heads_in_two_ways(kind: str) -> None:
    ours = tiny_config(kind)
    layers = list(ours["per_layer_config"].values())
    hub = {key: value for key, value in ours.items() if key != "per_layer_config"} | {
        "global_head_dim": layers[0]["head_dim"],
        "num_global_key_value_heads": layers[0].get("num_key_value_heads", 3),  # not read without attention_k_eq_v
        "use_bidirectional_attention": "vision",
    }
    assert kind_faults(hub) == config_faults(hub) == []
    assert text_config(hub) == text_config(ours) | {"use_bidirectional_attention": "vision"}


def test_frequencies_of_gemma_4_are_those_of_transformers() -> None:
    from transformers import AutoConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    config = tiny_config("gemma4_text")
    theirs = Gemma4TextRotaryEmbedding(
        AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    )
    for name, width in (("full_attention", 24), ("sliding_attention", 16)):
        found = rope(config["rope_parameters"][name], width, 256)
        np.testing.assert_allclose(found.inverse, getattr(theirs, f"{name}_inv_freq").numpy(), rtol=3e-7)


@pytest.mark.parametrize(("text", "tied"), [({}, False), ({"tie_word_embeddings": True}, True)])
def test_a_qwen_vl_that_says_nothing_of_its_head_has_one(text: dict[str, Any], tied: bool) -> None:
    """transformers 5 leaves out what is its default, and Gemma 3's is another."""
    part = {key: value for key, value in tiny_config("qwen2").items() if key != "tie_word_embeddings"} | text
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    found = text_config(config | {"text_config": part | {"model_type": "qwen2_5_vl_text"}})
    assert (found["model_type"], found["tie_word_embeddings"]) == ("qwen2", tied)
    faults = config_faults(config | {"text_config": part | {"model_type": "llama"}})
    assert faults == ["the model_type of its text part, llama, is not Qwen2_5_VLForConditionalGeneration's"]


@pytest.mark.parametrize(("kind", "found"), [("mistral", "mistral"), (None, "mistral"), ("ministral3", "ministral3")])
def test_the_text_part_of_a_mistral_3_is_a_mistral_or_a_ministral(kind: str | None, found: str) -> None:
    text = {key: value for key, value in tiny_config(found).items() if key not in ("architectures", "model_type")}
    text |= {} if kind is None else {"model_type": kind}
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    assert config_faults(config) == []
    read = text_config(config)
    assert (read["model_type"], read["architectures"]) == (found, [f"{found.title()}ForCausalLM"])


def test_a_config_without_sizes_says_which() -> None:
    assert config_faults({"architectures": ["LlamaForCausalLM"], "hidden_size": 64}) == [
        "its config.json lacks intermediate_size, num_attention_heads, num_hidden_layers, vocab_size"
    ]


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 1000),
        ({"max_position_embeddings": None}, 0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 4000),
        # the config states the length before scaling, or behind it
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}}, 4000),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, 1000),
    ],
)
def test_the_context_of_a_model(changes: dict[str, Any], length: int) -> None:
    given = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 1000, **SIZES}
    assert context_length(normalize_config(given | changes)) == length


def test_windows_and_positions_of_each_layer() -> None:
    def of(family: str, **changes: Any) -> tuple[tuple, list[bool]]:
        found = forward_config(
            text_config(tiny_config(family, {"num_hidden_layers": 4, "layer_types": None, **changes}))
        )
        return found.windows, [one is not None for one in found.ropes]

    every = [True] * 4
    assert of("llama") == ((None,) * 4, every)
    assert of("mistral") == ((24,) * 4, every)
    assert of("exaone4") == ((24, 24, None, 24), [True, True, False, True])
    assert of("exaone4", sliding_window_pattern=2) == ((24, None, 24, None), [True, False, True, False])
    assert of("exaone4", sliding_window=None, sliding_window_pattern=None) == ((None,) * 4, every)
    assert of("glm4") == ((None,) * 4, every)
    attention = {"layer_types": ["attention"] * 4}
    assert of("granitemoehybrid", **attention) == ((None,) * 4, every)
    for other in ("nope", None):
        assert of("granitemoehybrid", **attention, position_embedding_type=other) == ((None,) * 4, [False] * 4)
    assert of("lfm2", full_attn_idxs=[1, 3]) == ((None,) * 4, [False, True] * 2)
    assert of("ministral3") == ((40,) * 4, every)
    assert of("olmo3") == ((24, 24, 24, None), every)
    assert of("phi3", sliding_window=None) == ((None,) * 4, every)
    assert of("qwen2", max_window_layers=3) == ((None, None, None, 24), every)
    assert of("qwen2", use_sliding_window=False) == ((None,) * 4, every)
    assert of("gemma2") == ((24, None, 24, None), every)
    assert of("gemma3_text", sliding_window_pattern=3) == ((24, 24, None, 24), every)
    assert of("smollm3", no_rope_layer_interval=2) == ((None,) * 4, [True, False, True, False])
    assert of("qwen3_5_text", full_attention_interval=4) == ((None,) * 4, [False, False, False, True])


def test_what_is_done_round_the_layers() -> None:
    granite, gemma = (forward_config(text_config(tiny_config(family))) for family in ("granite", "gemma2"))
    assert (granite.embedding_scale, granite.logit_divisor, granite.logit_softcap) == (3.0, 1.7, None)
    assert (gemma.embedding_scale, gemma.logit_divisor, gemma.logit_softcap) == (8.0, 1.0, 5.0)
    assert forward_config(text_config(tiny_config("phi3"))).rope_split == 48
    assert forward_config(text_config(tiny_config("ministral3"))).query_scaling == (0.4, 16)
    assert gemma.query_scaling is None


def test_a_granite_4_with_mamba_layers_is_left_to_the_libraries() -> None:
    given = tiny_config("granitemoehybrid", {"layer_types": ["mamba", "attention"], "mamba_d_head": "auto"})
    assert not is_known(given)
    found = normalize_config(given)
    assert {key: found[key] for key in given} == given
    assert "mamba_n_heads" not in found


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 96),
        ({"block_ff_dim": 120}, 112),  # 80 * 1.3 = 104
        ({"block_ff_dim": 120, "block_auto_adjust_ff_dim": False}, 120),
        ({"block_ffn_dim_multiplier": 1.0}, 64),
    ],
)
def test_the_width_of_an_lfm2s_mlp_is_transformers_own(changes: dict[str, Any], width: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = tiny_config("lfm2", changes)
    config = AutoConfig.for_model(**{key: value for key, value in given.items() if key != "architectures"})
    mlp = AutoModelForCausalLM.from_config(config, trust_remote_code=False).model.layers[0].feed_forward
    assert lfm2.inner(text_config(given)) == mlp.w1.out_features == width


def test_phi_3s_first_names_for_longrope() -> None:
    older = {
        key: value for key, value in TINY["phi3"]["rope_parameters"].items() if key not in ("rope_type", "rope_theta")
    }
    for name in ("su", "yarn", "longrope"):
        config = tiny_config(
            "phi3", {"rope_parameters": None, "rope_scaling": {**older, "type": name}, "rope_theta": 5e3}
        )
        assert normalize_config(config)["rope_parameters"] == TINY["phi3"]["rope_parameters"]


def test_a_phi_3_that_transformers_4_opens_is_the_same_for_others() -> None:
    from transformers import AutoConfig

    config = normalize_config(tiny_config("phi3"))
    written = for_transformers_4(config)
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}  # 4.57 refuses any other
    assert normalize_config(dict(written))["rope_parameters"] == config["rope_parameters"]
    rope = {**config["rope_parameters"]}
    assert rope.pop("partial_rotary_factor") == written["partial_rotary_factor"] == 0.5
    assert rope.pop("original_max_position_embeddings") == written["original_max_position_embeddings"] == 48
    found, wanted = (
        AutoConfig.for_model(**{key: value for key, value in one.items() if key != "architectures"})
        for one in (written, config)
    )
    assert found.rope_parameters == wanted.rope_parameters


@pytest.mark.parametrize("kind", TINY)
def test_no_other_config_changes_for_transformers_4(kind: str) -> None:
    config = normalize_config(tiny_config(kind))
    assert (for_transformers_4(config) == config) == (kind != "phi3")
    scaled = normalize_config(
        tiny_config("phi3", {"rope_parameters": TINY["phi3"]["rope_parameters"] | {"factor": 2.0}})
    )
    assert for_transformers_4(scaled) == scaled  # which could not be said in three keys


@pytest.mark.parametrize(("given", "kept"), [(2, 2), ([2], 2), ([2, 3], [2, 3])])
def test_ends_are_one_number_or_a_list_of_several(given: Any, kept: Any) -> None:
    assert normalize_config(tiny_config("llama", {"eos_token_id": given}))["eos_token_id"] == kept


@pytest.mark.parametrize(
    ("name", "hf", "text", "mlx"),
    [
        (
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
        ),
        ("language_model.model.norm", "model.language_model.norm", "model.norm", "language_model.model.norm"),
        ("model.language_model.norm", "model.language_model.norm", "model.norm", "language_model.model.norm"),
        ("language_model.lm_head.weight", "lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("vision_tower.head.probe", "vision_tower.head.probe", "vision_tower.head.probe", "vision_tower.head.probe"),
    ],
)
def test_names_of_multimodal_models(name: str, hf: str, text: str, mlx: str) -> None:
    assert (hf_name(name), text_name(name), mlx_name(hf_name(name))) == (hf, text, mlx)


def test_a_batch_is_parted_by_the_rows_own_lengths() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    targets, weights = ids + 1, ids.astype(np.float32) / 2
    batch = Batch(ids, targets, weights, np.array([2, 4, 1], np.int32))
    short, long = split_batch(batch, 2)
    np.testing.assert_array_equal(short.input_ids, [[0, 1], [8, 9]])
    np.testing.assert_array_equal(short.targets, targets[[0, 2], :2])
    np.testing.assert_array_equal(short.loss_weights, weights[[0, 2], :2])
    np.testing.assert_array_equal(long.input_ids, [[4, 5, 6, 7]])
    for limit in (None, 4, 0):
        assert split_batch(batch, limit) == [batch]
