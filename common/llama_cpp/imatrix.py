"""An importance matrix from the training rows: which weights a quantization should keep most exact."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.backend import Progress
from common.data.dataset import Example
from common.data.encode import Encoder
from common.data.turn_edges import BadRow
from common.errors import UserError
from common.files import scratch_folder
from common.llama_cpp.gguf_file import read_tensors
from common.llama_cpp.install import LlamaCpp, llama_environment
from common.llama_cpp.tool import OUT, ToolRun, write_file
from common.model_files import tokenize
from common.models.families import language_tensor, text_name
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes, tensor_shapes
from common.option_fields import NEED_IMATRIX
from common.system.hardware import thread_limit

_SUMS = ".in_sum2"  # how the names of the tensors end that hold the importance
CHUNKS = 64  # of _CONTEXT tokens at most; llama.cpp's own advice calls that enough
_CONTEXT = 512
_SHORTEST = 32


@dataclass(frozen=True)
class Calibration:
    """A text to measure the weights on, and about how many tokens it has."""

    text: str
    tokens: int


def calibration_of(rows: Iterable[Example], encoder: Encoder) -> Calibration:
    """Training rows as the model sees them, concatenated; no more of them than are used."""
    parts: list[str] = []
    tokens = 0
    for row in rows:
        if tokens >= CHUNKS * _CONTEXT:
            break
        try:
            parts.append(row.text if row.text is not None else encoder.encode_chat(row)[1].text)
        except BadRow:  # left out of training, too
            continue
        tokens += len(tokenize(encoder.tokenizer, parts[-1])["input_ids"])
    return Calibration("".join(part if part.endswith("\n") else part + "\n" for part in parts), tokens)


def imatrix_tool(llama: LlamaCpp) -> Path:
    """The path of `llama-imatrix`. Raises UserError where this llama.cpp has none."""
    if llama.imatrix is None:
        raise UserError(
            f"--imatrix: {llama.where} has no llama-imatrix.",
            "Build that too (cmake --build build --target llama-imatrix), or leave --llama-cpp out.",
        )
    return llama.imatrix


def check_imatrix_file(given: Path, base: ModelFolder) -> None:
    """UserError where the file is no importance matrix, or one of another model.

    Called before training. llama-quantize itself would leave out silently what a matrix lacks.
    """
    try:
        tensors = [tensor for tensor in read_tensors(given) if tensor.name.endswith(_SUMS)]
    except OSError as error:
        raise UserError(f"--imatrix-file {given} cannot be read: {error.strerror}.", "Check the path.") from None
    except UserError:
        tensors = []
    if not tensors:
        raise UserError(
            f"--imatrix-file {given} is not an importance matrix.",
            "Give a GGUF file that llama-imatrix wrote; it makes one of an older .dat file: llama-imatrix --in-file "
            "OLD.dat -o NEW.gguf",
        )
    layers = {match[1] for tensor in tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    widths = {shape[1] for shape in linear_shapes(base, ["all-linear"]).values()}
    found, expected = len(layers), base.config["num_hidden_layers"]
    if found != expected or not widths <= {tensor.shape[0] for tensor in tensors}:
        raise UserError(
            f"--imatrix-file {given} is of another model: it has {found} layers, and this one {expected}"
            f"{', of other widths' if found == expected else ''}.",
            "Give one of this model, or --imatrix, which makes it from the training rows.",
        )


def check_imatrix_base(quants: Sequence[str], base: ModelFolder) -> None:
    """UserError where a type needs a matrix of every weight, and the model has weights that nothing reads.

    A Gemma 4 from the hub has keys and values of its own in layers that use those of others. Called before training.
    """
    needy = [quant for quant in quants if quant in NEED_IMATRIX]
    if needy and (unread := _unread(base)):
        raise UserError(
            f"--quant {needy[0]}: llama-quantize needs the importance of every weight for it, and the model "
            f"has weights that it never reads, such as {unread[0]}.",
            "Choose a larger type, such as IQ4_XS or Q4_K_M.",
        )


def _unread(base: ModelFolder) -> list[str]:
    """The names of the language model's matrices that no forward pass reads, sorted."""
    known, tied = tensor_shapes(base.config), base.config["tie_word_embeddings"]
    names = {text_name(name) for name in base.tensors if name.endswith(".weight")} - known.keys()
    return sorted(name for name in names if name.startswith("mtp.") or language_tensor(name, tied))


def check_imatrix_rows(tokens: int) -> None:
    """UserError where training rows of so many tokens are too few for a matrix. Called before training."""
    if tokens // 3 < _SHORTEST:
        raise UserError(
            f"--imatrix: the training rows have {tokens} tokens, too few.",
            "Give more rows or --imatrix-file FILE, or leave --imatrix out and choose a type that needs none, such as "
            "Q4_K_M.",
        )


def make_imatrix(bf16_gguf: Path, calibration: Calibration, out: Path, llama: LlamaCpp, progress: Progress) -> None:
    """Run the text through the bf16 GGUF, and write the importance of its weights to `out`.

    Source: llama.cpp, tools/imatrix. Raises UserError where the tool is not there or fails, or the text is too short.
    """
    tool, tokens = imatrix_tool(llama), calibration.tokens
    context = min(_CONTEXT, tokens // 3)  # the tool needs at least two contexts, and its token count differs a little
    check_imatrix_rows(tokens)
    with scratch_folder() as temporary:
        source = temporary / "rows.txt"
        source.write_text(calibration.text, encoding="utf-8")
        # run in the text's folder and given its bare name, because the path goes into the file
        command = [str(tool), "-m", str(bf16_gguf.absolute()), "-f", source.name, "-o", OUT, "--parse-special"]
        command += ["-c", str(context), "-b", str(context), "--chunks", str(CHUNKS), "--no-ppl"]
        if threads := thread_limit():
            command += ["-t", str(threads)]
        remedy = "Close other programs, or leave --imatrix out."
        write_file(ToolRun("importance matrix", command, remedy, llama_environment(), source.parent), out, progress)
