"""The GGUF of a fused model: convert with llama.cpp's own converter, and quantize.

Both write under a temporary name and rename at the end: a file under its final name is complete.
"""

import hashlib
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.backend import Progress
from common.display import Display
from common.errors import UserError
from common.files import atomic_write, file_digest
from common.llama_cpp.convertible import check_convertible
from common.llama_cpp.gguf_file import damaged, read_tensors
from common.llama_cpp.install import LlamaCpp, llama_environment
from common.llama_cpp.tool import OUT, ToolRun, write_file
from common.model_files import INDEX, scrubbed
from common.models import sentencepiece
from common.models.model_folder import CONFIG_FILE, ModelFolder
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
    by = hashlib.sha256(llama.version.encode()).hexdigest()[:8]
    folder = cache_folder() / "base-gguf" / f"{model_hash[:16]}-{by}"
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
        complete_config(clean / CONFIG_FILE)
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


def check_vocabulary(folder: Path, llama: LlamaCpp) -> None:
    """UserError where the converter does not know how the model's tokenizer splits text; it needs no weights for that.

    Each tokenizer is asked about once. Where the converter fails otherwise, nothing is said: that may not be its last
    word.
    """
    with scrubbed(folder) as clean:
        (clean / INDEX).unlink(missing_ok=True)  # of weights that are not there
        complete_config(clean / CONFIG_FILE)
        made = hashlib.sha256(f"{llama.converter} {llama.version} {ModelFolder(clean).model_type}".encode())
        for file in sorted(clean.glob("*token*")):
            made.update(file_digest(file).encode())
        known = cache_folder() / "vocabularies" / made.hexdigest()[:32]
        if known.exists():
            return
        if not (clean / sentencepiece.NAME).is_file() and sentencepiece.read_state(clean) is not None:
            sentencepiece.write(clean)
        command = [sys.executable, str(llama.converter), str(clean), "--vocab-only"]
        code, tail = capture([*command, "--outfile", str(clean / "vocab.gguf")], 300, env=offline_environment())
    if code and _UNKNOWN.search(tail):
        raise UserError(
            f"{folder}: llama.cpp's converter does not know its tokenizer:\n{tail.splitlines()[-1]}",
            "Use --export fused; or a llama.cpp that knows it: --llama-cpp DIR.",
        )
    if code == 0:
        with suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()


_UNKNOWN = re.compile("pre-tokenizer was not recognized|NotImplementedError")


def complete_config(file: Path) -> None:
    """Rewrite the config of a Gemma 4 12B that transformers has saved, for llama.cpp's converters.

    They ask for a setting of mixtures, which the hub's config has. And they go by the architecture of the text part,
    where the config names one, but know that of the complete model alone.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config.get("text_config")
    if config.get("model_type") == "gemma4_unified" and isinstance(text, dict):
        text.pop("architectures", None)
        text.setdefault("moe_intermediate_size", None)
        file.write_text(json.dumps(config), encoding="utf-8")


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
        write_file(ToolRun(f"quantizing to {quant}", command, remedy, llama_environment(), cwd), out, progress)
    return report(out, quant)


def estimated_bpw(source: Path, quant: str, llama: LlamaCpp) -> float | None:
    """Bits per weight that `quant` would take, by llama-quantize's dry run; None where an older one has no such run."""
    code, tail = capture(
        [str(llama.quantize), "--dry-run", str(source.absolute()), quant], 120, env=llama_environment()
    )
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
