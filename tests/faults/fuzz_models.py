"""Readers of a stranger's weights: adapters, model folders, tokenizers, GGUF and safetensors files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mlx_backend
import torch_backend
from common.backend import Adapter, LoraWeight
from common.commands.adapter import convert_adapter, inspect_adapter
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.export.modelfile import modelfile
from common.llama_cpp import lora
from common.llama_cpp.convert import report
from common.llama_cpp.convertible import check_convertible
from common.memory_terms import MicroBatchShape
from common.model_files import tokenize
from common.models import sentencepiece
from common.models.adapter_files import adapter_hash, read_any, write_mlx, write_peft
from common.models.license import find_terms
from common.models.lora_init import validate
from common.models.resolve import resolve
from common.models.safetensors_files import read_header, stored_tensors
from common.models.shapes import linear_shapes
from common.training.memory_estimate import TrainingMemory, model_dims
from common.verify.tiny_models import tiny_config
from tests.contexts import context
from tests.faults import mutations
from tests.faults.reader import Case, Reader
from tests.tiny import FAMILIES, chat, write_family, write_model, write_tokenizer
from tests.tiny_sentencepiece import write_gemma_like, write_llama_like
from tests.unit.bigram import PLAN, RECIPE

_Q, _DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _adapter(method: str) -> Adapter:
    random = np.random.default_rng(0)
    weights = {}
    for layer in range(2):
        for name, rank in ((_Q.format(layer), 2), (_DOWN.format(layer), 3)):
            A, B = (random.normal(size=shape).astype(np.float32) for shape in ((rank, 8), (8, rank)))
            magnitude = np.ones(8, np.float32) if method == "dora" else None
            weights[name] = LoraWeight(A, B, 4.0 + layer, method == "rslora", magnitude)
    return Adapter("owner/name", 2, 0.1, weights, dora=method == "dora")


def adapters(folder: Path) -> Reader:
    """Adapters of PEFT and mlx-lm: read, hashed, shown, compared with a base, rewritten in both layouts, read again."""
    for method in ("lora", "rslora", "dora"):
        write_peft(folder / f"peft-{method}", _adapter(method))
    for method in ("lora", "dora"):
        write_mlx(folder / f"mlx-{method}", _adapter(method))
    good = contents(folder)
    shapes = {name.format(layer): (8, 8) for layer in range(2) for name in (_Q, _DOWN)}

    def read(case: Case) -> None:
        where = folder / Path(next(iter(case))).parent
        adapter = read_any(where, 2)
        adapter_hash(adapter)
        inspect_adapter(where, None, context())
        for to in ("peft", "mlx"):
            out = folder / "out" / to
            shutil.rmtree(out, ignore_errors=True)
            convert_adapter(where, out, to, None, context())
            read_any(out, 2)
        validate(adapter, shapes, where)

    return Reader(folder, good, read, mutations.files(good))


# --- model folders

_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "README.md")


def _folders(folder: Path) -> None:
    for family in FAMILIES:
        write_family(folder / family, family)
        write_family(folder / f"{family}-older", family, older=True)
    _quantized(folder / "quantized")
    for each in [path.parent for path in folder.glob("*/config.json")]:
        (each / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/name\n---\n# A model\n")
        (each / "LICENSE").write_text("Apache License\nVersion 2.0\n")
        (each / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.95}')
        (each / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}')


def _quantized(folder: Path) -> None:
    """As mlx-lm writes it: 4 bits, in groups of 32."""
    import json

    from safetensors.numpy import load_file

    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}
    settings["model.layers.0.self_attn.q_proj"] = {"group_size": 32, "bits": 8}
    (folder / "config.json").write_text(json.dumps(config | {"quantization": settings}))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 2:
            bits = 8 if "layers.0.self_attn.q_proj" in name else 4
            module = name.removesuffix(".weight")
            tensors[name] = np.zeros((tensor.shape[0], tensor.shape[1] * bits // 32), np.uint32)
            tensors[f"{module}.scales"] = np.ones((tensor.shape[0], tensor.shape[1] // 32), np.float32)
            tensors[f"{module}.biases"] = np.ones((tensor.shape[0], tensor.shape[1] // 32), np.float32)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _model_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.rpartition("/")[2] in names}


def models(folder: Path) -> Reader:
    """Model folders of every family, checked as a base; then shapes, hash, memory on both backends, and license."""
    _folders(folder)
    good = _model_files(folder, ("config.json", "README.md", "model.safetensors", "model.safetensors.index.json"))
    recipe, plan = RECIPE, PLAN

    def read(case: Case) -> None:
        where = folder / Path(next(iter(case))).parent
        base = resolve(str(where), lambda text: None)
        linear_shapes(base, ["all-linear"])
        base.content_hash()
        dims = model_dims(base.config | {"dtype": base.dtype})
        for package in (torch_backend, mlx_backend):
            TrainingMemory(package, dims, recipe, None).estimate(plan, [MicroBatchShape(2, 9, 18, 9)])
        _ = base.has_vision, base.weight_bytes, base.parameter_count, base.full_names, base.vocabulary_size
        find_terms(where, str(where), base.model_type)

    return Reader(folder, good, read, mutations.files(good))


def served(folder: Path) -> Reader:
    """Tokenizer, chat template and generation settings of a model folder: loaded, a row encoded, a Modelfile made."""
    for family in ("llama", "gemma3"):
        write_family(folder / family, family)
        (folder / family / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
        (folder / family / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
        (folder / family / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    names = (*_CONFIGS[:4], "tokenizer.json", "added_tokens.json", "chat_template.jinja")
    good = _model_files(folder, names)

    def read(case: Case) -> None:
        where = folder / Path(next(iter(case))).parent
        _encode(where)
        modelfile(where, "model.gguf", [2], "off", [{"role": "user", "content": "a"}])

    return Reader(folder, good, read, mutations.files(good))


def _encode(folder: Path) -> None:
    """One chat row and one text, each of which may be refused."""
    encoder = Encoder(load_tokenizer(folder), MaskingOptions())
    for example in (Example(tuple(chat("a", "b")["messages"]), "1"), Example((), "2", text="plain text")):
        encoder(example)


def tokenizers(folder: Path) -> Reader:
    """tokenizer.json of several kinds: loaded, used, and rebuilt as sentencepiece's, checked and written."""
    write_tokenizer(folder / "bytes")
    write_gemma_like(folder / "gemma")
    write_llama_like(folder / "llama")
    write_llama_like(folder / "metaspace", "first")
    good = contents(folder)

    def read(case: Case) -> None:
        where = folder / Path(next(iter(case))).parent
        tokenize(load_tokenizer(where), "Hello world <0x0A>")
        for step in (sentencepiece.write, sentencepiece.adapt_space_prefix):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(where, out)
            step(out)

    return Reader(folder, good, read, mutations.files(good), limit=20)


def sentencepieces(folder: Path) -> Reader:
    """tokenizer.model without a tokenizer.json: transformers converts it."""
    write_gemma_like(folder / "gemma")
    sentencepiece.write(folder / "gemma")
    (folder / "gemma" / "tokenizer.json").unlink()
    (folder / "gemma" / "added_tokens.json").unlink()
    (folder / "gemma" / "config.json").write_text(json.dumps(tiny_config("gemma3_text")))
    good = contents(folder)

    def read(case: Case) -> None:
        tokenize(load_tokenizer(folder / "gemma"), "Hello world <0x0A>")
        check_convertible(folder / "gemma")

    return Reader(folder, good, read, mutations.files(good), limit=20)


# --- GGUF


def write_gguf(path: Path) -> None:
    """A Llama of one layer in float32, with a byte-level vocabulary, as llama.cpp's converter names things."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    random = np.random.default_rng(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_models(folder: Path) -> Reader:
    """A GGUF as --model: made into a model folder, and that checked."""
    write_gguf(folder / "model.gguf")
    good = contents(folder)

    def read(case: Case) -> None:
        try:
            resolve(str(folder / "model.gguf"), lambda text: None)
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)

    return Reader(folder, good, read, mutations.files(good), limit=30)


def gguf_reports(folder: Path) -> Reader:
    """What is on record of a GGUF that was made."""
    write_gguf(folder / "model.gguf")
    good = contents(folder)

    def read(case: Case) -> None:
        if (folder / "model.gguf").exists():
            report(folder / "model.gguf", "Q4_K_M")

    return Reader(folder, good, read, mutations.files(good))


def _lora(shapes: dict[str, tuple[int, int]], rank: int) -> Adapter:
    weights = {
        name: LoraWeight(np.ones((rank, columns), np.float32), np.ones((rows, rank), np.float32), 4.0)
        for name, (rows, columns) in shapes.items()
    }
    return Adapter("", 1, 0.0, weights)


_SHAPES = {f"model.layers.0.self_attn.{name}_proj": (8, 6) for name in "qk"}


def write_gguf_lora(path: Path, adapter: Adapter | None = None) -> None:
    """An adapter as llama.cpp's converter names its matrices."""
    from gguf import GGUFWriter

    adapter = adapter or _lora(_SHAPES, 2)
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", next(iter(adapter.weights.values())).alpha)
    for name, weight in adapter.weights.items():
        stem = f"blk.0.attn_{name[-6]}.weight"
        writer.add_tensor(f"{stem}.lora_a", weight.A)
        writer.add_tensor(f"{stem}.lora_b", weight.B)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_loras(folder: Path) -> Reader:
    """A LoRA GGUF; the file that llama.cpp's converter would make of numbered matrices is made here."""
    write_gguf_lora(folder / "lora.gguf")
    good = contents(folder)

    def convert(adapter: Adapter, base: Path, out: Path, llama: Any) -> None:
        write_gguf_lora(out, adapter)

    def read(case: Case) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora, "_convert", convert)
            adapter = lora.read_gguf_lora(folder / "lora.gguf", folder, _SHAPES, None)  # type: ignore[arg-type]
        validate(adapter, _SHAPES, folder / "lora.gguf")

    return Reader(folder, good, read, mutations.files(good))


def headers(folder: Path) -> Reader:
    """The header of a safetensors file."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((4, 3), np.float16) for i in range(3)}
    save_file(
        tensors | {"norm.weight": np.ones(3, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    good = contents(folder)

    def read(case: Case) -> None:
        if (folder / "model.safetensors").exists():
            header = read_header(folder / "model.safetensors")
            for tensor in stored_tensors(folder / "model.safetensors", header).values():
                for _ in tensor.chunks():
                    pass

    return Reader(folder, good, read, mutations.files(good))


def loading(folder: Path) -> Reader:
    """A base that was checked, loaded by torch."""
    import torch

    from torch_backend.model import load_base

    for family in ("llama", "gemma3_text", "qwen2", "phi3"):
        write_family(folder / family, family)
    good = _model_files(folder, ("config.json",))

    def read(case: Case) -> None:
        base = resolve(str(folder / Path(next(iter(case))).parent), lambda text: None)
        load_base(base, torch.float32)

    return Reader(folder, good, read, mutations.files(good), limit=30)
