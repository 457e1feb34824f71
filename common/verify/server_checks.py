"""The checks that llama.cpp's server answers: token ids, prompts, stops, answers."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.backend import Adapter, Progress
from common.errors import Unable, UserError
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.logits import GgufLogits
from common.llama_cpp.server import Server, ServerOptions
from common.models import sentencepiece
from common.models.model_folder import ModelFolder
from common.recipe import Plan, Recipe
from common.run_record import Run
from common.sampling import Sampling
from common.verify.cases import Cases


@dataclass(frozen=True)
class TokenDifference:
    """A text, its token ids by transformers, and those by the GGUF where they differ."""

    text: str
    transformers: list[int]
    gguf: list[int]


def verify_tokens(tokenizer: Any, texts: Sequence[str], server: Server) -> list[TokenDifference]:
    """The texts whose token ids differ between transformers' tokenizer and the GGUF that `server` serves.

    No special tokens are added on either side; those written out in a text are parsed on both.
    """
    differences = []
    for text in sentencepiece.comparable(texts, tokenizer):
        expected, got = tokenizer.encode(text, add_special_tokens=False), server.tokenize(text)
        if expected != got:
            differences.append(TokenDifference(text, expected, got))
    return differences


CheckState = Literal["ok", "note", "broken"]
_COMPOSED = "llama.cpp does not compose letters and marks (NFC), as the tokenizer does"
_ANSWERS = 8
_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class Check:
    name: str
    state: CheckState
    text: str


@dataclass(frozen=True)
class VerifyInput:
    """What is to be verified, and by what."""

    run: Run
    base: ModelFolder
    adapter: Adapter
    recipe: Recipe
    plan: Plan
    stops: list[int]
    over_quantized: bool  # whether the adapter was fused into the dequantized base that it was trained over
    bf16_gguf: Path  # that the quantized ones were made from
    ggufs: list[tuple[str, Path]]  # (name, file) of each quant
    llama: LlamaCpp
    tool: Path  # twintune-logits, of our own build
    cases: Cases
    tokenizer: Any  # of the fused folder


def server_checks(given: VerifyInput, progress: Progress) -> Iterator[Check]:
    """Every check of the first GGUF; of the others, which may be older, what is broken in a few cases."""
    cases = given.cases
    few = replace(cases, rows=cases.rows[:4], texts=cases.texts[-40:], prompts=cases.prompts[:4])
    for number, (name, gguf) in enumerate(given.ggufs):
        part = replace(given, cases=few if number else cases)
        options = ServerOptions(_longest(part.cases) + _ANSWER_TOKENS + 8)
        with Server(given.llama, gguf, options) as server:
            progress(number / len(given.ggufs), name)
            checks = [_tokens(part, server), *([_prompts(part, server)] if part.cases.prompts else [])]
            checks.append(_stops(part, gguf, server))
            if not number:
                yield from checks
                if cases.prompts:
                    yield _answers(cases, name, server, progress)
            else:
                yield from (replace(c, name=f"{c.name}, {name}") for c in checks if c.state == "broken")


def _longest(cases: Cases) -> int:
    return max([len(prompt.ids) for prompt in cases.prompts] + [len(row.ids) for row in cases.rows])


def _tokens(given: VerifyInput, server: Server) -> Check:
    cases = given.cases
    wrong = verify_tokens(given.tokenizer, cases.texts, server)
    trained = [(prompt.text, prompt.text_ids) for prompt in cases.prompts]
    wrong += [TokenDifference(text, ids, got) for text, ids in trained if (got := server.tokenize(text)) != ids]
    faults = [one for one in wrong if not _only_composed(one.text, one.transformers, server)]
    count = len(cases.texts) + len(trained)
    shown = f"; {faults[0].text[:60]!r}: {_difference(faults[0])}" if faults else ""
    text = f"{count - len(wrong)} of {count} texts and rows tokenized as in training{shown}"
    if wrong and not faults:
        text += f"; {_COMPOSED}: {wrong[0].text[:60]!r}"
    own = any(one.text not in sentencepiece.HARD_TEXTS for one in wrong)
    return Check("token ids", "broken" if faults else "note" if own else "ok", text)


def _only_composed(text: str, ids: list[int], server: Server, **how: bool) -> bool:
    """Whether llama.cpp gives the tokenizer's `ids` once the text's letters and marks are composed (NFC).

    Qwen's tokenizers compose them, which a GGUF says nothing of.
    """
    composed = unicodedata.normalize("NFC", text)
    return composed != text and server.tokenize(composed, **how) == ids


def _difference(found: TokenDifference) -> str:
    """The ids around the first that differs."""
    pairs = zip(found.gguf, found.transformers, strict=False)
    at = max(0, next((n for n, (a, b) in enumerate(pairs) if a != b), len(found.gguf)) - 2)
    return f"{found.gguf[at : at + 8]} for {found.transformers[at : at + 8]}"


def _prompts(given: VerifyInput, server: Server) -> Check:
    prompts, composed = given.cases.prompts, 0
    for prompt in prompts:
        try:
            text = server.prompt(prompt.messages, prompt.tools, **prompt.settings)
        except Unable:
            raise
        except UserError as error:
            return Check("prompt", "broken", f"{prompt.source}: {error.what}")
        ids = server.tokenize(text, add_special=True)
        if ids != prompt.ids and _only_composed(text, prompt.ids, server, add_special=True):
            composed += 1
        elif ids != prompt.ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b), len(prompt.ids))
            trained, served = (given.tokenizer.decode(part[max(0, at - 4) : at + 8]) for part in (prompt.ids, ids))
            return Check(
                "prompt",
                "broken",
                f"{prompt.source}: llama.cpp prompts {served!r} where training had {trained!r}",
            )
    text = f"{len(prompts) - composed} of {len(prompts)} prompts rendered by llama.cpp as they were trained"
    return Check("prompt", "note", f"{text}; {_COMPOSED}") if composed else Check("prompt", "ok", text)


def _stops(given: VerifyInput, gguf: Path, server: Server) -> Check:
    """After a complete answer, where the model's first choice is its end: does llama.cpp stop there?"""
    lasts = [(row, int(np.flatnonzero(row.mask)[-1])) for row in given.cases.rows]
    ends = [row.ids[:last].tolist() for row, last in lasts if int(row.ids[last]) in given.stops]
    with GgufLogits(given.tool, gguf, max(map(len, ends), default=1)) as model:
        meant = [ids for ids in ends if int(model(np.asarray(ids), np.array([len(ids) - 1])).argmax()) in given.stops]
    continued = next((text for ids in meant if (text := _continued(server, ids)) is not None), None)
    if continued is not None:
        end = given.tokenizer.decode(given.stops[:1])
        return Check("stop", "broken", f"the model writes its end, {end!r}, and llama.cpp continues: {continued!r}")
    if not meant:
        return Check("stop", "note", f"after none of {len(ends)} complete answers is an end the model's first choice")
    return Check(
        "stop", "ok", f"ends itself after {len(meant)} of {len(ends)} complete answers, and llama.cpp stops there"
    )


def _continued(server: Server, ids: list[int]) -> str | None:
    """What llama.cpp writes after `ids`; None where it stops."""
    text, why = server.complete(ids, 4)
    return text if why != "eos" else None


def _answers(cases: Cases, name: str, server: Server, progress: Progress) -> Check:
    asked = cases.prompts[:_ANSWERS]
    ended = 0
    for number, prompt in enumerate(asked):
        progress(0.6 + 0.4 * number / len(asked), "answers")
        greedy = Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS)
        try:
            pieces = server.stream(prompt.messages, greedy, prompt.tools, **prompt.settings)
            reasons = [why for _, why in pieces if why]
        except Unable:
            raise
        except UserError as error:
            return Check("answers", "broken", f"{prompt.source}: {error.what}")
        ended += reasons[-1:] == ["stop"]
    text = f"{ended} of {len(asked)} greedy answers of {name} end by themselves within {_ANSWER_TOKENS} tokens"
    return Check("answers", "ok" if 2 * ended > len(asked) else "note", text)
