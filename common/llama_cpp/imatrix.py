"""An importance matrix out of the training rows: which weights a quantization had better keep exact."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common.backend import Progress
from common.data.dataset import Example
from common.data.encode import Encoder
from common.errors import UserError
from common.files import atomic_write
from common.llama_cpp.install import LlamaCpp
from common.system.process import run_logged

CHUNKS = 64  # of _CONTEXT tokens at most: what llama.cpp's own advice deems enough for such a purpose
_CONTEXT = 512


def calibration_text(rows: Iterable[Example], encoder: Encoder) -> tuple[str, int]:
    """Training rows as the model sees them, end to end, and about how many tokens they are; no more than are used."""
    parts: list[str] = []
    tokens = 0
    for row in rows:
        if tokens >= CHUNKS * _CONTEXT:
            break
        parts.append(row.text if row.text is not None else encoder.encode_chat(row)[1].text)
        tokens += len(encoder.tokenizer(parts[-1], add_special_tokens=False)["input_ids"])
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts), tokens


def imatrix_tool(llama: LlamaCpp) -> Path:
    """Raises UserError where this llama.cpp has none."""
    if llama.imatrix is None:
        raise UserError(
            f"--imatrix: {llama.where} has no llama-imatrix.",
            "Build that too (cmake --build build --target llama-imatrix), or leave --llama-cpp out.",
        )
    return llama.imatrix


def make_imatrix(whole: Path, text: str, tokens: int, out: Path, llama: LlamaCpp, progress: Progress) -> None:
    """Run `text` of about `tokens` tokens through the bf16 GGUF `whole` and write what its weights saw to `out`.

    Source: llama.cpp, tools/imatrix. Raises UserError where the tool is not there or fails.
    """
    tool = imatrix_tool(llama)
    context = min(_CONTEXT, tokens // 3)  # the tool wants two contexts at least, and counts a little otherwise
    if context < 32:
        raise UserError(f"--imatrix: the training rows have {tokens} tokens, too few.", "Leave --imatrix out.")
    progress(0.0, "importance matrix")
    with tempfile.TemporaryDirectory() as temporary, atomic_write(out) as partial:
        source, log = Path(temporary) / "rows.txt", Path(temporary) / "log"
        source.write_text(text, encoding="utf-8")
        command = [
            str(tool),
            "-m",
            str(whole.absolute()),
            "-f",
            source.name,
            "-o",
            str(partial.absolute()),
            "--parse-special",
        ]
        command += ["-c", str(context), "-b", str(context), "--chunks", str(CHUNKS), "--no-ppl"]
        env = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}
        code, tail = run_logged(command, log, lambda line: None, env, source.parent)  # its name goes into the file
        if code != 0 or not partial.is_file():
            raise UserError(
                f"llama-imatrix failed (exit status {code}):\n{tail}",
                "Close other programs, or leave --imatrix out.",
            )
    progress(1.0, "importance matrix")
