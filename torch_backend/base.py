"""The frozen base model: transformers' own, loaded so that nothing is left to chance."""

import json
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.families import text_config
from torch_backend.attention import register

# A multimodal checkpoint's names within its language model, of the older layout and of today's.
_TEXT_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}


def load_base(folder: Path, dtype: torch.dtype, **how: Any) -> Any:
    """The language model alone, in evaluation mode on the CPU; `how` goes on to `from_pretrained`.

    Of a multimodal model the other parts stay on the disk: its text rows never reach them, and the fused folder takes
    them over as they are. Raises UserError where the checkpoint lacks a weight, which transformers would draw by lot.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = text_config(written)
    config = AutoConfig.for_model(**{key: value for key, value in text.items() if key not in _NO_OPTIONS})
    names = {"key_mapping": _TEXT_NAMES} if "text_config" in written else {}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the vision tower's tensors; what is lacking is told below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=register(),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **names,
            **how,
        )
    finally:
        logging.set_verbosity(level)
    lacking = sorted({*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])})
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} weights of its model, or has them in another shape, such as {lacking[0]}.",
            "Fetch the model anew.",
        )
    return model


_NO_OPTIONS = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}
