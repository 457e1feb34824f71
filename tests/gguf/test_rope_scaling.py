"""Which RoPE scalings and windows llama.cpp computes, by its own logits of a tiny model: what is refused, what not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.verified import write_base
from common.errors import UserError
from common.llama_cpp import convert as convert_module
from common.llama_cpp.build import own
from common.llama_cpp.convert import convert
from common.llama_cpp.convertible import lost_window
from common.llama_cpp.logits import GgufLogits
from common.models.model_folder import ModelFolder
from tests import backends
from tests.progress import silent
from tests.unit.test_convertible import KEPT, LOST, OTHER_YARNS

_IDS = np.random.default_rng(0).integers(300, 5000, 96).astype(np.int32)
_FAILS = ("granite", "granitemoehybrid", "smollm3")  # the converter, or llama.cpp with what it wrote
_SHORT = {("llama", "llama3"), ("qwen3", "llama3")}  # one that is kept and one that is lost


def _cases() -> list[Any]:
    lost = [*LOST, *((family, rope) for family, rope, _ in OTHER_YARNS)]
    cases = [(*one, True) for one in KEPT] + [(*one, False) for one in lost]
    return [
        pytest.param(
            *(family, rope, kept),
            id=f"{family}-{rope['rope_type']}",
            marks=[] if (family, rope["rope_type"]) in _SHORT else [pytest.mark.long],
        )
        for family, rope, kept in cases
        if family != "phi3"  # transformers itself takes no other than longrope
    ]


def write_scaled(folder: Path, family: str, rope: dict[str, Any]) -> None:
    write_base(folder, family)
    config = json.loads((folder / "config.json").read_text())
    ropes = config["rope_parameters"]
    config["rope_parameters"] = ropes | {"full_attention": rope} if "full_attention" in ropes else rope
    if family == "mistral":  # llama.cpp computes none
        config["sliding_window"] = None
    (folder / "config.json").write_text(json.dumps(config))


def logits_of(folder: Path) -> np.ndarray:
    """After the last token, by llama.cpp."""
    llama, gguf = own(silent), folder.parent / "model.gguf"
    assert llama.logits is not None
    convert(folder, gguf, "tiny", llama, silent, "f32")
    with GgufLogits(llama.logits, gguf, len(_IDS)) as logits:
        return logits(_IDS, np.array([len(_IDS) - 1]))[0]


def distance(folder: Path) -> float:
    """Of llama.cpp's logits from PyTorch's, as a share of the largest."""
    backend = backends.load("torch", folder, backends.make_recipe(folder))
    wanted = backend.logits(_IDS)[-1]
    backend.close()
    return float(np.abs(logits_of(folder)[: len(wanted)] - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("family", "rope", "kept"), _cases())
def test_llama_cpp_computes_the_scalings_that_are_not_refused(
    family: str, rope: dict[str, Any], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    write_scaled(folder, family, rope)
    monkeypatch.setattr(convert_module, "check_convertible", lambda folder: None)
    if not kept and family in _FAILS:
        with pytest.raises(UserError, match=r"converting to GGUF failed|returned no logits"):
            logits_of(folder)
        return
    apart = distance(folder)
    print(f"{family} {rope['rope_type']}: {apart:.1e}")
    assert (apart < 0.01) == kept


@pytest.mark.long
@pytest.mark.parametrize("family", ["mistral", "qwen2", "smollm3"])
def test_llama_cpp_computes_no_window_of(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_scaled(folder, family, {"rope_type": "default", "rope_theta": 1e4})
    config = json.loads((folder / "config.json").read_text()) | {"use_sliding_window": True, "max_window_layers": 0}
    apart = {}
    for window in (24, len(_IDS)):
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
        assert lost_window(ModelFolder(folder).config) == window
        apart[window] = distance(folder)
    print(f"{family}: {apart}")
    assert apart[24] > 0.1
    assert apart[len(_IDS)] < 0.01
