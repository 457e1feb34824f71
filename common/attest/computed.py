"""Figures that are computed again from the run: fused weights, GGUF, distributions, answers, parity."""

import re
import shutil
from contextlib import closing
from typing import Any

from common.attest.subject import Figures, Subject, digest
from common.errors import Refusal, UserError
from common.files import file_digest
from common.inference.backend_chat import ChatModel
from common.inference.chat_models import Kind, choose, opened
from common.models.fuse import fuse
from common.models.mlx_quantized import quantized_source
from common.sampling import Sampling
from common.system.disk import require_disk
from common.verify.cases import Prompt
from common.verify.parity import measured, tiny_parity
from common.verify.verify import verify_files
from common.verify_record import VerifyRecord

_PROMPTS, _TOKENS = 4, 32  # that are asked, and of an answer
_SPARE = 64  # tokens that another program's prompt may have beyond training's
_COUNTED = re.compile(r"\d+ of \d+")


def fused_again(given: Subject) -> Figures:
    """The adapter added to the base in float32 and rounded once, shard by shard: the same bytes on any machine."""
    base, export = given.base, given.run.record.export
    if not export.fused:
        raise UserError(f"{given.run} has no fused folder.", f"python cli.py fuse {given.run}")
    if export.fuse_into == "dequantized" and quantized_source(base.path) is None:
        raise UserError(
            "The adapter was fused into dequantized weights, which only the backend that trained makes.",
            "verify compares them by their distributions.",
        )
    out = given.scratch / "fused"
    require_disk([(given.scratch, "the fused weights again", base.weight_bytes)], "Free some space.")
    out.mkdir()
    with given.context.display.stage("fuse again") as progress:
        fuse(base, given.adapter, out, progress)
        found = {f"fused/{shard.name}": file_digest(out / shard.name) for shard in base.shards}
    shutil.rmtree(out)
    return found


def bf16(given: Subject) -> Figures:
    return {"sha256": file_digest(given.bf16_gguf)}


def verification(given: Subject) -> Figures:
    """What `verify` finds: its checks, without their text that may quote rows, and the distances of distributions."""
    if given.again:
        given.require_llama()
        found = verify_files(given.run, given.base, given.adapter, given.context, given.bf16_gguf).record
    else:
        known = given.run.record.verify
        if known is None:
            raise UserError(f"{given.run} was not verified.", f"python cli.py verify {given.run}")
        found = known
    return {
        "verdict": found.verdict,
        "rows": found.rows,
        "held out": found.held_out,
        "checks": {str(check.get("name")): _check(check) for check in found.checks},
        "divergence": {name: _link(found, name) for name in found.divergence},
    }


def _check(check: dict[str, Any]) -> Figures:
    counted = _COUNTED.search(str(check.get("text"))) if check.get("state") != "broken" else None
    return {"state": check.get("state")} | ({"found": counted[0]} if counted else {})


def _link(found: VerifyRecord, name: str) -> Figures:
    link = found.divergence[name].model_dump()
    names = {"mean KL": "mean_kl", "p99 KL": "p99_kl", "top-1 agreement": "same_top", "perplexity": "perplexity"}
    return {shown: link.get(key) for shown, key in names.items()} | {"positions": link.get("positions")}


def tuned_answers(given: Subject) -> Figures:
    """Of the run's first GGUF, in llama.cpp."""
    given.require_llama()
    target = choose(given.run.path, "gguf", None)
    with opened(target, given.context, _length(given)) as models:
        return {"by": target.path.name} | _answers(given, models.tuned)


def base_answers(given: Subject) -> Figures:
    """Of the untuned model, in a backend."""
    kind: Kind = "fused" if given.run.recipe.method == "full" else "adapter"
    with opened(choose(given.run.path, kind, None), given.context, _length(given)) as models:
        return _answers(given, models.base())


def _length(given: Subject) -> int:
    if not given.cases.prompts:
        raise UserError(f"{given.run} keeps no prompts: its rows are plain text.", "Its distributions are compared.")
    return max(len(prompt.ids) for prompt in given.cases.prompts[:_PROMPTS]) + _TOKENS + _SPARE


def _answers(given: Subject, model: ChatModel) -> Figures:
    found: Figures = {}
    prompts = given.cases.prompts[:_PROMPTS]
    with given.context.display.stage(f"answers of {model.name}") as progress:
        for number, prompt in enumerate(prompts):
            progress(number / len(prompts), f"prompt {number + 1}")
            found[f"prompt {number + 1}"] = _answer(given, model, prompt)
    return found


def _answer(given: Subject, model: ChatModel, prompt: Prompt) -> Figures:
    """The likeliest token after the likeliest token, up to 32."""
    text, finish = "", None
    try:
        with closing(
            model.answer(prompt.messages, Sampling(temperature=0.0, max_tokens=_TOKENS), prompt.tools)
        ) as all_:
            for piece, end in all_:
                text, finish = text + piece, end
    except Refusal:
        finish = "refused"
    found: Figures = {"prompt": digest(prompt.ids), "answer": digest(text), "ended by": finish}
    return found | ({"messages": prompt.messages, "text": text} if given.texts else {})


def parity(given: Subject) -> Figures:
    """How far PyTorch and MLX are apart on a tiny model of the run's family, or on the model itself (--try-model)."""
    if tried := given.run.record.tried:
        return {"of": tried.architecture, "checks": tried.checks, "versions": tried.versions}
    family = str(given.fused.config["model_type"])
    known = measured(family)
    if not known:
        raise UserError(f"No parity is on record for {family}.", "python -m benchmarks.parity")
    if not given.again:
        return {"of": f"a tiny {family}"} | known["differences"]
    with given.context.display.stage("both backends on a tiny model"):
        return {"of": f"a tiny {family}"} | tiny_parity(family, given.context.backends)
