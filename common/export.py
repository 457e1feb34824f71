"""A complete Hugging Face folder of the fused model, and its GGUFs."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from common.errors import UserError
from common.fuse import fuse
from common.gguf import PROBE, convert, quantize, verify_tokens
from common.llamacpp import LlamaCpp
from common.models import normalise_config, parameter_count, weight_bytes
from common.record import timed
from common.seam import Adapter, Progress
from common.server import Server

_SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class Served:
    """How the exported model is to be served, so that it matches training.

    stops: the ids that end the trained turns, most frequent first; they join the generation config's `eos_token_id`.
    template: the chat template, where training had one.
    """

    stops: list[int]
    template: str | None = None


COPIED = (
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def write_fused(
    base: Path,
    adapter: Adapter,
    out: Path,
    served: Served,
    progress: Progress,
    replaced: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
) -> None:
    """Fuse into `out`: weights, config, generation config, tokenizer and template. Whole, or not there at all.

    `replaced` stands in for weights of the base, as in fuse.
    """
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fuse(base, adapter, temporary, progress, replaced)
        for name in COPIED:
            if (base / name).exists():
                shutil.copyfile(base / name, temporary / name)
        for licence in [*base.glob("LICENSE*"), *base.glob("NOTICE*")]:
            shutil.copyfile(licence, temporary / licence.name)
        config = normalise_config(json.loads((base / "config.json").read_text(encoding="utf-8")))
        _write_json(temporary / "config.json", config)
        generation = _read_json(base / "generation_config.json") or {"bos_token_id": config.get("bos_token_id")}
        known = generation.get("eos_token_id", config.get("eos_token_id"))
        ends = list(dict.fromkeys([*([known] if isinstance(known, int) else known or []), *served.stops]))
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        _write_json(temporary / "generation_config.json", generation)
        _write_served(base, temporary, served)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_served(base: Path, out: Path, served: Served) -> None:
    """The template as a file of its own, and the end of a turn as the tokenizer's: llama.cpp stops on that one."""
    config = _read_json(base / "tokenizer_config.json")
    if served.template is not None:
        (out / "chat_template.jinja").write_text(served.template, encoding="utf-8")
        (out / "chat_template.json").unlink(missing_ok=True)
        if config is not None:
            config.pop("chat_template", None)
    tokens = _read_json(base / "tokenizer.json") or {}
    added = {token["id"]: token["content"] for token in tokens.get("added_tokens", [])}
    if config is not None:
        decoder = config.get("added_tokens_decoder") or {}
        added |= {int(number): token["content"] for number, token in decoder.items()}
        ends = [added[stop] for stop in served.stops if stop in added]
        known = config.get("eos_token")
        if ends and (known.get("content") if isinstance(known, dict) else known) not in ends:
            config["eos_token"] = ends[0]
            if (special := _read_json(out / "special_tokens_map.json")) is not None:
                _write_json(out / "special_tokens_map.json", special | {"eos_token": ends[0]})
        _write_json(out / "tokenizer_config.json", config)


def write_ggufs(
    fused: Path, out: Path, name: str, quants: list[str], llama: LlamaCpp, progress: Progress, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """One bf16 conversion, then every type of `quants` as `model-<type>.gguf`; a report of each.

    `seconds` is told what conversion and quantisation took.
    """
    whole = out / "model-BF16.gguf"
    with timed(seconds, "convert"):
        convert(fused, whole, name, llama, lambda share, text: progress(share / 2, text))
    reports = []
    for number, quant in enumerate(quants):
        target = out / f"model-{quant}.gguf"

        def part(share: float, text: str, number: int = number) -> None:
            progress(0.5 + (number + share) / len(quants) / 2, text)

        with timed(seconds, "quantise"):
            report = quantize(whole, target, quant, llama, part)
        reports.append({"file": str(target.relative_to(out.parent)), **asdict(report)})
    if "BF16" not in quants:
        whole.unlink()
    return reports


def try_gguf(gguf: Path, fused: Path, prompt: list[dict[str, str]], llama: LlamaCpp) -> str:
    """llama.cpp's greedy answer to `prompt`, after its token ids have been compared with transformers'.

    Raises UserError where the two tokenise a text differently: such a model answers, but not as it was trained.
    """
    with Server(llama, gguf, context=1024) as server:
        if differences := verify_tokens(fused, PROBE, server):
            gguf.unlink()
            shown = differences[0]
            raise UserError(
                f"{gguf} tokenises {shown.text!r} otherwise than the model that was trained: "
                f"{shown.gguf} instead of {shown.transformers}.",
                "The file is removed. Check that the base folder's tokenizer files are the model's own.",
            )
        return server.chat(prompt, _SAMPLE_TOKENS) if prompt else ""


def trained_bytes(adapter: Adapter | None, base: Path) -> int:
    """Of what is trained, in float32."""
    if adapter is None:
        return 4 * parameter_count(base)
    return sum(part.nbytes for weight in adapter.weights.values() for part in weight.parts().values())


def disk_needed(base: Path, export: str, quants: list[str], adapter_bytes: int) -> int:
    """Bytes that checkpoints, the fused folder, the bf16 GGUF and the quants will take at their peak."""
    # three checkpoints while one is written, each with both layouts, the best and two moments; both layouts at the end
    checkpoints = (3 * 5 + 2) * adapter_bytes
    if export == "none":
        return checkpoints
    fused = weight_bytes(base)
    if export == "fused":
        return checkpoints + fused
    whole = 2 * parameter_count(base)
    return checkpoints + fused + whole + sum(whole if quant in ("BF16", "F16") else whole * 5 // 8 for quant in quants)


def check_disk(folder: Path, needed: int) -> None:
    """Raises UserError where the disk that will hold `folder` has less than `needed` bytes free."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{existing} has {free / 1e9:.1f} GB free, and this run will write up to {needed / 1e9:.1f} GB.",
            "Free some space, give --output on another disk, or stop earlier with --export fused or none.",
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
