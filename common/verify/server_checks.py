"""What `verify` asks of a run, and the part that llama.cpp's server answers: token ids, prompts, stops, answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.backend import Adapter, Progress
from common.errors import UserError
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.logits import GgufLogits
from common.llama_cpp.server import Server
from common.models import sentencepiece
from common.models.model_folder import ModelFolder
from common.recipe import Plan, Recipe
from common.sampling import Sampling
from common.verify.cases import Probes


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


State = Literal["ok", "note", "broken"]
_ANSWERS = 8
_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    text: str


@dataclass(frozen=True)
class VerifyInput:
    """What is to be proven. ggufs: `(name, file)` of each quant; whole: the bf16 GGUF that they were made from."""

    run: Path
    base: ModelFolder
    final: Adapter
    recipe: Recipe
    plan: Plan
    stops: list[int]
    over_quantized: bool  # whether the adapter was fused into the dequantized base that it was trained over
    whole: Path
    ggufs: list[tuple[str, Path]]
    llama: LlamaCpp
    tool: Path  # twintune-logits, of our own build
    probes: Probes


def by_server(subject: VerifyInput, progress: Progress) -> Iterator[Check]:
    """The first GGUF asked everything; of the others, which may be older, what is broken in a few rows."""
    probes = subject.probes
    few = replace(probes, rows=probes.rows[:4], texts=probes.texts[-40:], prompts=probes.prompts[:4])
    for number, (name, gguf) in enumerate(subject.ggufs):
        looked_at = few if number else probes
        with Server(subject.llama, gguf, context=_longest(looked_at) + _ANSWER_TOKENS + 8) as server:
            progress(number / len(subject.ggufs), name)
            checks = [_tokens(looked_at, server), *([_prompts(looked_at, server)] if looked_at.prompts else [])]
            checks.append(_stops(subject, looked_at, gguf, server))
            if not number:
                yield from checks
                if probes.prompts:
                    yield _answers(probes, name, server, progress)
            else:
                yield from (replace(c, name=f"{c.name}, {name}") for c in checks if c.state == "broken")


def _longest(probes: Probes) -> int:
    return max([len(prompt.ids) for prompt in probes.prompts] + [len(row.ids) for row in probes.rows])


def _tokens(probes: Probes, server: Server) -> Check:
    wrong = verify_tokens(probes.tokenizer, probes.texts, server)
    trained = [(prompt.text, prompt.text_ids) for prompt in probes.prompts]
    wrong += [TokenDifference(text, ids, got) for text, ids in trained if (got := server.tokenize(text)) != ids]
    count = len(probes.texts) + len(trained)
    shown = f"; {wrong[0].text[:60]!r}: {_apart(wrong[0])}" if wrong else ""
    text = f"{count - len(wrong)} of {count} texts and rows tokenized as in training{shown}"
    return Check("token ids", "broken" if wrong else "ok", text)


def _apart(found: TokenDifference) -> str:
    """The ids around the first that differs."""
    pairs = zip(found.gguf, found.transformers, strict=False)
    at = max(0, next((n for n, (a, b) in enumerate(pairs) if a != b), len(found.gguf)) - 2)
    return f"{found.gguf[at : at + 8]} for {found.transformers[at : at + 8]}"


def _prompts(probes: Probes, server: Server) -> Check:
    for prompt in probes.prompts:
        try:
            text = server.prompt(prompt.messages, prompt.example.tools)
        except UserError as error:
            return Check("prompt", "broken", f"{prompt.example.source}: {error.what}")
        ids = server.tokenize(text, add_special=True)
        if ids != prompt.ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b), len(prompt.ids))
            trained, served = (probes.tokenizer.decode(part[max(0, at - 4) : at + 8]) for part in (prompt.ids, ids))
            return Check(
                "prompt",
                "broken",
                f"{prompt.example.source}: llama.cpp prompts {served!r} where training had {trained!r}",
            )
    return Check("prompt", "ok", f"{len(probes.prompts)} held-out prompts rendered by llama.cpp as they were trained")


def _stops(subject: VerifyInput, probes: Probes, gguf: Path, server: Server) -> Check:
    """After a whole answer, where the model's first choice is its end: does llama.cpp stop there?"""
    lasts = [(row, int(np.flatnonzero(row.mask)[-1])) for row in probes.rows]
    ends = [row.ids[:last].tolist() for row, last in lasts if int(row.ids[last]) in subject.stops]
    with GgufLogits(subject.tool, gguf, max(map(len, ends), default=1)) as model:
        meant = [ids for ids in ends if int(model(np.asarray(ids), np.array([len(ids) - 1])).argmax()) in subject.stops]
    ran_on = next((text for ids in meant if (text := _goes_on(server, ids)) is not None), None)
    if ran_on is not None:
        end = probes.tokenizer.decode(subject.stops[:1])
        return Check("stop", "broken", f"the model writes its end, {end!r}, and llama.cpp goes on: {ran_on!r}")
    if not meant:
        return Check("stop", "note", f"after none of {len(ends)} whole answers is an end the model's first choice")
    return Check(
        "stop", "ok", f"ends itself after {len(meant)} of {len(ends)} whole answers, and llama.cpp stops there"
    )


def _goes_on(server: Server, ids: list[int]) -> str | None:
    text, why = server.complete(ids, 4)
    return text if why != "eos" else None


def _answers(probes: Probes, name: str, server: Server, progress: Progress) -> Check:
    asked = probes.prompts[:_ANSWERS]
    ended = 0
    for number, prompt in enumerate(asked):
        progress(0.6 + 0.4 * number / len(asked), "answers")
        greedy = Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS)
        try:
            reasons = [why for _, why in server.stream(prompt.messages, greedy, prompt.example.tools) if why]
        except UserError as error:
            return Check("answers", "broken", f"{prompt.example.source}: {error.what}")
        ended += reasons[-1:] == ["stop"]
    text = f"{ended} of {len(asked)} greedy answers of {name} end by themselves within {_ANSWER_TOKENS} tokens"
    return Check("answers", "ok" if 2 * ended > len(asked) else "note", text)
