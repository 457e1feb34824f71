"""The model card: what the base is, how it was tuned, what came out, whose terms hold. From the run's record alone.

No token, no path of this machine and no row of the data stands in it. Source of the metadata: the hub's docs on model
cards.
"""

from pathlib import Path
from typing import Any

import yaml

from common import run_record
from common.display import gigabytes
from common.files import atomic_write
from common.models.gguf_import import MIRRORS
from common.models.license import Terms, is_hub_name
from common.models.mlx_quantized import quantized_source
from common.options import is_example
from common.recipe import Recipe

PARTS = ("fused", "adapter", "gguf")
_SHAPE = ("rank", "alpha", "rslora", "dropout", "layers", "rank_pattern", "alpha_pattern", "lora_plus", "targets")
_LEFT_OUT = {"model", "data", "model_hash", "data_hash", "template_hash", "adapter_hash"}


def base_form(folder: Path, model: str) -> str:
    """In what form the base's weights came, where that was not their makers' 16 bits."""
    if found := quantized_source(folder):
        return f"Its weights had been quantized by MLX ({found[1]}): what they lost then is not here either."
    if (mirror := MIRRORS.get(model)) and folder.name.startswith(Path(mirror.file).stem):
        return f"Its weights came out of a GGUF file and had gone through 4 bits ({mirror.quantization})."
    if model.endswith(".gguf"):
        return "Its weights came out of a GGUF file: what that file's quantization lost is not here either."
    return ""


def parts_of(run: Path) -> list[str]:
    """Which of PARTS the run holds, whole."""
    export = run_record.read_run(run).get("export", {})
    files = [report["file"] for report in export.get("gguf", [])] + [export[k] for k in ("lora_gguf",) if k in export]
    whole = {"gguf": bool(files) and all((run / file).is_file() for file in files)}
    return [part for part in PARTS if whole.get(part, (run / part).is_dir())]


def write_card(run: Path, path: Path, parts: list[str]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(card(run, parts), encoding="utf-8")


def card(run: Path, parts: list[str]) -> str:
    """The text of README.md for those of PARTS that go with it, at the head of the repository and in folders."""
    facts = run_record.read_run(run, "base", "options")
    recipe = run_record.read_recipe(run)
    terms = Terms(**facts["base"]["terms"])
    model = str(facts["options"]["model"])  # a path of this machine is whole there, and no hub's name
    base = model if is_hub_name(model) else ""
    data = _data_name(str(facts["options"]["data"]))
    sections = [
        f"---\n{_front_matter(terms, base, data, recipe, parts)}---",
        f"# {base.rpartition('/')[2] or 'A local model'}, fine-tuned",
        _about(facts, recipe, base),
        "## Data\n\n" + _data(facts, recipe, data),
        "## Recipe\n\n" + _table({name: _shown(value) for name, value in _recipe_rows(recipe).items()}),
        "## Figures\n\n" + _table(_figures(run, facts)),
        "## Files\n\n" + _files(facts, parts),
        "## To run it\n\n" + _usage(facts, parts, base),
        "## Licence\n\n" + _licence(terms, base),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(terms: Terms, base: str, data: str, recipe: Recipe, parts: list[str]) -> str:
    library = "transformers" if "fused" in parts else "peft" if "adapter" in parts else ""
    content = {
        "license": terms.license,
        "license_name": terms.name,
        "license_link": terms.link if terms.license == "other" else "",
        "base_model": base,
        "datasets": [data] if data else [],
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["twintune", *([recipe.method] if recipe.method != "full" else []), *(["gguf"] * ("gguf" in parts))],
    }
    kept = {name: value for name, value in content.items() if value}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _about(facts: dict[str, Any], recipe: Recipe, base: str) -> str:
    name = f"[{base}](https://huggingface.co/{base})" if base else "a local model folder"
    how = {"lora": "with LoRA", "dora": "with DoRA", "full": "in all its weights"}[recipe.method]
    lines = [
        f"Fine-tuned {how} from {name} (contents' SHA-256 `{recipe.model_hash}`) by Twintune.",
        facts["base"]["form"],
    ]
    if recipe.quantization != "none":
        into = facts.get("export", {}).get("fuse_into") or "base"
        lines.append(
            f"In training the base was held in {recipe.quantization}; the adapter is fused into "
            + ("those dequantized weights." if into == "dequantized" else "the weights it was made from.")
        )
    return " ".join(filter(None, lines))


def _data_name(source: str) -> str:
    """The hub's name of the data set, or "": a local file's name is nobody's business."""
    name = source.partition("#")[0].partition("@")[0].partition(":")[0]
    return name if is_hub_name(name) and not Path(source).exists() else ""


def _data(facts: dict[str, Any], recipe: Recipe, name: str) -> str:
    what = f"[{name}](https://huggingface.co/datasets/{name})" if name else "A local data set"
    if is_example(facts["options"]["data"]):
        what = "Twintune's built-in example"
    counts = facts.get("data", {})
    told = [f"{counts[key]:,} {text}" for key, text in _COUNTS.items() if counts.get(key)]
    said = f": {', '.join(told)}" if told else ""
    return f"{what}{said}. SHA-256 of the rows: `{recipe.data_hash}`."


_COUNTS = {
    "train_rows": "training rows",
    "valid_rows": "validation rows",
    "tokens": "tokens in the training rows",
    "label_tokens": "of them labels",
}


def _recipe_rows(recipe: Recipe) -> dict[str, Any]:
    fields = recipe.model_dump(exclude=_LEFT_OUT | (set(_SHAPE) if recipe.method == "full" else set()))
    return {"recipe hash": f"`{recipe.hash()}`"} | {
        name: value for name, value in fields.items() if value not in (None, {})
    }


def _shown(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _figures(run: Path, facts: dict[str, Any]) -> dict[str, str]:
    def number(key: str, show: str) -> str:
        return show.format(facts[key]) if facts.get(key) is not None else ""

    plan = run_record.read_plan(run)
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
        "peak memory": gigabytes(facts["peak_memory_bytes"]) if facts.get("peak_memory_bytes") else "",
        "backend": f"{plan.backend} on {plan.device}",
    }
    if example := facts.get("example"):
        rows["test answers in the wanted form"] = "{before} before, {after} after, of {total}".format(**example)
    return {name: text for name, text in rows.items() if text}


def _files(facts: dict[str, Any], parts: list[str]) -> str:
    lines = []
    if "fused" in parts:
        lines.append(
            "- `model*.safetensors` with config, tokenizer and chat template: the whole model, adapter fused in"
        )
    if "adapter" in parts:
        lines.append("- `adapter/`: the adapter alone, for PEFT")
    if "gguf" in parts:
        for report in facts["export"]["gguf"]:
            larger = (
                f", {report['fallbacks']} tensors in a larger type than its name says" if report["fallbacks"] else ""
            )
            lines.append(
                f"- `{report['file']}`: for llama.cpp, {report['bytes'] / 1e6:.1f} MB, "
                f"{report['bits_per_weight']:.2f} bits a weight{larger}"
            )
        lines.append("- `gguf/Modelfile`: for Ollama")
    return "\n".join(lines)


def _usage(facts: dict[str, Any], parts: list[str], base: str) -> str:
    blocks = []
    if "gguf" in parts:
        first = facts["export"]["gguf"][0]["file"]
        blocks.append(f"llama.cpp:\n\n    llama-server -m {first} --jinja")
        blocks.append("Ollama:\n\n    ollama create my-model -f gguf/Modelfile\n    ollama run my-model")
    if "fused" in parts:
        blocks.append(
            "transformers, in this folder:\n\n    from transformers import pipeline\n\n"
            '    chat = pipeline("text-generation", ".")\n'
            '    chat([{"role": "user", "content": "Hello"}], max_new_tokens=100)'
        )
    if "adapter" in parts and base:
        blocks.append(
            "PEFT, the adapter over its base:\n\n    from peft import PeftModel\n"
            "    from transformers import AutoModelForCausalLM\n\n"
            f'    model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            '    model = PeftModel.from_pretrained(model, "adapter")'
        )
    return "\n\n".join(blocks)


def _licence(terms: Terms, base: str) -> str:
    if terms.words:
        return terms.words
    of = f"[{base}](https://huggingface.co/{base})" if base else "the base model"
    if terms.license == "other":
        named = f" ({terms.name})" if terms.name != "see-base-model" else ""
        link = f" It is at {terms.link}." if terms.link else ""
        return f"The licence of {of}{named} holds for this model too.{link} Look at it before you pass the model on."
    return f"That of {of}: {terms.license}. Its licence files, where it has any, lie beside the weights."


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())])
