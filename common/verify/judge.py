"""What divergences mean: rounding, a fault, or a quantization that takes too much of the tune."""

import math
from collections.abc import Iterator

from common.verify.divergence import Divergence
from common.verify.server_checks import Check, CheckState

# KL below this is the rounding of bf16 weights, activations and of llama.cpp's float16 cache, not a fault.
_ROUNDING = 2e-3
_FAR = 0.02  # and this is never only rounding
_LOST, _GONE = 0.1, 0.5  # of the tune's own KL: a quantization that takes more is flagged, or called broken
_TUNED = 0.5  # a tune of less is so small that any 4 bits drown it
_LADDER = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16")  # each with clearly more bits than the last


def verdict(checks: list[Check]) -> str:
    """`broken`, `sound with remarks` or `sound`."""
    states = {check.state for check in checks}
    return "broken" if "broken" in states else "sound with remarks" if "note" in states else "sound"


def judge_fused(links: dict[str, Divergence]) -> Iterator[Check]:
    """A check of the fused folder, and one of the bf16 GGUF. links: by what was compared, `base` among them."""
    tune = links["base"].mean_kl
    for name, what, against in (("fused", "fused", "adapter on base"), ("BF16", "bf16 GGUF", "fused")):
        if name in links:
            link = links[name]
            near = link.mean_kl <= _ROUNDING or link.mean_kl <= min(_FAR, _LOST * tune)
            wrong = not (near and _finite(link) and math.isfinite(tune))
            far = f", logits at most {link.max_logit:.2g} apart" if name == "fused" else ""
            text = f"KL {link.mean_kl:.2g} from {against}{far}; the tune itself is {tune:.2g}"
            # the effect of too small a tune cannot be distinguished from none
            hidden = not wrong and link.mean_kl > 0.5 * tune
            state: CheckState = "broken" if wrong else "note" if hidden else "ok"
            yield Check(what, state, text + (": rounding is as large as the tune" if hidden else ""))


def judge_quants(names: list[str], links: dict[str, Divergence]) -> Iterator[Check]:
    """A check of every quantized GGUF of `names`: how much of the tune it has lost."""
    tune = links["base"].mean_kl
    for name in names:
        if name in links and name != "BF16":
            lost = links[name].mean_kl / max(tune, 1e-12)
            if not (_finite(links[name]) and math.isfinite(lost)):
                yield Check(name, "broken", "its logits, or those it is compared with, are not finite: NaN or infinite")
                continue
            gone = lost > _GONE and tune > _TUNED
            text = f"KL {links[name].mean_kl:.2g} from the bf16 GGUF, "
            text += f"{lost:.1%} of the tune's own {tune:.2g}" if lost < 10 else f"the tune's own is only {tune:.2g}"
            if lost > _LOST:
                part = "most" if gone else "a noticeable part"
                text += f": {part} of the tune is lost; try --quant {better_quant(name.removesuffix('-imatrix'))}"
            yield Check(name, "broken" if gone else "note" if lost > _LOST else "ok", text)


def better_quant(quant: str) -> str:
    """The next type that keeps clearly more."""
    if quant in ("BF16", "F16", "F32"):
        return "BF16"
    bits = quant.removeprefix("I")[1]
    return next(q for q in _LADDER if q == "BF16" or q[1] > bits)


def _finite(link: Divergence) -> bool:
    """False for NaN or infinity, for which every comparison is false."""
    return all(map(math.isfinite, (link.mean_kl, link.p99_kl, link.perplexity)))
