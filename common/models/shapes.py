"""Shapes of a model's tensors and linear layers, from its config or its files' headers; nothing is loaded."""

import re
from typing import Any

from common.errors import UserError
from common.models import gemma4, granite4, lfm2
from common.models.experts import MATRICES, by_stack, mixture_tensors, target_of
from common.models.families import LANGUAGE_LAYER, OTHER_PARTS, hf_name, is_known, text_config, text_name
from common.models.model_folder import ModelFolder
from common.option_fields import EXPERTS
from common.recipe import TARGET_GROUPS

# Only the language model's layers: a vision tower has layers with a q_proj too.
_LAYER = re.compile(r"model\.(language_model\.)?layers\.\d+\.")
_POST_NORMED = ("exaone4", "olmo2", "olmo3")  # norms stand behind attention and MLP only
NORMED = (
    "exaone4",
    "gemma3_text",
    *gemma4.KINDS,
    lfm2.KIND,
    "olmo2",
    "olmo3",
    "qwen3",
    "qwen3_5_text",
)  # families whose queries and keys are normed
_FROZEN = {"experts", "gate", "router", "shared_expert_gate"}  # parts of a layer that is a mixture of experts


def linear_shapes(model: ModelFolder, targets: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the language model that `targets` name, under its HF module name.

    A target is the last part of a layer's name, or a group of such. Raises UserError when one matches nothing. Of an
    unknown architecture all-linear means every matrix but experts and the routers that choose them; `experts` adds
    those of each expert.
    """
    if not is_known(model.config):
        return _plain_shapes(model, targets)
    groups = {target: TARGET_GROUPS.get(target, [target]) for target in targets}
    wanted = {name for group in groups.values() for name in group}
    shapes: dict[str, tuple[int, int]] = {}
    computed = tensor_shapes(model.config)  # a Gemma 4 on the hub has keys and values that no layer reads
    for name, tensor in model.tensors.items():
        module = hf_name(name.removesuffix(".weight"))
        if text_name(name) not in computed:
            continue
        if name.endswith(".weight") and _LAYER.match(module) and module.rsplit(".", 1)[-1] in wanted:
            out_features, in_features = tensor.shape
            shapes[module] = (out_features, in_features)
    found = target_names(shapes)
    if missing := [target for target, group in groups.items() if not set(group) & set(found)]:
        raise UserError(f"--targets {' '.join(missing)}: the model has no such layer.", "Use --targets all-linear.")
    return shapes


def adaptable_shapes(config: dict[str, Any], targets: list[str]) -> dict[str, tuple[int, int]]:
    """`linear_shapes` of a model of a supported family, by its config alone."""
    wanted = {name for target in targets for name in TARGET_GROUPS.get(target, [target])}
    found = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(config).items() if len(shape) == 2}
    return {
        module: (shape[0], shape[1])
        for module, shape in found.items()
        if _LAYER.match(module) and module.rsplit(".", 1)[-1] in wanted
    }


def _plain_shapes(model: ModelFolder, targets: list[str]) -> dict[str, tuple[int, int]]:
    names = {name for target in targets for name in TARGET_GROUPS.get(target, [target])}
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in model.tensors.items():
        module = hf_name(name.removesuffix(".weight"))
        layer = LANGUAGE_LAYER.fullmatch(module)
        if layer is None or OTHER_PARTS.match(module) or int(layer[1]) >= model.config["num_hidden_layers"]:
            continue
        if not name.endswith(".weight") or len(tensor.shape) != 2:
            continue
        target = target_of(module)
        frozen = target != EXPERTS and _FROZEN & {*layer[2].split(".")}
        if not frozen and (target in names or ("all-linear" in targets and target != EXPERTS)):
            out_features, in_features = tensor.shape
            shapes[module] = (out_features, in_features)
    if EXPERTS in targets:
        _check_experts(model, shapes)
    if not shapes:
        raise UserError(f"--targets {' '.join(targets)}: the model has no such layer.", "Use --targets all-linear.")
    return shapes


def _check_experts(model: ModelFolder, shapes: dict[str, tuple[int, int]]) -> None:
    """Raises UserError where the files do not hold the three matrices of each expert by themselves."""
    stacks = {stack for stack in by_stack(shapes) if stack not in shapes}
    experts = {stack.rpartition(".")[0] for stack in stacks}
    if experts and all(f"{layer}.{name}" in stacks for layer in experts for name in MATRICES):
        return
    why = "the model has no experts"
    if others := mixture_tensors({name: tensor.shape for name, tensor in model.tensors.items()}):
        why = f"its files hold its experts as {others[0]}, and not each one's {', '.join(MATRICES)}"
    raise UserError(f"--targets {EXPERTS}: {why}.", "Leave experts out: all other layers are adapted.")


def target_names(shapes: dict[str, tuple[int, int]]) -> list[str]:
    """The last names of the layers in `shapes`, in the order in which a layer holds them."""
    found = {target_of(module) for module in shapes}
    known = TARGET_GROUPS["all-linear"]
    return [*(name for name in known if name in found), *sorted(found - {*known})]


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, from its config, as transformers saves them."""
    text = text_config(config)
    if text["model_type"] in gemma4.KINDS:
        return gemma4.shapes(text)
    if text["model_type"] == lfm2.KIND:
        return lfm2.shapes(text)
    kind, hidden, inner = text["model_type"], text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    gemma = kind.startswith("gemma")
    gated = kind == "qwen3_5_text"  # attention's output, by half of what q_proj gives
    linear: dict[str, tuple[int, int]] = {"self_attn.o_proj": (hidden, queries)}
    if kind == "phi3":
        linear |= {"self_attn.qkv_proj": (queries + 2 * keys, hidden)}
    else:
        linear |= {
            f"self_attn.{name}_proj": (size, hidden)
            for name, size in zip("qkv", (queries * (1 + gated), keys, keys), strict=True)
        }
    linear |= _mlp_shapes(kind, hidden, inner)
    biased = ["mlp"] if text.get("mlp_bias") else []
    biased += ["self_attn"] if text.get("attention_bias") and kind != "glm4" else []
    inputs_biased = kind == "qwen2" or (kind == "glm4" and text["attention_bias"])  # but not o_proj
    norms = [*([] if kind in _POST_NORMED else ["input_layernorm"]), "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm"] if gemma else []
    norms += ["post_feedforward_layernorm"] if gemma or kind in _POST_NORMED else []
    norms += ["post_self_attn_layernorm", "post_mlp_layernorm"] if kind == "glm4" else []
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (text["vocab_size"], hidden)}
    for layer in range(text["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        delta = gated and text["layer_types"][layer] == "linear_attention"
        if delta:
            shapes |= {f"{at}.linear_attn.{name}": shape for name, shape in _delta_shapes(text).items()}
        for name, shape in linear.items():
            if delta and name.startswith("self_attn"):
                continue
            shapes[f"{at}.{name}.weight"] = shape
            if name.split(".")[0] in biased or (inputs_biased and name[-6] in "qkv"):
                shapes[f"{at}.{name}.bias"] = shape[:1]
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in norms}
        if kind in NORMED and not delta:
            normed = (queries, keys) if kind.startswith("olmo") else (text["head_dim"],) * 2
            shapes |= {f"{at}.self_attn.{n}_norm.weight": (size,) for n, size in zip("qk", normed, strict=True)}
    shapes["model.norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def _mlp_shapes(kind: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    if kind == granite4.KIND:
        return {"shared_mlp.input_linear": (2 * inner, hidden), "shared_mlp.output_linear": (hidden, inner)}
    parts = {"gate_up_proj": 2 * inner} if kind in ("glm4", "phi3") else {"gate_proj": inner, "up_proj": inner}
    return {f"mlp.{name}": (size, hidden) for name, size in parts.items()} | {"mlp.down_proj": (hidden, inner)}


def _delta_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a gated delta net's tensors."""
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    mixed = values + 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"]
    return {
        "A_log": (heads,),
        "conv1d.weight": (mixed, 1, text["linear_conv_kernel_dim"]),
        "dt_bias": (heads,),
        "in_proj_a.weight": (heads, hidden),
        "in_proj_b.weight": (heads, hidden),
        "in_proj_qkv.weight": (mixed, hidden),
        "in_proj_z.weight": (values, hidden),
        "norm.weight": (text["linear_value_head_dim"],),
        "out_proj.weight": (hidden, values),
    }
