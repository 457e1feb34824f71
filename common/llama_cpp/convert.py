"""The GGUF of a fused model: convert with llama.cpp's own converter, and quantize.

Both write under a temporary name and rename at the end: a file under its final name is complete.
"""

import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.backend import Progress
from common.display import Display
from common.documents import read_json
from common.errors import UserError
from common.files import atomic_write
from common.llama_cpp.gguf_file import damaged, read_tensors
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.tool import OUT, ToolRun, write_file
from common.model_files import scrubbed
from common.models import gemma4, granite4, lfm2, sentencepiece
from common.models.config_kinds import LAYER_TYPES
from common.models.families import context_length, forward_config, is_known
from common.models.model_folder import ModelFolder
from common.models.rope_config import yarn_ratio, yarn_scale
from common.option_fields import NEED_IMATRIX
from common.system.cache import artifact_lock, cache_folder
from common.system.disk import require_disk
from common.system.hardware import thread_limit
from common.system.process import capture, offline_environment


def base_gguf(base: Path, model_hash: str, quant: str, llama: LlamaCpp, display: Display) -> Path:
    """The untuned model as a GGUF of type `quant`, made once for each model and cached.

    There is no importance matrix of it: a type that needs one is replaced by a K-quant of about its size.
    """
    if quant in NEED_IMATRIX:
        plain = "Q3_K_S" if quant.startswith("IQ3") else "Q2_K"
        display.say(f"the untuned model is shown as {plain}: it has no importance matrix, which {quant} needs")
        quant = plain
    folder = cache_folder() / "base-gguf" / model_hash[:16]
    target = folder / f"{quant}.gguf"
    if target.exists():
        return target
    # the folder, because every type of one model goes through the same bf16 file
    with display.stage("base GGUF") as progress, artifact_lock(folder, display.say):
        if not target.exists():
            bf16_gguf, size = folder / "BF16.gguf", 2 * ModelFolder(base).parameter_count
            require_disk([(folder, "the untuned model's GGUFs", 2 * size)], "Free some space.")
            try:
                if quant == "F32":
                    convert(base, target, "base", llama, progress, outtype="f32")
                else:
                    convert(base, bf16_gguf, "base", llama, progress)
                    quantize(bf16_gguf, target, quant, llama, progress)
            finally:
                if quant != "BF16":
                    bf16_gguf.unlink(missing_ok=True)
    return target


_NO_OPTIONS = ("exaone4", "olmo2", "olmo3")  # llama.cpp knows their attention in one form only
_LAYERS_OF_EXAONE_32B = 64  # by their number llama.cpp tells it from the others
# What llama.cpp scales RoPE by, where not as most do. Converters that are no kind of Llama's drop the factors of a
# `llama3`. Granite's fails on them, and SmolLM3's writes what llama.cpp does not take.
_SCALINGS = {
    **dict.fromkeys(gemma4.KINDS, ("default", "proportional")),
    "phi3": ("default", "longrope"),
}
_MOST_SCALINGS = ("default", "linear", "yarn")
_LLAMA3 = ("apertus", "arcee", "exaone4", "exaone_moe", "llama", "mistral", "mixtral")
_WINDOWS = ("exaone4", "gemma2", "gemma3_text", *gemma4.KINDS, "olmo3")  # of which llama.cpp computes them
# For these the converter fails without `tokenizer.model`, or takes `tokenizer.json` and gets other ids.
_NEED_SENTENCEPIECE = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")


@dataclass(frozen=True)
class QuantReport:
    """What a GGUF holds. bits_per_weight: of the tensors alone; tensors: {GGUF type: how many}.

    fallbacks: tensors in another type than the K-quant or IQ type that was asked for. These pack 256 values of a row
    together; llama.cpp gives rows that are no multiple of that a larger, simpler type. (llama-quantize's own count can
    be one less: it leaves out an embedding that serves as output too.)
    """

    quant: str
    bytes: int
    bits_per_weight: float
    tensors: dict[str, int]
    fallbacks: int


def check_convertible(folder: Path, tokenizer: Any | None = None, texts: Sequence[str] = ()) -> None:
    """UserError where the converter would make another model, or another tokenizer.

    That is so where it needs a `tokenizer.model`, and the folder has none and none can be made from it. Called before
    training: the remedy may take a download. The file that would be made is checked on `texts` too.
    tokenizer: the folder's, where it is loaded already.
    """
    model = ModelFolder(folder)
    if fault := _other_model(model):
        raise UserError(f"{folder}: {fault}.", "Use --export fused.")
    if (folder / sentencepiece.NAME).is_file():
        return
    kind = model.model_type
    if sentencepiece.rebuild_checked(folder, tokenizer, texts) is None and kind in _NEED_SENTENCEPIECE:
        raise UserError(
            f"{folder} has no tokenizer.model, and llama.cpp cannot convert a {kind} tokenizer correctly without it.",
            sentencepiece.REMEDY,
        )


def lost_window(config: dict[str, Any]) -> int | None:
    """The sliding window of a known family that llama.cpp would not compute; None where no row exceeds it."""
    windows = {window for window in forward_config(config).windows if window is not None}
    lost = config["model_type"] not in _WINDOWS and windows and min(windows) < context_length(config)
    return min(windows) if lost else None


def _other_model(model: ModelFolder) -> str:
    """What of the model llama.cpp 0.3.36 would compute otherwise, or not at all; empty where nothing is known."""
    config = model.config
    if (fault := _lost_scaling(config, is_known(model.written_config))) or not is_known(model.written_config):
        return fault
    kind, layers, rope = config["model_type"], config["num_hidden_layers"], config["rope_parameters"]
    ropes = [rope[name] for name in LAYER_TYPES] if "full_attention" in rope else [rope]
    if kind == "smollm3" and config["no_rope_layers"] != [int((layer + 1) % 4 != 0) for layer in range(layers)]:
        return "llama.cpp leaves RoPE out of every fourth layer of a SmolLM3, and this model out of others"
    if kind == "exaone4" and (config["sliding_window"] is not None) != (layers == _LAYERS_OF_EXAONE_32B):
        return "llama.cpp knows windows in an EXAONE 4 of 64 layers, and in no other"
    if kind == "ministral3" and config["sliding_window"] is not None:
        return "llama.cpp knows no windows in a Ministral 3"
    if found := [fault for one in ropes if one["rope_type"] == "yarn" and (fault := _other_yarn(one, kind))]:
        return found[0]
    if kind in gemma4.KINDS:
        return _other_gemma4(model)
    if kind == "glm4":
        return _other_glm4(model.path)
    if kind == lfm2.KIND and config["conv_bias"]:
        return "llama.cpp has no biases in the convolutions of an LFM2"
    if kind == granite4.KIND and config["position_embedding_type"] != "rope":
        return "llama.cpp rotates queries and keys of every Granite 4 without Mamba layers, and this model does not"
    return _other_attention(config, kind) if kind in _NO_OPTIONS else ""


def _lost_scaling(config: dict[str, Any], known: bool) -> str:
    """The same of the RoPE scaling. Of an architecture that is not known: of the one that most converters drop."""
    kind, rope = str(config.get("model_type")), config.get("rope_parameters") or {}
    ropes = [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]
    named = {str(one.get("rope_type", "default")) for one in ropes}
    taken = (*_SCALINGS.get(kind, _MOST_SCALINGS), *(["llama3"] if kind in _LLAMA3 else []))
    lost = {name for name in named - {*taken} if known or name == "llama3"}
    return f"llama.cpp does not know the RoPE scaling {min(lost)!r} in a model of type {kind}" if lost else ""


def _other_yarn(rope: dict[str, Any], kind: str) -> str:
    """The same of YaRN. Of what scales its attention and of its betas llama.cpp reads a Ministral 3's alone."""
    under = rope.get("mscale_all_dim") if kind == "ministral3" else 0
    if under is None:
        return "llama.cpp's converter needs mscale_all_dim in a Ministral 3's RoPE"
    if (scale := yarn_scale(rope)) and not math.isclose(scale, yarn_ratio(rope, 1, under), rel_tol=1e-6):
        return "llama.cpp does not read how far this YaRN scales"
    if not rope.get("factor"):
        return "llama.cpp's converter drops a YaRN that states no factor"
    if not rope.get("truncate", True):
        return "llama.cpp rounds the range over which YaRN blends, and this model does not (truncate)"
    if kind != "ministral3" and (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        return "llama.cpp knows YaRN with a beta_fast of 32 and a beta_slow of 1, and this model has others"
    return ""


def _other_glm4(folder: Path) -> str:
    """The same of a GLM-4's tokenizer."""
    added = read_json(folder / "tokenizer.json", "Fetch the model's files again.").get("added_tokens")
    names = {token.get("content") for token in added or [] if isinstance(token, dict)}
    absent = [name for name in ("<|endoftext|>", "<|user|>") if name not in names]
    return f"llama.cpp's converter wants the token {absent[0]} in a GLM-4's tokenizer" if absent else ""


def _other_gemma4(model: ModelFolder) -> str:
    """The same of a Gemma 4."""
    config = model.config
    kinds, first = config["layer_types"], config["num_hidden_layers"] - config["num_kv_shared_layers"]
    if not config["final_logit_softcapping"]:
        return "llama.cpp caps the logits of every Gemma 4, and this model does not"
    if first < len(kinds) and kinds[first - 2 : first] != ["sliding_attention", "full_attention"]:
        return "llama.cpp shares the keys of a sliding layer and of the full one behind it, and this model of others"
    if model.written_config["architectures"][0] == "Gemma4UnifiedForCausalLM":
        return "llama.cpp's converter knows the text part of a Gemma4Unified as a part of it only"
    return ""


def _other_attention(config: dict[str, Any], kind: str) -> str:
    """The same of an attention of which llama.cpp knows one form."""
    if config.get("attention_bias"):
        return f"llama.cpp has no biases in the attention of {kind}"
    if kind.startswith("olmo") and config["tie_word_embeddings"]:
        return f"llama.cpp does not tie the embeddings of {kind}"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return f"llama.cpp wants the heads of {kind} to be together as wide as the model"
    return ""


def convert(
    folder: Path,
    out: Path,
    name: str,
    llama: LlamaCpp,
    progress: Progress,
    outtype: Literal["bf16", "f32", "mmproj"] = "bf16",
) -> None:
    """Write the Hugging Face folder's weights and tokenizer as a bf16 GGUF; `name` goes into its metadata.

    outtype: f32 for weights as exact as the folder's; mmproj for its vision tower in bf16, without a tokenizer. Raises
    UserError where the converter fails (with its last lines; its log stays beside `out`). Raises as check_convertible
    does before it starts: the converter would silently use another model's tokenizer.
    """
    with scrubbed(folder, weights=True) as clean:
        if outtype != "mmproj" and not (clean / sentencepiece.NAME).is_file():
            if sentencepiece.read_state(clean) is None:
                check_convertible(folder)
            else:
                sentencepiece.write(clean)
        command = [sys.executable, str(llama.converter), str(clean), f"--model-name={name}", "--outfile", OUT]
        command += ["--outtype", "bf16", "--mmproj"] if outtype == "mmproj" else ["--outtype", outtype]
        command += ["--no-mtp"] if outtype != "mmproj" and lacks_mtp(ModelFolder(folder)) else []
        remedy = (
            f"The model in {folder} is complete. A newer llama.cpp may know its architecture: --llama-cpp DIR, then "
            "export again."
        )
        write_file(ToolRun("converting to GGUF", command, remedy, offline_environment()), out, progress)


def lacks_mtp(model: ModelFolder) -> bool:
    """Whether it is a Qwen3.5 without the layers that predict more tokens, which transformers drops."""
    has_some = any(name.removeprefix("model.").startswith("mtp.") for name in model.tensors)
    return model.model_type.startswith("qwen3_5") and not has_some


def quantize(
    source: Path, out: Path, quant: str, llama: LlamaCpp, progress: Progress, imatrix: Path | None = None
) -> QuantReport:
    """Quantize the bf16 GGUF `source` to `out` with llama-quantize; UserError where that fails, its log kept."""
    if quant == "BF16":  # what the source is already
        if source.resolve() != out.resolve():
            with atomic_write(out) as temporary:
                shutil.copyfile(source, temporary)
    else:
        remedy = "Look at the free disk space and memory, then export again."
        # run in the matrix's folder and given its bare name, because the path goes into the GGUF
        matrix, cwd = (["--imatrix", imatrix.name], imatrix.parent) if imatrix else ([], None)
        threads = [str(number) for number in [thread_limit()] if number]
        command = [str(llama.quantize), *matrix, str(source.absolute()), OUT, quant, *threads]
        write_file(ToolRun(f"quantizing to {quant}", command, remedy, cwd=cwd), out, progress)
    return report(out, quant)


def estimated_bpw(source: Path, quant: str, llama: LlamaCpp) -> float | None:
    """Bits per weight that `quant` would take, by llama-quantize's dry run; None where an older one has no such run."""
    code, tail = capture([str(llama.quantize), "--dry-run", str(source.absolute()), quant], 120)
    match = re.search(r"quant size .*\(([\d.]+) BPW\)", tail)
    return float(match[1]) if code == 0 and match else None


def _packs_256(quant: str) -> bool:
    """Whether the type packs 256 values of a row together."""
    return "_K" in quant or (quant.startswith("IQ") and quant != "IQ4_NL")


def advice(source: Path, reports: Sequence[QuantReport], llama: LlamaCpp) -> str | None:
    """A hint where fallbacks make a type about as large as a better one, which it names; else None."""
    for found in reports:
        steps = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
        exacter = steps[steps.index(found.quant) + 1 :] if found.quant in steps else steps
        for better in exacter if found.fallbacks and (found.quant in steps or found.quant.startswith("IQ")) else ():
            bits = estimated_bpw(source, better, llama)
            if bits is not None and bits <= 1.12 * found.bits_per_weight:
                return (
                    f"{found.quant} takes {found.bits_per_weight:.2f} bits per weight of this model, {better} would "
                    f"take {bits:.2f}: {bits / found.bits_per_weight - 1:+.0%} in size for a more exact type, "
                    f"--quant {better}"
                )
    return None


def report(gguf: Path, quant: str) -> QuantReport:
    """The QuantReport of a GGUF, from its tensor list; `quant` is the type that was asked for."""
    from gguf import GGML_QUANT_SIZES

    types: Counter[str] = Counter()
    stored, weights, fallbacks = 0, 0, 0
    known = {kind.value: kind for kind in GGML_QUANT_SIZES}
    for tensor in read_tensors(gguf):
        if (kind := known.get(tensor.code)) is None:
            raise damaged(gguf)
        types[kind.name] += 1
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
        weights += math.prod(tensor.shape)
        stored += math.prod(tensor.shape) // values_per_block * bytes_per_block
        # norms and biases stay F32 by design
        fallbacks += _packs_256(quant) and kind.name != "F32" and tensor.shape[0] % 256 != 0
    return QuantReport(quant, gguf.stat().st_size, 8 * stored / max(weights, 1), dict(types), fallbacks)
