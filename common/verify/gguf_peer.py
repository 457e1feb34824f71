"""llama.cpp as the other implementation of a model that is tried, where only one backend is installed."""

from pathlib import Path

import numpy as np

from common.errors import Unable, UserError
from common.llama_cpp.convert import convert
from common.llama_cpp.install import own_build
from common.llama_cpp.logits import GgufLogits
from common.models.model_folder import ModelFolder

PEER = "another implementation"  # the name of this check
NOT_BUILT = "none: llama.cpp is not built (python cli.py llama build)"


def gguf_logits(model: ModelFolder, ids: np.ndarray, scratch: Path) -> np.ndarray | str:
    """Logits [T, vocabulary] of the model's float32 GGUF in llama.cpp, or why there are none.

    Its cache is in 16 bits. Only the build of ours has the tool that returns logits.
    """
    llama, gguf = own_build(), scratch / "model.gguf"
    if llama is None or llama.logits is None:
        return NOT_BUILT
    try:
        convert(model.path, gguf, "tried", llama, lambda share, text: None, "f32")
    except Unable:
        raise
    except UserError:
        return "none: no GGUF can be made of it"
    try:
        with GgufLogits(llama.logits, gguf, len(ids)) as compute:
            return compute(ids, np.arange(len(ids)))
    except Unable:
        raise
    except UserError:
        return "none: llama.cpp does not load its GGUF"
