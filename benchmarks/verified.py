"""Every family's way to a GGUF in the real llama.cpp: a tiny model is trained, exported and verified; prints Markdown.

    python -m benchmarks.verified                       # a minute a family and backend
    python -m benchmarks.verified --only qwen3 --backend mlx
    python -m benchmarks.verified --record              # into benchmarks/results/verified.json, for docs/board.md

The models are random, with a vocabulary of GPT-2, Qwen2 or Gemma 4, which lie in llama.cpp's source, or Gemma 3's own.
Training teaches each what it is asked later, so that its answers are sure. See docs/verify.md for what is compared.
"""

import argparse
import importlib
import json
import re
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.commit import now
from common.commands.train import run_training
from common.context import Context
from common.display import Display
from common.errors import UserError
from common.llama_cpp.build import ensure
from common.llama_cpp.install import VERSION
from common.models.resolve import resolve
from common.options import Options
from common.run_record import Run
from common.verify.tiny_models import TINY, write_tiny

END = "<|done|>"  # a name that llama.cpp does not take for an end by itself
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '" + END + "' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
RESULTS = Path(__file__).parent / "results" / "verified.json"
_COLUMNS = ("token ids", "prompt", "stop", "answers", "fused", "bf16 GGUF", "Q8_0", "Q4_K_M")
_CONTROL_KINDS = (3, 4)  # control and user-defined tokens of a GGUF
COLORS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")
THINGS = ("house", "boat", "gate", "wall", "door", "roof", "chair", "table")
# Sizes that llama.cpp's quants and kernels take.
_SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
_LONG = {"rope_type": "default", "rope_theta": 1e4}
_CHANGES: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 4},
    "gemma2": {"query_pre_attn_scalar": 64, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "gemma4_text": {
        **{"head_dim": 64, "hidden_size_per_layer_input": 64, "final_logit_softcapping": 30.0},
        "per_layer_config": {str(layer): {"head_dim": 128} for layer in (2, 4)},
        "sliding_window": 16,
    },
    "gemma4_unified_text": {
        "per_layer_config": {"2": {"head_dim": 128, "num_key_value_heads": 1}},
        **{"final_logit_softcapping": 30.0, "sliding_window": 16},
    },
    "granitemoehybrid": {"intermediate_size": 256, "shared_intermediate_size": 512},
    "lfm2": {"intermediate_size": 768, "block_ffn_dim_multiplier": 1.0, "conv_bias": False},  # llama.cpp has none
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": TINY["ministral3"]["rope_parameters"]
        | {"mscale_all_dim": 1.0, "factor": 32.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1},
    },
    "olmo2": {"attention_bias": False},  # llama.cpp has none
    "olmo3": {
        "sliding_window": 16,  # rows have 22 tokens
        "rope_parameters": {
            "full_attention": _YARN | {"rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 16},
            "sliding_attention": _LONG,
        },
    },
    "phi3": {"rope_parameters": _LONG, "original_max_position_embeddings": 512, "sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 4},  # llama.cpp knows no other
    "qwen3_5_text": {
        **{"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4},
        "rope_parameters": _LONG | {"partial_rotary_factor": 0.25},
    },
}


def write_base(folder: Path, family: str, tokenizer: Any | None = None) -> None:
    """A tiny model of the family with a tokenizer, as transformers saves them; without one given, see above."""
    if tokenizer is None:
        tokenizer = _tokenizer(family)
    tokenizer.save_pretrained(folder)
    count = len(tokenizer) if family.startswith("gemma4") else -(-len(tokenizer) // 64) * 64
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    sizes = _SIZES | {"vocab_size": count, "vocab_size_per_layer_input": count}
    write_tiny(folder, family, sizes | ends | _CHANGES.get(family, {}))
    if family == "gemma4_unified_text":
        _add_embedders(folder)


def _add_embedders(folder: Path) -> None:
    """Give the text model of a Gemma 4 12B its embedders of images and sound, which llama.cpp's converter wants."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = json.loads((folder / "config.json").read_text())
    vision = {"mm_embed_dim": 48, "mm_posemb_size": 16, "output_proj_dims": 48}
    config = AutoConfig.for_model("gemma4_unified", text_config=text, vision_config=vision, audio_config={})
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
    tensors = load_file(folder / "model.safetensors")
    model.model.language_model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    model.save_pretrained(folder)
    settings = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _tokenizer(family: str) -> Any:
    from transformers import AutoTokenizer

    source = ensure(None, lambda share, text: None).converter.parent / "models"
    if family.startswith("gemma4"):
        tokenizer = _gemma4_tokenizer(source / "ggml-vocab-gemma-4.gguf")
    elif family.startswith("gemma"):  # the converter takes no other tokenizer for it
        tokenizer = AutoTokenizer.from_pretrained(resolve("google/gemma-3-270m", print).path, trust_remote_code=False)
    else:
        kind = "qwen2" if family in ("qwen2", "qwen3") else "gpt-2"  # transformers splits words by the family
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=f"ggml-vocab-{kind}.gguf", trust_remote_code=False)
    special = [END, "<|user|>", "<|endoftext|>"] if family == "glm4" else [END]  # which its converter asks for
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _gemma4_tokenizer(source: Path) -> Any:
    """transformers reads none out of a GGUF of this kind."""
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    fields = GGUFReader(source).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = GemmaTokenizer({token: number for number, token in enumerate(tokens)}, pairs)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind in _CONTROL_KINDS]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    begins = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    return tokenizer


def write_rows(path: Path) -> None:
    rows = [
        [("user", f"Paint {count} {thing}s."), ("assistant", f"I paint {count} {thing}s {COLORS[number]}.")]
        for number, thing in enumerate(THINGS)
        for count in ("two", "three", "four", "nine")
    ]
    lines = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def verified(family: str, backend: str, folder: Path) -> dict[str, Any]:
    """The verdict on the exported files, and what each check found."""
    write_base(folder / "base", family)
    write_rows(folder / "rows.jsonl")
    options = Options(
        model=str(folder / "base"),
        data=str(folder / "rows.jsonl"),
        output=str(folder / "run"),
        backend=backend,
        device="cpu",
        precision="fp32",
        steps=40,
        learning_rate=1e-2,
        quant=["Q8_0", "Q4_K_M"],
        quiet=True,
    )
    context = Context(lambda name: importlib.import_module(f"{name}_backend"), Display("quiet"))
    failed = ""
    with redirect_stdout(StringIO()):
        try:
            run_training(options, context)
        except UserError as error:  # of a GGUF that is not what was trained; the record tells
            failed = error.what
    run = Run(folder / "run")
    found = run.record.verify if run.record_file.exists() else None
    if found is None:
        raise SystemExit(f"{family}, {backend}: nothing was verified: {failed}")
    checks = {check["name"]: f"{check['state']}: {check['text']}" for check in found.checks}
    return {"family": family, "backend": backend, "verdict": found.verdict, "checks": checks}


def shown(one: dict[str, Any]) -> dict[str, str]:
    """What each check found in a word: the KL divergence of a file from the one before, or its state."""
    found = {name: one["checks"].get(name, "-: -") for name in _COLUMNS}
    kls = {name: re.search(r"KL (\S+?),? from", text) for name, text in found.items()}
    return {name: kl[1] if (kl := kls[name]) else text.partition(":")[0] for name, text in found.items()}


def record(found: list[dict[str, Any]], path: Path = RESULTS) -> None:
    """Put what was found into the file, in place of what it has of the same family and backend."""
    known = {(one["family"], one["backend"]): one for one in json.loads(path.read_text(encoding="utf-8"))}
    when = now() | {"llama.cpp": VERSION}
    for one in found:
        kept = {name: one[name] for name in ("family", "backend", "verdict")}
        known[one["family"], one["backend"]] = kept | {"checks": shown(one)} | when
    lines = [json.dumps(known[key]) for key in sorted(known)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verified")
    parser.add_argument("--only", nargs="+", choices=TINY, default=[*TINY], metavar="FAMILY")
    parser.add_argument("--backend", nargs="+", choices=("torch", "mlx"), default=["torch", "mlx"])
    parser.add_argument("--record", action="store_true", help=f"put it into {RESULTS.name}, which docs/board.md shows")
    parser.add_argument("--json", type=Path, help="write what each check found here too")
    given = parser.parse_args()
    print(f"| family | backend | verdict | {' | '.join(_COLUMNS)} |\n|{' --- |' * (3 + len(_COLUMNS))}", flush=True)
    found = []
    for family, backend in product(given.only, given.backend):
        with tempfile.TemporaryDirectory() as folder:
            found.append(verified(family, backend, Path(folder)))
        values = [family, backend, found[-1]["verdict"], *shown(found[-1]).values()]
        print(f"| {' | '.join(values)} |", flush=True)
    if given.record:
        record(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
