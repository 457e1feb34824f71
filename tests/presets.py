"""The presets in `configs/`: which there are, and the text of each, its memory estimated again.

python -m tests.presets      # writes them all, after a change of a goal, of the estimate or of the plan
"""

from dataclasses import replace
from math import prod

import mlx_backend
import torch_backend
from common.goals import GOALS, Language, Setting, as_yaml, settings_of
from common.models.shapes import tensor_shapes
from common.options import Options
from common.presets import PRESETS, published_configs
from common.training.model_estimate import Place, estimated_plan

# On a computer of 16 GB, where other programs run too.
MEMORY = 10 * 10**9
CPU = Place(torch_backend, "torch", "cpu", "fp32", "none", MEMORY)
GPU = Place(mlx_backend, "mlx", "gpu", "bf16", "none", MEMORY)
FOUR_BITS_FROM = 2.5e9  # weights

_GOOGLE, _SMOL, _META = "google", "HuggingFaceTB", "meta-llama"
_MINISTRAL = "mistralai/Ministral-3-3B-Instruct-2512-BF16"
_GRANITE, _EXAONE = "ibm-granite/granite-4.0", "LGAI-EXAONE/EXAONE-4.0-1.2B"
# Goal -> models.
MODELS = {
    "persona": (
        *(f"{_GOOGLE}/gemma-3-270m-it", f"{_GOOGLE}/gemma-3-1b-it", f"{_GOOGLE}/gemma-3-4b-it"),
        *("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", f"{_META}/Llama-3.2-1B-Instruct", f"{_SMOL}/SmolLM2-360M-Instruct"),
        *(_MINISTRAL, f"{_GOOGLE}/gemma-4-E2B-it", f"{_GRANITE}-350m"),
    ),
    "assistant": (
        "LiquidAI/LFM2-1.2B",
        *(f"{_GOOGLE}/gemma-3-1b-it", f"{_GOOGLE}/gemma-3-4b-it", "Qwen/Qwen3-4B", f"{_META}/Llama-3.2-3B-Instruct"),
        *("microsoft/Phi-4-mini-instruct", f"{_SMOL}/SmolLM2-1.7B-Instruct", _MINISTRAL),
        *("allenai/OLMo-2-0425-1B-Instruct", f"{_GOOGLE}/gemma-4-E2B-it", f"{_GOOGLE}/gemma-2-2b-it"),
        *(f"{_GRANITE}-1b", _EXAONE, "Qwen/Qwen2.5-1.5B-Instruct"),
        *("mistralai/Mistral-7B-Instruct-v0.3", "allenai/Olmo-3-7B-Instruct", "zai-org/GLM-4-9B-0414"),
    ),
    "japanese": (
        *(f"{_GOOGLE}/gemma-3-1b-it", f"{_GOOGLE}/gemma-3-4b-it", "Qwen/Qwen3-1.7B", "Qwen/Qwen3.5-0.8B"),
        *("SakanaAI/TinySwallow-1.5B-Instruct", _MINISTRAL, f"{_GOOGLE}/gemma-4-E2B-it"),
        *(f"{_GOOGLE}/gemma-2-2b-jpn-it", "Qwen/Qwen3.5-4B"),
    ),
    "tools": (
        *(f"{_GOOGLE}/functiongemma-270m-it", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B"),
        *("ibm-granite/granite-3.3-2b-instruct", f"{_GRANITE}-1b", f"{_GRANITE}-micro"),
    ),
    "reasoning": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3.5-0.8B", f"{_SMOL}/SmolLM3-3B", _EXAONE),
    "classify": (
        *(f"{_GOOGLE}/gemma-3-270m-it", "Qwen/Qwen3-0.6B", f"{_SMOL}/SmolLM2-135M-Instruct", f"{_GRANITE}-350m"),
        "Qwen/Qwen2.5-0.5B-Instruct",
    ),
    "text": (f"{_GOOGLE}/gemma-3-270m", f"{_META}/Llama-3.2-1B", f"{_SMOL}/SmolLM2-360M"),
}


def preset_name(model: str, goal: str) -> str:
    name = model.split("/")[1].lower().removesuffix("-2512-bf16").replace("-0425", "").removesuffix("-it")
    return f"{name.replace('-instruct', '')}-{goal}"


EVERY = {preset_name(model, goal): (model, goal) for goal, models in MODELS.items() for model in models}


def preset(name: str) -> str:
    """The text of the preset."""
    model, goal = EVERY[name]
    language: Language = "ja" if goal == "japanese" else "en"
    settings = settings_of(goal, language, weights(model) > FOUR_BITS_FROM)
    options = Options.model_validate({setting.name: setting.value for setting in settings})
    head = [
        f"{model} {GOALS[goal].about}; for {GOALS[goal].rows:,} rows or more",
        f"  python cli.py train --config {name} --data my.jsonl",
        f"memory: {memory(model, goal, options)}",
        "Learning rate, epochs, batch size and rank are chosen for model and rows (--recipe auto).",
    ]
    return as_yaml(head, Setting("model", model, ""), None, settings)


def memory(model: str, goal: str, options: Options) -> str:
    """What is estimated on two kinds of computer: by the leanest plan, and by the fastest within MEMORY."""
    rows, tokens = GOALS[goal].rows, GOALS[goal].tokens
    schemes = {"none": ("none", "none"), "4bit": ("nf4", "mlx-4bit-64")}[options.quantization]
    sizes, found = [(tokens, tokens // 2)] * rows, []
    for place, scheme in zip((CPU, GPU), schemes, strict=True):
        places = [replace(place, scheme=scheme, memory=memory) for memory in (1, MEMORY)]
        plans = [estimated_plan(options, published_configs()[model], sizes, each) for each in places]
        least, most = (plan.prediction.peak / 1e9 for plan in plans)
        found.append(f"{least:.1f} to {most:.1f} GB")
    return f"{found[0]} on a CPU (PyTorch), {found[1]} on a Mac (MLX), estimated for {rows:,} rows of {tokens:,} tokens"


def weights(model: str) -> int:
    return sum(map(prod, tensor_shapes(published_configs()[model]).values()))


def main() -> None:
    for name in EVERY:
        (PRESETS / f"{name}.yaml").write_text(preset(name), encoding="utf-8")


if __name__ == "__main__":
    main()
