"""What the model card says of using a model: in llama.cpp, Ollama, transformers, PEFT and vLLM."""

from common.export.modelfile import merge_command
from common.recipe import Recipe
from common.run_fields import ExportRecord, RunRecord

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def usage(record: RunRecord, recipe: Recipe, parts: list[str], base: str) -> str:
    """Commands for each part, as Markdown. base: of the adapter; empty where it has no name on the hub."""
    blocks: list[str] = []
    if "gguf" in parts:
        blocks += _usage_of_gguf(record.export)
    if "fused" in parts:
        blocks.append(
            "transformers, in this folder:\n\n    from transformers import pipeline\n\n"
            '    chat = pipeline("text-generation", ".")\n'
            '    chat([{"role": "user", "content": "Hello"}], max_new_tokens=100)'
        )
        blocks.append("vLLM, in this folder:\n\n    vllm serve .")
    if "adapter" in parts and base and not record.left_out_by_peft:
        blocks.append(
            "PEFT, the adapter over its base:\n\n    from peft import PeftModel\n"
            "    from transformers import AutoModelForCausalLM\n\n"
            f'    model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            '    model = PeftModel.from_pretrained(model, "adapter")'
        )
        if (rank := _vllm_rank(recipe)) is not None:
            blocks.append(
                f"vLLM, the adapter over its base:\n\n    vllm serve {base} --enable-lora --max-lora-rank {rank} "
                "--lora-modules tuned=adapter"
            )
    return "\n\n".join(blocks)


def _vllm_rank(recipe: Recipe) -> int | None:
    """The least that vLLM must be told; None where it cannot serve the adapter: it knows no DoRA."""
    largest = max([recipe.rank, *(recipe.rank_pattern or {}).values()])
    return next((rank for rank in _VLLM_RANKS if rank >= largest), None) if recipe.method == "lora" else None


def _usage_of_gguf(export: ExportRecord) -> list[str]:
    lora = (
        "llama.cpp, the adapter over a GGUF of its base:\n\n    llama-server -m base.gguf "
        f"--lora {export.lora_gguf} --jinja"
    )
    if export.gguf:
        first = export.gguf[0]
        merge = f"    {merge_command(first.file, f'gguf/model-{first.name}.gguf')}\n" if first.parts else ""
        return [
            f"llama.cpp:\n\n    llama-server -m {first.file} --jinja",
            f"Ollama:\n\n{merge}    ollama create my-model -f gguf/Modelfile\n    ollama run my-model",
            *([lora] if export.lora_gguf else []),
        ]
    return [lora]
