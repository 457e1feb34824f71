"""The fused model as a quantized mlx-lm folder, by mlx-lm's own quantizer, in a process of its own."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.display import Display
from common.errors import UserError
from common.files import atomic_folder
from common.model_files import TOKENIZER_FILES, copy_file, license_files
from common.models import gemma4, granite4, lfm2
from common.models.config_kinds import LAYER_TYPES
from common.models.families import (
    MULTIMODAL,
    forward_config,
    hf_name,
    is_known,
    language_tensor,
    mlx_name,
    mlx_type,
    text_name,
)
from common.models.model_folder import ModelFolder, is_model_folder
from common.models.rope_config import unrounded_yarn, yarn_ratio, yarn_scale
from common.system.hardware import mlx_fault
from common.system.process import offline_environment, run_logged

_SMALL = 10**9  # weights: a model with fewer loses much by 4 bits
# mlx-lm scales no RoPE of theirs, or every row's alike
_PLAIN_ROPE = ("gemma2", "glm4", granite4.KIND, lfm2.KIND, "phi3")
_GROUP = 64  # weights that share a scale


def scheme_of(asked: str | None, base: ModelFolder) -> str:
    """What --mlx-bits names, or what fits the model's size."""
    return asked or ("8" if base.parameter_count < _SMALL else "4")


def most_bits(scheme: str) -> int:
    return int(scheme[-1])


def check_installed() -> None:
    """UserError where MLX or mlx-lm is not installed."""
    if fault := mlx_fault():
        raise UserError(
            f"--export mlx: {fault.what}",
            f"{fault.fix}; or train with --export fused, and run `fuse RUN --export mlx` where mlx-lm is.",
        )


def check_model(base: ModelFolder, display: Display) -> None:
    """UserError where mlx-lm 0.32 would compute another model; a warning where it does beyond some length."""
    kind, found = base.config["model_type"], forward_config(base.config)
    bases = {rope["rope_theta"] for rope in filter(None, found.ropes)}
    if kind == "gpt_oss":  # which the MLX backend trains with experts and RoPE of its own
        raise UserError(
            "--export mlx: mlx-lm reads the experts of a gpt-oss in MXFP4 alone, and rounds its YaRN.",
            "Use --export fused.",
        )
    for rope in filter(None, found.ropes):
        partly = rope.get("partial_rotary_factor", 1) != 1 and kind != "glm4"
        wrong = kind in _PLAIN_ROPE and (rope["rope_type"] != "default" or partly)
        wrong |= _other_yarn(rope) or (kind == "olmo3" and len(bases) > 1)
        if wrong:
            raise UserError(
                f"--export mlx: mlx-lm does not compute RoPE {rope['rope_type']!r} for {kind} as training did.",
                "Use --export fused." if unrounded_yarn(rope) else "Use --export gguf or fused.",
            )
    if kind in ("exaone4", "olmo3") and any(found.windows) and len({*base.config["layer_types"]}) < len(LAYER_TYPES):
        raise UserError(
            f"--export mlx: mlx-lm computes no {kind} whose layers are all of one kind.", "Use --export gguf or fused."
        )
    windows = {window for window in found.windows if window is not None}
    if windows and kind not in ("exaone4", "gemma3_text", *gemma4.KINDS, "olmo3"):
        display.warn(
            f"mlx-lm has no sliding window for {kind}: beyond {min(windows)} tokens, prompt and answer together, its "
            "results differ from training"
        )


def _other_yarn(rope: dict[str, Any]) -> bool:
    """Whether mlx-lm computes another YaRN.

    It reads no attention_factor and each mscale alone, and rounds the range over which frequencies blend.
    """
    if unrounded_yarn(rope):
        return True
    scale = yarn_scale(rope)
    return scale is not None and not math.isclose(
        scale, yarn_ratio(rope, rope.get("mscale") or 1, rope.get("mscale_all_dim") or 0), rel_tol=1e-6
    )


def write_mlx_model(fused: Path, out: Path, progress: Progress, scheme: str = "4") -> dict[str, Any]:
    """Write `fused` as a quantized mlx-lm folder, with its tokenizer, template, end tokens and license; a report.

    Of a multimodal model only the language model is written: mlx-lm has no other part. Raises UserError where mlx-lm
    fails.
    """
    log = out.with_name(f"{out.name}.log")
    log.unlink(missing_ok=True)  # of a run that failed
    title = f"quantizing to {scheme} bits"
    progress(0.0, title)
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))))
    env = offline_environment() | {"PYTHONPATH": path}
    with atomic_folder(out) as temporary:
        command = [sys.executable, "-P", "-m", "common.export.mlx", str(fused), str(temporary), scheme]
        code, tail = run_logged(command, log, lambda line: None, env)
        if code or not is_model_folder(temporary):
            raise UserError(
                f"mlx-lm could not convert {fused} (exit status {code}). Its log, {log}, ends with:\n{tail}",
                f"{fused} is complete. Look at the free disk space and memory, then export again.",
            )
        kept = [*TOKENIZER_FILES, "generation_config.json"]
        for file in [fused / name for name in (*kept, *license_files(fused))]:
            if file.is_file():
                copy_file(file, temporary / file.name)
    log.unlink(missing_ok=True)
    progress(1.0, title)
    settings = ModelFolder(out).written_config["quantization"]
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "folder": out.name,
        "bytes": size,
        "scheme": scheme,
        **{key: settings[key] for key in ("bits", "group_size")},
    }


def quantize(fused: Path, out: Path, scheme: str) -> None:
    """Load `fused` lazily, quantize it and save it to `out`; run in a process of its own.

    A mixed scheme is one of mlx-lm's own recipes: more bits for some layers' v_proj and down_proj, and for lm_head.

    Why not mlx_lm.convert, which does the same to the weights: it cannot read a multimodal model in transformers 4.52's
    layout, and it rewrites the tokenizer.
    """
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, arguments = _get_classes(config)
        if not is_known(config):  # it was loaded by mlx-lm alone in training too
            return model_class, arguments
        nested = config["architectures"][0] in MULTIMODAL

        def named(weights: dict[str, Any]) -> dict[str, Any]:
            kept = {n: w for n, w in weights.items() if language_tensor(text_name(n), config["tie_word_embeddings"])}
            if not nested:
                return kept
            head = {"lm_head.weight": "language_model.lm_head.weight"}
            return {head.get(hf_name(name), mlx_name(hf_name(name))): weight for name, weight in kept.items()}

        def make(args: Any) -> Any:
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)
            model.sanitize = lambda weights: sanitize(named(weights))
            return model

        return make, arguments

    kind = {"model_type": mlx_type(ModelFolder(fused).model_type)}
    model, config = load_model(fused, lazy=True, model_config=kind, get_model_classes=classes)
    mixed = mixed_quant_predicate_builder(scheme.replace("-", "_"), model, _GROUP) if "mixed" in scheme else None
    bits = int(scheme.split("-")[1]) if mixed else int(scheme)
    model, config = quantize_model(model, config, group_size=_GROUP, bits=bits, quant_predicate=mixed)
    save_model(out, model, donate_model=True)
    save_config(config, out / "config.json")


if __name__ == "__main__":
    try:
        quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except (OSError, RuntimeError) as error:  # MLX raises the latter where it cannot write, or memory runs out
        sys.exit(str(error))
