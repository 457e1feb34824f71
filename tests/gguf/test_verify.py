"""`verify` on a run of a tiny model and the real llama.cpp: sound as exported, and every planted fault named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.backend import Adapter
from common.commands.fuse import fuse_run
from common.commands.train import run_training
from common.errors import Unable, UserError
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.build import own
from common.llama_cpp.convert import convert, quantize
from common.llama_cpp.install import LlamaCpp
from common.models.adapter_files import read_trained
from common.models.model_folder import ModelFolder
from common.options import Options
from common.run_fields import GgufRecord
from common.run_record import Run
from common.verify import cases, verify
from common.verify.judge import verdict
from common.verify.server_checks import Check
from common.verify.verify import verify_run
from tests.contexts import context

END = "<|done|>"  # a name that llama.cpp does not take for an end by itself
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '" + END + "' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
COLORS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")
QUANTS = ("Q4_K_M", "Q8_0")


def quiet(share: float, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return own(quiet)


@pytest.fixture(scope="module")
def base(llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    vocabulary = llama.converter.parent / "models" / "ggml-vocab-gpt-2.gguf"
    tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,  # so that every projection of attention is square
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # so that embeddings are long enough for sure answers
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Paint {count} {thing}s."},
                {"role": "assistant", "content": f"I paint {count} {thing}s {COLORS[number % 8]}."},
            ]
        }
        for number, thing in enumerate(("house", "boat", "gate", "wall", "door", "roof", "chair", "table"))
        for count in ("two", "three", "four", "nine")
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = Options(
        model=str(base),
        data=str(data),
        output=str(folder / "run"),
        backend="torch",
        device="cpu",
        precision="fp32",
        steps=40,
        learning_rate=1e-2,
        quant=list(QUANTS),
        quiet=True,
    )
    with pytest.MonkeyPatch.context() as patch:  # at the end of a training, verification has all of it at hand
        patch.setattr(cases, "data_of", lambda *given: pytest.fail("the data are read again"))
        for name in ("base_of", "adapter_of"):
            patch.setattr(verify, name, lambda *given: pytest.fail("the model is looked for again"))
        return run_training(options, context())


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to plant a fault in."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    yield copy
    shutil.rmtree(copy)


def found(run: Path) -> dict[str, Check]:
    checks = {check.name: check for check in verify_run(run, context())}
    kept = Run(run).record.verify
    assert kept is not None
    assert kept.verdict == verdict(list(checks.values()))
    assert {check["name"] for check in kept.checks} == set(checks)
    return checks


def broken(run: Path) -> set[str]:
    return {name for name, check in found(run).items() if check.state == "broken"}


def remake(run: Path, base: Path, adapter: Adapter, llama: LlamaCpp) -> None:
    """The run's fused folder and GGUFs made again, out of another adapter."""
    served = ServingConfig(Run(run).record.stop_ids, Run(run).read_template())
    write_fused(ModelFolder(base), adapter, run / "fused", served, quiet)
    bf16 = run / "gguf" / "model-BF16.gguf"
    convert(run / "fused", bf16, "remade", llama, quiet)
    for quant in QUANTS:
        quantize(bf16, run / "gguf" / f"model-{quant}.gguf", quant, llama, quiet)
    bf16.unlink()


def edit(run: Path, *arguments: str) -> None:
    """Other metadata in the first GGUF, by gguf-py's own tool."""
    gguf = run / "gguf" / f"model-{QUANTS[0]}.gguf"
    other = gguf.with_name("other.gguf")
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", *arguments, "--force", str(gguf), str(other)]
    subprocess.run(command, check=True, capture_output=True)
    other.replace(gguf)


def test_a_machine_that_cannot_compute_it_says_nothing_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Run(run).record.verify

    def unable(*given: object) -> None:
        raise Unable("It does not fit into memory.", "Close other programs.")

    monkeypatch.setattr(verify, "_compare_trained", unable)
    with pytest.raises(Unable, match="does not fit into memory"):
        verify_run(run, context())
    assert Run(run).record.verify == before


def test_a_sound_export_is_called_sound(run: Path) -> None:
    checks = found(run)
    assert {name for name, check in checks.items() if check.state == "broken"} == set()
    assert set(checks) == {"token ids", "prompt", "stop", "answers", "fused", "bf16 GGUF", *QUANTS}
    assert [
        checks[name].state for name in ("token ids", "prompt", "stop", "answers", "fused", "bf16 GGUF", "Q8_0")
    ] == ["ok"] * 7
    kept = Run(run).record.verify
    assert kept is not None
    links = kept.divergence
    assert links["base"].mean_kl > 1
    assert links["fused"].mean_kl < links["Q8_0"].mean_kl < links["Q4_K_M"].mean_kl
    assert links["BF16"].same_top > 0.98


@pytest.mark.long
def test_another_tokenizer(run: Path) -> None:
    edit(run, "--pre-tokenizer", "bloom")  # what a converter that fell back would have written
    assert "token ids" in broken(run)


def test_a_lost_end(run: Path) -> None:
    edit(run, "--special-token-by-id", "eos", "0")
    assert broken(run) == {"stop"}


def test_a_stale_template(run: Path) -> None:
    edit(run, "--chat-template", TEMPLATE.replace("assistant:", "bot:"))
    assert broken(run) == {"prompt"}


@pytest.mark.long
def test_an_untransposed_adapter(run: Path, base: Path, llama: LlamaCpp) -> None:
    final = read_trained(run, 2)
    wrong = {
        name: replace(weight, A=np.ascontiguousarray(weight.B.T), B=np.ascontiguousarray(weight.A.T))
        if weight.A.shape[1] == weight.B.shape[0]
        else weight
        for name, weight in final.weights.items()
    }
    remake(run, base, replace(final, weights=wrong), llama)
    assert "fused" in broken(run)


def test_the_base_instead_of_the_fused_model(run: Path, base: Path, llama: LlamaCpp) -> None:
    final = read_trained(run, 2)
    nothing = {name: replace(weight, B=np.zeros_like(weight.B)) for name, weight in final.weights.items()}
    remake(run, base, replace(final, weights=nothing), llama)
    assert "fused" in broken(run)


def test_a_gguf_of_another_model(run: Path, base: Path, llama: LlamaCpp) -> None:
    final = read_trained(run, 2)
    half = {name: replace(weight, alpha=weight.alpha / 2) for name, weight in final.weights.items()}
    fused = run / "fused"
    shutil.copytree(fused, run / "kept")
    remake(run, base, replace(final, weights=half), llama)
    bf16 = run / "gguf" / "model-BF16.gguf"
    convert(fused, bf16, "half", llama, quiet)  # stays beside, so that it is what is looked at
    shutil.rmtree(fused)
    (run / "kept").rename(fused)
    bf16 = GgufRecord(name="BF16", quant="BF16", file="gguf/model-BF16.gguf")
    Run(run).update_export(gguf=[*Run(run).record.export.gguf, bf16])
    assert "bf16 GGUF" in broken(run)


@pytest.mark.long
def test_data_that_changed_matters_only_to_a_run_that_keeps_no_cases(run: Path) -> None:
    """An older version's run keeps none; its data give the same cases."""
    data, from_data = Path(Run(run).record.options["data"][0]), None
    kept, file = data.read_text(encoding="utf-8"), run / "verify-cases.json"
    try:
        data.write_text(kept.replace("red", "blue"), encoding="utf-8")
        from_file = found(run)
        file.unlink()
        with pytest.raises(UserError, match="not the data"):
            verify_run(run, context())
        data.write_text(kept, encoding="utf-8")
        from_data = found(run)
    finally:
        data.write_text(kept, encoding="utf-8")
    assert from_data == from_file
    assert not file.exists(), "verify writes nothing but its findings"


@pytest.mark.long
def test_each_type_with_a_matrix_split_and_verified(run: Path) -> None:
    """The real llama-quantize and llama-gguf-split: what they make is what is verified, and answers."""
    plain = run / "gguf" / "model-Q4_K_M.gguf"
    before = plain.read_bytes()
    options = {"quant": ["Q4_K_M", "F32", "IQ4_XS"], "imatrix": True, "split_size": "57MB"}
    fuse_run(run, options, context())
    guided = run / "gguf" / "model-Q4_K_M-imatrix.gguf"
    reports = Run(run).record.export.gguf
    names = ["Q4_K_M-imatrix", "F32", "IQ4_XS-imatrix"]
    assert [report.name for report in reports] == [*names, "Q4_K_M", "Q8_0"]
    assert before == plain.read_bytes() != guided.read_bytes()
    assert reports[0].tensors == reports[3].tensors
    assert "IQ4_XS" in reports[2].tensors
    assert len(reports[1].parts) > 1
    assert str(run).encode() not in guided.read_bytes()
    assert not (run / "gguf" / "model-BF16.gguf").exists()
    assert not (run / "gguf" / "model-F32.gguf").exists()
    found = Run(run).record.verify
    assert found is not None
    assert {*names} <= found.divergence.keys()
    assert (found.divergence["F32"].mean_kl or 1) < 1e-3
    matrix = run / "gguf" / "imatrix.gguf"
    made = matrix.stat().st_mtime_ns
    fuse_run(run, {"quant": ["IQ2_M"], "imatrix": True, "no_verify": True}, context())
    assert "IQ2_S" in Run(run).record.export.gguf[0].tensors
    assert matrix.stat().st_mtime_ns == made, "it was made again"
