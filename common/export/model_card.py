"""The model card, from the run's record alone: the base, the recipe, the results, the files and the license.

It holds no token, no path of this machine and no row of the data. Source of its metadata: the hub's documentation.
"""

from pathlib import Path
from typing import Any

from common.display import gigabytes
from common.errors import UserError
from common.export.card_usage import usage
from common.files import atomic_write
from common.models.gguf_import import MIRRORS
from common.models.license import Terms, is_hub_name, terms_of
from common.models.mlx_quantized import quantized_source
from common.recipe import Recipe
from common.run_fields import AttestRecord, ExpertsRecord, RunRecord
from common.run_record import Run
from common.training.expert_load import COLUMNS, about, spread_rows
from common.verify_record import COMPARED, VerifyRecord

PARTS = ("fused", "adapter", "gguf")
_SHAPE = ("rank", "alpha", "rslora", "dropout", "layers", "rank_pattern", "alpha_pattern", "lora_plus", "targets")
_BY_MLX = "Its weights had been quantized by MLX"
_LEFT_OUT = {"model", "data", "model_hash", "data_hash", "template_hash", "rows_hash", "adapter_hash"}


def base_form(folder: Path, model: str) -> str:
    """How the base's weights were stored, where that was not their authors' 16 bits; else ""."""
    if found := quantized_source(folder):
        return f"{_BY_MLX} ({found[1]}): the precision lost then is not restored."
    if (mirror := MIRRORS.get(model)) and folder.name.startswith(Path(mirror.file).stem):
        return f"Its weights come from a GGUF file, in which they had been quantized to 4 bits ({mirror.quantization})."
    if model.endswith(".gguf"):
        return "Its weights come from a GGUF file: the precision that its quantization lost is not restored."
    return ""


def _is_of_quantized(record: RunRecord) -> bool:
    """Whether the base has the name of weights that MLX quantized, over which no other program puts an adapter."""
    return record.base is not None and record.base.form.startswith(_BY_MLX)


def parts_of(run: Run) -> list[str]:
    """Which of PARTS the run holds completely."""
    export = run.record.export
    files = [file for report in export.gguf for file in report.files] + [file for file in (export.lora_gguf,) if file]
    on_record = {"fused": bool(export.fused), "gguf": bool(files), "adapter": True}
    complete = all((run.path / file).is_file() for file in files)
    return [part for part in PARTS if on_record[part] and (complete if part == "gguf" else (run.path / part).is_dir())]


def write_card(run: Run) -> None:
    """Write the card of all that the run holds into its fused folder, where it has one."""
    parts = parts_of(run)
    if "fused" in parts and run.record.base is not None:
        with atomic_write(run.fused / "README.md") as temporary:
            temporary.write_text(card(run, parts), encoding="utf-8")


def card(run: Run, parts: list[str]) -> str:
    """The text of README.md for those of PARTS that `parts` names."""
    record, recipe = run.record, run.recipe
    if record.base is None:
        raise UserError(f"{run} has not been exported by this version.", f"python cli.py fuse {run}")
    terms = terms_of(record.base.terms)
    base = record.model if is_hub_name(record.model) else ""
    data = _data_names(record.options["data"])
    sections = [
        f"---\n{_front_matter(terms, base, data, recipe, parts)}\n---",
        f"# {base.rpartition('/')[2] or 'A local model'}, fine-tuned",
        _about(record, record.base.form, recipe, base),
        "## Data\n\n" + _data(record, recipe, data),
        "## Recipe\n\n" + _table({name: shown_value(value) for name, value in recipe_rows(record, recipe).items()}),
        "## Figures\n\n" + _table(figures(run, record)),
        *(["## Experts\n\n" + _experts(record.experts)] if record.experts else []),
        "## Verification\n\n" + _verification(record.verify),
        *(["## Attest\n\n" + _attest(record, record.attest)] if record.attest else []),
        "## Files\n\n" + _files(record, parts),
        "## How to run it\n\n" + usage(run, parts, "" if _is_of_quantized(record) else base),
        "## License\n\n" + _license(terms, base),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(terms: Terms, base: str, data: list[str], recipe: Recipe, parts: list[str]) -> str:
    from huggingface_hub import ModelCardData

    order = ["license", "license_name", "license_link", "base_model", "datasets", "library_name", "pipeline_tag"]
    return ModelCardData(
        license=terms.license,
        license_name=terms.name or None,
        license_link=(terms.link or None) if terms.license == "other" else None,
        base_model=base or None,
        datasets=[name for name in data if name] or None,
        library_name="transformers" if "fused" in parts else "peft" if "adapter" in parts else None,
        pipeline_tag="text-generation",
        tags=["twintune", *([recipe.method] if recipe.method != "full" else []), *(["gguf"] * ("gguf" in parts))],
    ).to_yaml(original_order=order)


def _about(record: RunRecord, form: str, recipe: Recipe, base: str) -> str:
    name = f"[{base}](https://huggingface.co/{base})" if base else "a local model folder"
    how = {"lora": "with LoRA", "dora": "with DoRA", "full": "in full"}[recipe.method]
    lines = [
        f"Fine-tuned {how} from {name} (SHA-256 of its contents: `{recipe.model_hash}`) by Twintune.",
        form,
    ]
    if recipe.quantization != "none":
        into = record.export.fuse_into or "base"
        lines.append(
            f"In training the base was quantized ({recipe.quantization}); the adapter is fused into "
            + ("those dequantized weights." if into == "dequantized" else "the original weights.")
        )
    if record.tried:
        compared = "; ".join(f"{what}: {found}" for what, found in record.tried.checks.items())
        libraries = ", ".join(f"{name} {number}" for name, number in record.tried.versions.items())
        lines.append(
            f"{record.tried.architecture} was computed by the libraries' own layers ({libraries}), after a check on "
            f"the machine that trained: {compared}."
        )
    return " ".join(filter(None, lines))


def _data_names(given: Any) -> list[str]:
    """The name of each source on the hub, or "": the name of a local file stays private.

    given: as the record has it; in older ones a source is not in a list.
    """
    sources = given if isinstance(given, list) else [str(given)]
    names = [source.partition("#")[0].partition("@")[0].partition(":")[0] for source in sources]
    known = zip(names, sources, strict=True)
    return [name if is_hub_name(name) and not Path(source).exists() else "" for name, source in known]


def _data(record: RunRecord, recipe: Recipe, names: list[str]) -> str:
    shown = [f"[{name}](https://huggingface.co/datasets/{name})" if name else "a local data set" for name in names]
    what = " and ".join(shown)
    what = f"{what[:1].upper()}{what[1:]}"
    counts = record.data.model_dump()
    known = [f"{counts[key]:,} {text}" for key, text in _COUNTS.items() if counts.get(key)]
    details = f": {', '.join(known)}" if known else ""
    return f"{what}{details}. SHA-256 of the rows: `{recipe.data_hash}`."


_COUNTS = {
    "train_rows": "training rows",
    "valid_rows": "validation rows",
    "tokens": "tokens in the training rows",
    "label_tokens": "of them label tokens",
}


def recipe_rows(record: RunRecord, recipe: Recipe) -> dict[str, Any]:
    """What changes the result, by the names of options; hashes of the model and the data left out."""
    fields = recipe.model_dump(exclude=_LEFT_OUT | (set(_SHAPE) if recipe.method == "full" else set()))
    return {"recipe hash": f"`{record.recipe_hash}`"} | {
        name: value for name, value in fields.items() if value not in (None, {})
    }


def shown_value(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def figures(run: Run, record: RunRecord) -> dict[str, str]:
    """What training came to, as far as it is known."""

    def number(key: str, show: str) -> str:
        value = getattr(record, key)
        return show.format(value) if value is not None else ""

    plan = run.plan
    rows = {
        "steps": number("steps", "{:,}"),
        "tokens trained on": number("tokens", "{:,}"),
        "label tokens": number("label_tokens", "{:,}"),
        "final training loss": number("final_train_loss", "{:.4f}"),
        "best validation loss": number("best_valid_loss", "{:.4f}"),
        "best step": number("best_step", "{}"),
        "exported step": number("exported_step", "{}"),
        "training time": number("train_seconds", "{:.0f} s"),
        "tokens/s": number("tokens_per_second", "{:.1f}"),
        "peak memory": gigabytes(record.peak_memory_bytes) if record.peak_memory_bytes else "",
        "backend": f"{plan.backend} on {plan.device}",
    }
    return {name: text for name, text in rows.items() if text}


def _experts(found: ExpertsRecord) -> str:
    """How evenly the routers spread tokens over the experts of a mixture."""
    if not (rows := spread_rows(found)):
        return "How evenly its routers spread tokens over its experts was not measured."
    table = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    sentences = [f"{text[:1].upper()}{text[1:]}." for text in [*about(found), *filter(None, [found.warning])]]
    return " ".join(sentences) + "\n\n" + "\n".join(table)


_VERDICTS = {
    "sound": "sound. What llama.cpp runs is what was trained.",
    "sound with remarks": "sound with remarks. What llama.cpp runs is what was trained, as far as the remarks allow.",
    "broken": "broken. What llama.cpp runs is NOT what was trained.",
}


def _verification(found: VerifyRecord | None) -> str:
    """The verdict and its figures; never a check's text, which may quote rows."""
    if found is None or found.verdict not in _VERDICTS:
        return "Not verified: these files have not been compared with what was trained."
    lines = [f"Verdict: {_VERDICTS[found.verdict]}"]
    if remarks := [f"`{check.get('name')}`" for check in found.checks if check.get("state") != "ok"]:
        lines.append(f"Remarks or faults: {', '.join(remarks)}.")
    if found.divergence:
        kind = "validation" if found.held_out else "training"
        lines.append(f"Next-token distributions compared on {found.rows} {kind} rows:")
    rows = ["| | against | mean KL | p99 KL | top-1 agreement |", "| --- | --- | --- | --- | --- |"]
    rows += [f"| {' | '.join(cells)} |" for cells in divergence_rows(found)]
    return " ".join(lines) + ("\n\n" + "\n".join(rows) if found.divergence else "")


def _attest(record: RunRecord, made: AttestRecord) -> str:
    """Its hash, and its short form."""
    found = record.verify
    facts = [f"recipe `{record.recipe_hash}`", f"verdict {found.verdict if found else 'none: not verified'}"]
    for gguf in record.export.gguf:
        link = found.divergence.get(gguf.name) if found else None
        if link and link.mean_kl is not None and link.same_top is not None:
            facts.append(f"{gguf.name}: mean KL {link.mean_kl:.5f}, top-1 agreement {link.same_top:.1%}")
    return (
        f"`attest.json` (SHA-256 of its content: `{made.sha256}`) states what can be checked of this model: "
        f"{'; '.join(facts)}. Whoever has the run folder computes it again:\n\n"
        "    twintune attest RUN --check attest.json"
    )


def divergence_rows(found: VerifyRecord) -> list[list[str]]:
    """What was compared, with what, mean and p99 KL, and top-1 agreement, a row for each comparison."""
    rows = []
    for name, link in found.divergence.items():
        values = zip((link.mean_kl, link.p99_kl, link.same_top), (".5f", ".4f", ".1%"), strict=True)
        cells = ["not finite" if value is None else format(value, form) for value, form in values]
        rows.append([*COMPARED.get(name, (name, "BF16 GGUF")), *cells])
    return rows


def _files(record: RunRecord, parts: list[str]) -> str:
    lines = []
    if "fused" in parts:
        lines.append(
            "- `model*.safetensors` with config, tokenizer and chat template: the complete model, adapter fused in"
        )
    if "adapter" in parts:
        part = ", of which PEFT 0.21.2 loads a part only: use the complete model" if record.left_out_by_peft else ""
        of = ", over the base in 16 bits, which the named one was quantized from" if _is_of_quantized(record) else ""
        lines.append(f"- `adapter/`: the adapter alone, for PEFT{part}{of}")
    if "gguf" in parts:
        for report in record.export.gguf:
            larger = f", {report.fallbacks} tensors in a larger type than its name says" if report.fallbacks else ""
            others = f" and {len(report.parts) - 1} more, which it reads as one" if report.parts else ""
            lines.append(
                f"- `{report.file}`{others}: for llama.cpp, {report.bytes / 1e6:.1f} MB, "
                f"{report.bits_per_weight:.2f} bits per weight{larger}"
            )
        if record.export.mmproj:
            lines.append(f"- `{record.export.mmproj}`: its vision tower, for llama.cpp")
        if record.export.gguf:
            lines.append("- `gguf/Modelfile`: for Ollama")
        if record.export.lora_gguf:
            lines.append(f"- `{record.export.lora_gguf}`: the adapter alone, for llama.cpp over a GGUF of its base")
    return "\n".join(lines)


def _license(terms: Terms, base: str) -> str:
    if terms.words:
        return terms.words
    of = f"[{base}](https://huggingface.co/{base})" if base else "the base model"
    if terms.license == "other":
        named = f" ({terms.name})" if terms.name != "see-base-model" else ""
        link = f" It is at {terms.link}." if terms.link else ""
        return f"The license of {of}{named} applies to this model too.{link} Read it before you distribute the model."
    return f"That of {of}: {terms.license}. Its license files, where it has any, are beside the weights."


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())])
