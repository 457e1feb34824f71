"""Which RoPE scalings llama.cpp computes, by its own logits of a tiny model: what is refused, and what is not."""

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
from common.llama_cpp.logits import GgufLogits
from tests import backends
from tests.progress import silent
from tests.unit.test_convertible import KEPT, LOST, OTHER_YARNS

_IDS = np.random.default_rng(0).integers(300, 5000, 96).astype(np.int32)
_FAILS = ("granite", "granitemoehybrid", "smollm3")  # the converter, or llama.cpp with what it wrote
_SHORT = {("exaone4", "llama3"), ("qwen3", "llama3")}  # one of each, where not all are asked for


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
    backend = backends.load("torch", folder, backends.make_recipe(folder))
    wanted = backend.logits(_IDS)[-1]
    backend.close()
    apart = np.abs(logits_of(folder)[: len(wanted)] - wanted).max() / np.abs(wanted).max()
    print(f"{family} {rope['rope_type']}: {apart:.1e}")
    assert (apart < 0.01) == kept
