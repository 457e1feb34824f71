"""What the model card says of using a model: in llama.cpp, Ollama, transformers, PEFT and vLLM."""

from textwrap import indent
from typing import Any

from common.documents import read_json
from common.export.modelfile import merge_command
from common.model_files import TEMPLATE_FILE
from common.models.adapter_files import CONFIG_FILE
from common.models.adapter_settings import number
from common.run_fields import ExportRecord
from common.run_record import Run

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def usage(run: Run, parts: list[str], base: str) -> str:
    """Commands for each part, as Markdown. base: the adapter's; empty where none of that name can be loaded for it."""
    record, blocks = run.record, []
    if "gguf" in parts:
        blocks += _usage_of_gguf(record.export, run.template.is_file())
    if "fused" in parts:
        blocks.append(
            "transformers, in this folder:\n\n    from transformers import pipeline\n\n"
            '    chat = pipeline("text-generation", ".")\n'
            '    chat([{"role": "user", "content": "Hello"}], max_new_tokens=100)'
        )
        blocks.append("vLLM, in this folder:\n\n    vllm serve .")
    if "adapter" in parts and base and not record.left_out_by_peft:
        blocks += _usage_of_adapter(run, base)
    return "\n\n".join(blocks)


def _usage_of_adapter(run: Run, base: str) -> list[str]:
    """With the run's chat template: the base's may give other prompts than training had, or be missing."""
    config = read_json(run.adapter / CONFIG_FILE, "Give another run.")
    template = f"adapter/{TEMPLATE_FILE}" if run.template.is_file() else ""
    kind = "AutoModelForImageTextToText" if _is_multimodal(config) else "AutoModelForCausalLM"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind}{', AutoTokenizer' if template else ''}",
        "",
        f'model = {kind}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "adapter")',
    ]
    if template:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{base}")')
        lines.append(f'tokenizer.chat_template = open("{template}", encoding="utf-8").read()')
    code = indent("\n".join(lines), " " * 4)
    blocks = [f"PEFT, the adapter over its base:\n\n{code}"]
    modules = _ranks_and_scales(run, config)
    rank = next((rank for rank in _VLLM_RANKS if rank >= max(modules)[0]), None)
    if config.get("use_dora") or rank is None:  # vLLM cannot serve it
        return blocks
    if len({scale for _, scale in modules}) > 1:
        return [*blocks, "vLLM would compute another model of this adapter: it scales all its layers alike."]
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=adapter"
    served = f" --chat-template {template}" if template else ""
    return [*blocks, f"vLLM, the adapter over its base:\n\n    {serve}{served}"]


def _is_multimodal(config: dict[str, Any]) -> bool:
    """Whether the adapter's base is: its language model is then a part, and modules have their full names."""
    names = config.get("target_modules")
    return isinstance(names, list) and any(".language_model." in str(name) for name in names)


def _ranks_and_scales(run: Run, config: dict[str, Any]) -> list[tuple[float, str]]:
    """Of the modules, each that differs from the others once. Raises UserError for what is not a number."""
    ranks, alphas = (
        {"": config.get(own, 8)} | (others if isinstance(others := config.get(pattern), dict) else {})
        for own, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    where, found = run.adapter / CONFIG_FILE, []
    for name in {**ranks, **alphas}:
        rank = max(1.0, number(where, "rank", ranks.get(name, ranks[""])))
        alpha = number(where, "alpha", alphas.get(name, alphas[""]))
        found.append((rank, f"{alpha / (rank**0.5 if config.get('use_rslora') else rank):.6g}"))
    return found


def _usage_of_gguf(export: ExportRecord, template: bool) -> list[str]:
    beside = f" --chat-template-file gguf/{TEMPLATE_FILE}" if template else ""
    lora = (
        "llama.cpp, the adapter over a GGUF of its base:\n\n    llama-server -m base.gguf "
        f"--lora {export.lora_gguf} --jinja{beside}"
    )
    if export.gguf:
        first = export.gguf[0]
        merge = f"    {merge_command(first.file, f'gguf/model-{first.name}.gguf')}\n" if first.parts else ""
        tower = f" --mmproj {export.mmproj}" if export.mmproj else ""
        return [
            f"llama.cpp:\n\n    llama-server -m {first.file}{tower} --jinja",
            f"Ollama:\n\n{merge}    ollama create my-model -f gguf/Modelfile\n    ollama run my-model",
            *([lora] if export.lora_gguf else []),
        ]
    return [lora]
