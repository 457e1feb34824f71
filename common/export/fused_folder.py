"""A complete Hugging Face folder of the fused model."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from common.backend import Adapter, Progress
from common.documents import read_json
from common.errors import UserError
from common.export.model_sampling import Thinking, export_sampling
from common.files import atomic_folder
from common.model_files import COPIED, copy_file, license_files, read_config, without_code
from common.models import sentencepiece
from common.models.families import normalize_config
from common.models.fuse import fuse
from common.models.model_folder import ModelFolder
from common.models.rope_config import for_transformers_4


@dataclass(frozen=True)
class ServingConfig:
    """How the exported model must be served to match training.

    stops: the ids that end the trained turns, most frequent first; they are added to the generation config's
    `eos_token_id`. template: the chat template, where training had one. thinking: the mode that was trained.
    """

    stops: list[int]
    template: str | None = None
    thinking: Thinking = "off"


def write_fused(
    base: ModelFolder,
    adapter: Adapter,
    out: Path,
    served: ServingConfig,
    progress: Progress,
    replaced: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
) -> None:
    """Write the fused model to `out`, complete or not at all: weights, config, generation config, tokenizer, template.

    `replaced`: weights to take in place of the base's, as in fuse. Where the base has no `tokenizer.model` and its kind
    needs one, it is rebuilt.
    """
    with atomic_folder(out) as temporary:
        fuse(base, adapter, temporary, progress, replaced)
        for name in (*COPIED, *license_files(base.path)):
            if (base.path / name).is_file():
                copy_file(base.path / name, temporary / name)
        config = for_transformers_4(normalize_config(without_code(base.written_config)))
        _write_json(temporary / "config.json", config)
        generation = dict(base.generation_config) or {"bos_token_id": config.get("bos_token_id")}
        known = generation.get("eos_token_id", config.get("eos_token_id"))
        ends = list(dict.fromkeys([*([known] if isinstance(known, int) else known or []), *served.stops]))
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        sampling = export_sampling(generation, base.config["model_type"], served.thinking)
        if any(generation.get(name) != value for name, value in sampling.items()):
            generation |= {"do_sample": True, **sampling}
        _write_json(temporary / "generation_config.json", generation)
        _write_served(temporary, served)
        if served.template is not None:
            sentencepiece.adapt_space_prefix(temporary)
        if not (temporary / sentencepiece.NAME).exists():
            # Without one the folder is still complete; an export to GGUF was refused before training.
            with contextlib.suppress(UserError):
                sentencepiece.write(temporary)


def _write_served(out: Path, served: ServingConfig) -> None:
    """Write the template as a file of its own, and the end of a turn as the tokenizer's EOS: llama.cpp stops there."""
    config = _read_json(out / "tokenizer_config.json")
    if served.template is not None:
        (out / "chat_template.jinja").write_text(served.template, encoding="utf-8")
        (out / "chat_template.json").unlink(missing_ok=True)
        if config is not None:
            config.pop("chat_template", None)
    path = out / "tokenizer.json"
    tokens = read_json(path, "Fetch the model's files again.") if path.exists() else {}
    added = _added_tokens(tokens.get("added_tokens"))
    if config is not None:
        decoder = config.get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, dict) else ():
            if re.fullmatch(r"\d{1,9}", number) and isinstance(token, dict):
                added |= _added_tokens([token | {"id": int(number)}])
        ends = [added[stop] for stop in served.stops if stop in added]
        known = config.get("eos_token")
        if ends and (known.get("content") if isinstance(known, dict) else known) not in ends:
            config["eos_token"] = ends[0]
            if (special := _read_json(out / "special_tokens_map.json")) is not None:
                _write_json(out / "special_tokens_map.json", special | {"eos_token": ends[0]})
        _write_json(out / "tokenizer_config.json", config)


def _added_tokens(listed: Any) -> dict[int, str]:
    """`{id: text}` of the tokens in the list, as far as they have both."""
    found = {}
    for token in listed if isinstance(listed, list) else []:
        match token:
            case {"id": int(number), "content": str(text)}:
                found[number] = text
    return found


def trained_bytes(adapter: Adapter | None, base: ModelFolder) -> int:
    """Bytes of the trained parameters in float32."""
    if adapter is None:
        return 4 * base.parameter_count
    return sum(part.nbytes for weight in adapter.weights.values() for part in weight.parts().values())


def checkpoints_disk(adapter_bytes: int, keep: int) -> int:
    """Upper bound of the bytes that training writes. keep: how many checkpoints stay."""
    # one more while it is written: adapter, best adapter and two moments each; at the end both layouts
    return ((keep + 1) * 4 + 2) * adapter_bytes


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_config(path) if path.exists() else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
