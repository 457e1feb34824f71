"""The frozen base model: transformers' own, every weight read from the checkpoint and checked."""

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import torch

from common.errors import UserError, first_line
from common.models.families import is_known, text_name
from common.models.model_folder import ModelFolder
from common.recipe import Recipe
from torch_backend.attention import register
from torch_backend.host_memory import release_pages
from torch_backend.linear_attention import install_linear_attention
from torch_backend.quantize import quantization_config, quantize_nf4

Stored = Literal["matrices", "tables", "none"]  # tables: embeddings of each layer, which no product reads
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# From a multimodal checkpoint's names, in the older layout and in today's, to those of the language model alone.
_TEXT_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}


def import_libraries() -> None:
    """Import them before memory is counted: what they take is not the model's. Ours is the only display."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def load_model(base: ModelFolder, recipe: Recipe, device: torch.device, sharded: bool) -> Any:
    """The base in the recipe's precision and quantization, on the device.

    sharded: as it is stored, on the CPU: `Shards` does the rest.
    """
    dtype, quantization = DTYPES[recipe.precision], quantization_config(recipe.quantization)
    settings = {"device_map": {"": device}, "quantization_config": quantization} if quantization else {}
    known = is_known(base.config)
    model = load_base(base, dtype, **settings if known else settings | {"attn_implementation": None})
    if recipe.quantization == "nf4":
        quantize_nf4(model, dtype, device)
    if not (quantization or sharded):
        if known:
            convert(model, dtype, kept_stored(recipe, device))
        model.to(device)
    return model


def kept_stored(recipe: Recipe, device: torch.device) -> Stored:
    """Which 16-bit weights stay as they are stored."""
    if recipe.method == "full":
        return "none"
    return "matrices" if (recipe.precision, device.type) == ("fp32", "cpu") else "tables"


def load_base(base: ModelFolder, dtype: torch.dtype, **settings: Any) -> Any:
    """The language model alone, in evaluation mode on the CPU, its weights in the stored type: `convert` makes `dtype`.

    `settings` are passed to `from_pretrained`, which then makes `dtype` itself. Of a multimodal model the other parts
    stay on the disk: text rows never reach them, and the fused folder copies them. Raises UserError where the
    checkpoint lacks a weight, which transformers would initialize at random.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = _config(base)
    # in the stored type the weights stay in the mapped file until they are used
    stored = getattr(torch, base.dtype)
    names = {"key_mapping": _TEXT_NAMES} if "text_config" in base.written_config else {}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the vision tower's tensors; missing ones are reported below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base.path,
            config=config,
            dtype=dtype if settings else stored,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **names,
            **{"attn_implementation": register()} | settings,
        )
    finally:
        logging.set_verbosity(level)
    missing = sorted({*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])})
    if missing:
        raise UserError(
            f"{base.path} lacks {len(missing)} weights of its model, or has them in another shape: {missing[0]} ...",
            "Fetch the model again.",
        )
    if dtype == torch.float32 and not settings:
        _keep_wider(model, base)
    if is_known(base.config):
        install_linear_attention(model)
    return model


@torch.no_grad()
def _keep_wider(model: Any, base: ModelFolder) -> None:
    """Read again what the file stores in float32 though most of it is in 16 bits, which transformers has rounded."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())} if base.dtype != "float32" else {}
    for name, tensor in base.tensors.items():
        if tensor.dtype == "F32" and (parameter := named.get(text_name(name))) is not None:
            read = bytearray(b"".join(tensor.chunks()))
            parameter.data = torch.frombuffer(read, dtype=torch.float32).reshape(tensor.shape)


def _config(base: ModelFolder) -> Any:
    """transformers' config of the language model, without dropout of its own: no seed of ours would hold it."""
    config = _known_config(base) if is_known(base.config) else _read_config(base)
    for name in config.to_dict():
        if name.endswith(("dropout", "_pdrop", "jitter_noise")):  # mlx-lm has none of these
            setattr(config, name, 0.0)
    return config


def _known_config(base: ModelFolder) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**{key: value for key, value in base.config.items() if key not in _NOT_SETTINGS})


def _read_config(base: ModelFolder) -> Any:
    """Of an unknown architecture, as transformers reads the file."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    except Exception as error:  # whatever a config's code makes of a value that it does not expect
        raise UserError(f"transformers cannot read this config: {first_line(error)}", "Update transformers.") from None
    config = config.get_text_config()
    config.tie_word_embeddings = base.config.get("tie_word_embeddings", config.tie_word_embeddings)
    return config


def check_checkpointing(model: Any) -> None:
    """UserError where transformers' code of the model cannot compute its layers a second time."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"transformers has no gradient checkpointing for {type(model).__name__}.",
            "Use --gradient-checkpointing false and a lower --micro-batch-tokens.",
        )


def plain_layers(base: ModelFolder) -> dict[str, tuple[int, int]]:
    """See `common.backend_package.BackendPackage`."""
    from transformers import AutoModelForCausalLM

    config = _config(base)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
        except Exception as error:  # whatever a model's code makes of a config that it does not expect
            raise UserError(f"transformers cannot make this model: {first_line(error)}", "Try another model.") from None
    from torch_backend.experts import expert_shapes

    modules = {name.split("layers.", 1)[1]: module for name, module in model.named_modules() if "layers." in name}
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        if name.endswith(".experts"):
            shapes |= {f"{name}.{own}": shape for own, shape in expert_shapes(module).items()}
        elif type(module) is torch.nn.Linear:
            shapes[name] = (module.out_features, module.in_features)
    fused = base.config["model_type"] in _FUSED_KERNELS
    return {name: shape for name, shape in shapes.items() if not (fused and name.endswith("out_proj"))}


@torch.no_grad()
def convert(
    model: Any,
    dtype: torch.dtype,
    kept: Stored,
    adapter: Collection[torch.nn.Parameter] = (),
    finish: Callable[[Any], None] = lambda layer: None,
) -> None:
    """Convert every weight to `dtype`, block by block; pages of the file that were read are released.

    kept: what the file stores in 16 bits and stays mapped from it; products of matrices widen them (`matmul.py`).
    adapter: parameters that stay as they are. finish: is called with each layer whose weights are converted.
    """
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    stored = [m for m in embeddings if m is not model.get_input_embeddings()] if kept != "none" else []
    if kept == "matrices":
        stored = [*embeddings, *(m for m in model.modules() if type(m) is torch.nn.Linear)]
    held = {m.weight for m in stored if m.weight.dtype in (torch.bfloat16, torch.float16)}
    left = {*model.parameters()} - held - {*adapter}
    for part in [*model.model.layers, model]:
        for parameter in left.intersection(part.parameters()):
            _convert(parameter, dtype)
            left.remove(parameter)
        if part is not model:
            finish(part)
    model.config.dtype = dtype
    for embed in embeddings:
        if hasattr(embed, "embed_scale"):  # Gemma's, which was computed in the stored type: 25.25 in place of 25.298
            embed.embed_scale = torch.tensor(embed.scalar_embed_scale, dtype=dtype)
        if embed.weight in held:
            embed.forward = partial(_embed, embed, dtype)


def _convert(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    stored = parameter.data
    if stored.dtype == dtype or not stored.is_floating_point():
        return
    wide = torch.empty_like(stored, dtype=dtype)
    rows = max(1, _BLOCK // max(1, stored[0].numel()))
    for start in range(0, len(stored), rows):
        wide[start : start + rows] = stored[start : start + rows]
        release_pages(stored[start : start + rows])
    parameter.data = wide


def _embed(module: Any, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    found = torch.nn.functional.embedding(ids, module.weight).to(dtype)
    return found * module.embed_scale if hasattr(module, "embed_scale") else found


# Whose kernels read the weight of `out_proj` themselves, so that an adapter on it would have no effect.
_FUSED_KERNELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_BLOCK = 2**23  # weights converted at a time


_NOT_SETTINGS = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}
