"""What the page of one run says beside its charts: the headline, the key figures and the tables."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.display import gigabytes
from common.errors import PROGRAM
from common.export.model_card import divergence_rows, figures, recipe_rows, shown_value
from common.options import by_flag
from common.report.kept import Kept, number
from common.report.run_charts import Texts, base_loss
from common.training.expert_load import about, moved, shares, spread_rows

# Of the run's options: where it went and how it was watched, which does not enter the result.
_NOT_REPEATED = {"config", "output", "resume", "quiet", "json", "push", "push_public", "llama_cpp", "live", "lang"}
Said = Callable[[str], str]


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """The answers to one prompt. answers: `(step, text, whether it ended)`, without the base model's."""

    prompt: str
    reference: str
    base: str | None
    answers: list[tuple[int, str, bool]]


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    figures: int = 0  # so many columns at the end are aligned as numbers


def headline(kept: Kept, t: Texts) -> str:
    losses, base = kept.points("loss"), base_loss(kept)
    best = _best(kept)
    if base and best is not None:
        key = "headline.lower" if best[1] < base else "headline.higher"
        share = f"{(base - best[1]) / base:.1%}"
        return t[key].format(start=f"{base:.4g}", best=f"{best[1]:.4g}", share=share)
    if losses:
        key = "headline.so_far" if base else "headline.train"
        return t[key].format(first=f"{losses[0][1]:.4g}", last=f"{losses[-1][1]:.4g}", start=f"{base or 0:.4g}")
    return t["headline.none"]


def verdict_key(kept: Kept) -> str:
    found = kept.record.verify.verdict if kept.record.verify else ""
    return found if found in ("sound", "sound with remarks", "broken") else "none"


def verdict_badge(verdict: str) -> str:
    """The style of a verdict's badge."""
    return {"sound": "good", "broken": "bad"}.get(verdict, "warn")


def progress(kept: Kept, t: Texts) -> str:
    """How far a training is that has not ended; empty of a complete run."""
    losses = kept.points("loss")
    if kept.record.status == "complete" or kept.recipe is None or not losses:
        return ""
    return t["progress"].format(step=f"{losses[-1][0]:,}", steps=f"{kept.recipe.steps:,}")


def cards(kept: Kept, t: Texts) -> list[Card]:
    """The key figures, as far as they are known."""
    record, found = kept.record, []
    if (best := _best(kept)) is not None:
        base = base_loss(kept)
        note = t["card.valid.note"].format(start=f"{base:.4g}", step=best[0]) if base else ""
        found.append(Card(t["card.valid"], f"{best[1]:.4g}", note))
    if record.test_loss is not None:
        note = t["card.test.note"].format(perplexity=f"{record.test_perplexity or 0:.4g}", rows=record.test_rows or 0)
        found.append(Card(t["card.test"], f"{record.test_loss:.4g}", note if record.test_perplexity else ""))
    if record.tokens_per_second:
        labels = f"{record.label_tokens_per_second or 0:,.0f}"
        found.append(
            Card(t["card.speed"], f"{record.tokens_per_second:,.0f}", t["card.speed.note"].format(labels=labels))
        )
    if record.peak_memory_bytes:
        estimate = record.predicted_peak_bytes
        note = t["card.memory.note"].format(estimated=gigabytes(estimate)) if estimate else ""
        found.append(Card(t["card.memory"], gigabytes(record.peak_memory_bytes), note))
    if record.train_seconds:
        note = t["card.time.note"].format(steps=f"{record.steps or 0:,}")
        found.append(Card(t["card.time"], duration(record.train_seconds), note))
    if record.export.gguf:
        least = min(record.export.gguf, key=lambda gguf: gguf.bytes)
        note = t["card.export.note"].format(name=least.name, bits=f"{least.bits_per_weight:.2f}")
        found.append(Card(t["card.export"], gigabytes(least.bytes), note))
    return found


def duration(seconds: float) -> str:
    """`45 s`, `6:51` or `2:06:51`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def all_figures(kept: Kept, t: Texts) -> Table:
    """Those of the model card, and what this machine's memory came to."""
    record = kept.record
    rows = figures(kept.run, record) if kept.plan else {}
    for name, size in (("peak RSS", record.peak_rss_bytes), ("swap growth", record.swap_growth_bytes)):
        if size is not None:
            rows[name] = gigabytes(size)
    return Table([t["name"], t["value"]], [[t.get(f"figure.{name}", name), text] for name, text in rows.items()], 1)


def alarms(kept: Kept, t: Texts, said: Said) -> list[str]:
    """What was raised and undone during training; without what an answer said. said: a sentence in the language."""
    returned = [
        t["rollback"].format(from_step=back.from_step, to_step=back.to_step, rate=f"{back.learning_rate:g}")
        for back in kept.record.rollbacks
    ]
    seen = [alarm for back in kept.record.rollbacks for alarm in back.alarms] + kept.record.alarms
    parts = [{"seen": said(alarm.seen), "cause": said(alarm.cause), "remedy": said(alarm.remedy)} for alarm in seen]
    return [t["alarm"].format(**part) for part in parts] + returned


def experts(kept: Kept, t: Texts, said: Said) -> tuple[str, Table]:
    """A note on the load of a mixture's experts, and its extremes before and after training."""
    found = kept.record.experts
    if found is None:
        return "", Table([], [])
    rows = [[said(name), *cells] for name, *cells in spread_rows(found)]
    note = t["experts.join"].join(map(said, about(found))) if rows else t["experts.not"].format(why=said(found.why))
    columns = [t[key] for key in ("name", "experts.before", "experts.layer", "experts.after", "experts.layer")]
    return note, Table(columns, rows, 4)


def expert_layers(kept: Kept, t: Texts) -> Table:
    """The same of each layer."""
    before, after = kept.facts.experts.before, kept.facts.experts.after
    rows = []
    for layer in sorted(before.keys() & after.keys()):
        loads = before[layer], after[layer]
        if loads[0] and len(loads[0]) == len(loads[1]):
            one, other = (shares(counts) for counts in loads)
            extremes = [f"{of(part):.2f}" for of in (max, min) for part in (one, other)]
            never = [f"{counts.count(0):,}" for counts in loads]
            rows.append([str(layer), *extremes, *never, f"{moved(*loads):.1%}"])
    names = ("busiest", "least", "never")
    times = [t["experts.before"], t["experts.after"]]
    columns = [t["experts.of"].format(name=t[f"experts.{name}"], time=time) for name in names for time in times]
    return Table([t["experts.layer"], *columns, t["experts.moved"]], rows, 8)


def samples(kept: Kept) -> list[Sample]:
    """By prompt; none where texts are not shown."""
    asked: dict[tuple[int, str], list[dict[str, Any]]] = {}  # an older version may have asked others by a number
    for line in kept.samples if kept.texts else []:
        if isinstance(line.get("answer"), str) and isinstance(line.get("number"), int):
            asked.setdefault((line["number"], str(line.get("prompt") or "")), []).append(line)
    return [
        Sample(
            prompt=prompt,
            reference=str(lines[0].get("reference") or ""),
            base=next((line["answer"] for line in lines if line["step"] == 0), None),
            answers=[(line["step"], line["answer"], line.get("ended") is True) for line in lines if line["step"]],
        )
        for (_, prompt), lines in sorted(asked.items())
    ]


def data_table(kept: Kept, t: Texts) -> Table:
    names = ("rows", "tokens", "labels", "median", "longest", "left_out")
    columns = [t["data.part"], *(t[f"data.{name}"] for name in names)]
    rows = [
        [
            t.get(f"data.{name}", name),
            *(f"{value:,}" for value in (part.rows, part.tokens, part.label_tokens)),
            *(f"{value:,}" for value in (part.median, part.longest, part.left_out)),
        ]
        for name, part in kept.facts.data.parts.items()
    ]
    if not rows and kept.record.data.train_rows:  # an older version's run
        known = kept.record.data
        counts = {"rows": known.train_rows, "tokens": known.tokens, "labels": known.label_tokens}
        columns = [t["data.part"], *(t[f"data.{name}"] for name in counts)]
        rows = [[t["data.train"], *(f"{count:,}" for count in counts.values())]]
    return Table(columns, rows, len(columns) - 1)


def recipe_table(kept: Kept, t: Texts) -> Table:
    rows = recipe_rows(kept.record, kept.recipe) if kept.recipe else {}
    texts = {name: shown_value(value).strip("`") for name, value in rows.items()}
    return Table([t["name"], t["value"]], [[name, text] for name, text in texts.items() if text])


def plan_table(kept: Kept, t: Texts) -> Table:
    content = kept.plan.model_dump() if kept.plan else {}
    rows = [
        [name, gigabytes(value) if name == "memory_budget" else shown_value(value)]
        for name, value in content.items()
        if value is not None
    ]
    return Table([t["name"], t["value"]], rows)


def reasons(kept: Kept, t: Texts, said: Said) -> Table:
    given = kept.facts.reasons
    return Table([t["name"], t["why"]], [[t.get(f"reason.{name}", name), said(why)] for name, why in given.items()])


def export_table(kept: Kept, t: Texts) -> Table:
    columns = [t["export.file"], t["export.size"], t["export.bits"], t["export.larger"]]
    rows = [
        [
            ", ".join(gguf.files),
            gigabytes(gguf.bytes),
            f"{gguf.bits_per_weight:.2f}",
            f"{gguf.fallbacks} / {sum(gguf.tensors.values())}",
        ]
        for gguf in kept.record.export.gguf
    ]
    return Table(columns, rows, 3)


def divergence_table(kept: Kept, t: Texts, said: Said) -> Table:
    found = kept.record.verify
    columns = [t[f"kl.{name}"] for name in ("what", "against", "mean", "p99", "top")]
    rows = (
        [[said(what), said(against), *figures] for what, against, *figures in divergence_rows(found)] if found else []
    )
    return Table(columns, rows, 3)


def checks(kept: Kept, said: Said) -> list[tuple[str, str, str]]:
    """`(state, name, text)`; the text may quote rows."""
    found = kept.record.verify.checks if kept.record.verify else []
    return [
        (
            str(check.get("state")),
            said(str(check.get("name"))),
            said(str(check.get("text") or "")) if kept.texts else "",
        )
        for check in found
    ]


def command(kept: Kept) -> str:
    """The command that trains the same again: every option whose value is not its default."""
    words, left_out = [], _NOT_REPEATED if kept.texts else {*_NOT_REPEATED, "sample_prompt"}
    for name, field in by_flag().items():
        value = kept.record.options.get(name)
        if name in left_out or value is None or value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, dict):
            value = [f"{key}={part}" for key, part in value.items()]
        given = [] if value is True else value if isinstance(value, list) else [value]
        flag = f"--{name.replace('_', '-')}"
        words.append(" ".join([flag, *(shlex.quote("false" if one is False else str(one)) for one in given)]))
    return " \\\n    ".join([f"{PROGRAM} train", *words])


def environment(kept: Kept, t: Texts) -> Table:
    content = kept.environment
    packages = content.get("packages")
    rows = {name: value for name, value in content.items() if isinstance(value, str | int)}
    if memory := number(rows.pop("memory_bytes", None)):
        rows["memory"] = gigabytes(memory)
    rows |= {name: value for name, value in packages.items() if value} if isinstance(packages, dict) else {}
    return Table(
        [t["name"], t["value"]], [[t.get(f"environment.{name}", str(name)), str(value)] for name, value in rows.items()]
    )


def hashes(kept: Kept, t: Texts) -> Table:
    recipe = kept.recipe
    known = {"recipe": kept.record.recipe_hash, "model": kept.record.model_hash}
    known |= {"data": recipe.data_hash, "rows": recipe.rows_hash} if recipe else {}
    return Table([t["name"], t["value"]], [[t[f"hash.{name}"], str(value)] for name, value in known.items() if value])


def _best(kept: Kept) -> tuple[float, float] | None:
    """The step and loss of the best validation after the first step, as training chooses it."""
    record, best = kept.record, None
    if record.best_step is not None and record.best_valid_loss is not None:
        return record.best_step, record.best_valid_loss
    delta = kept.recipe.min_delta if kept.recipe else 0.0
    for step, loss in kept.points("valid_loss"):
        if step and (best is None or loss < best[1] * (1 - delta)):
            best = step, loss
    return best
