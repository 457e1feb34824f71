"""What `verify` found, as run.json keeps it and the model card shows it."""

from typing import Any

from pydantic import BaseModel, ConfigDict

_KEPT = ConfigDict(extra="allow", frozen=True)  # fields that only other versions know are kept as they are


class DivergenceRecord(BaseModel):
    """How far one model's distributions are from another's. None: it was not finite."""

    model_config = _KEPT

    mean_kl: float | None = None
    p99_kl: float | None = None
    same_top: float | None = None  # share of positions where both rank the same token first


# What `verify` compares, and with what. Any other name is a quantized GGUF, compared with the bf16 one.
COMPARED = {"base": ("base, untuned", "tuned"), "fused": ("fused", "tuned"), "BF16": ("BF16 GGUF", "fused")}


class VerifyRecord(BaseModel):
    """What `verify` found."""

    model_config = _KEPT

    verdict: str = ""
    checks: list[dict[str, Any]] = []
    divergence: dict[str, DivergenceRecord] = {}  # by what was compared, as in COMPARED
    rows: int = 0
    held_out: bool = False
