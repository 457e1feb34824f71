"""--export lora-gguf, the whole way: no fused folder, the adapter that was trained, refused where it cannot be held."""

import numpy as np
import pytest

from common.commands.arguments import read_flags
from common.commands.fuse import fuse_run
from common.commands.train import run_training
from common.errors import UserError
from common.llama_cpp.build import ensure
from common.llama_cpp.lora import read_gguf_lora
from common.models.adapter_files import read_trained
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.option_sources import load_options
from common.run_record import Run
from tests.contexts import context
from tests.progress import silent
from tests.tiny import write_rows

BASE = ["--backend", "torch", "--device", "cpu", "--precision", "fp32", "--steps", "2", "--rank", "4", "--rslora"]


def train(model, folder, *more):
    argv = ["--model", str(model), "--data", str(write_rows(folder / "rows.jsonl")), "--output", str(folder / "run")]
    return run_training(load_options(read_flags([*argv, *BASE, *more]))[0], context("plain"))


def check(run, model):
    shapes = linear_shapes(ModelFolder(model), ["all-linear"])
    found = read_gguf_lora(run / "gguf" / "adapter.gguf", model, shapes, ensure(None, silent))
    wanted = read_trained(run)
    assert found.weights.keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        again = found.weights[name]
        np.testing.assert_allclose(
            again.scale * again.B @ again.A, weight.scale * weight.B @ weight.A, rtol=1e-5, atol=1e-7
        )
    assert not (run / "fused").exists()


def test_the_adapter_alone_and_how_to_run_it(tiny_llama, tmp_path, capsys):
    run = train(tiny_llama, tmp_path, "--export", "lora-gguf")
    check(run, tiny_llama)
    record = Run(run).record.export
    assert record.lora_gguf == "gguf/adapter.gguf"
    assert record.stages.keys() == {"lora"}
    said = " ".join(capsys.readouterr().out.split())
    assert f"-m BASE.gguf --lora {run}/gguf/adapter.gguf --jinja --chat-template-file {run}/chat_template.jinja" in said
    assert f"{tiny_llama} --outfile BASE.gguf" in said
    (run / "gguf" / "adapter.gguf").unlink()
    fuse_run(run, {"export": "lora-gguf"}, context())
    check(run, tiny_llama)


@pytest.mark.parametrize(
    ("method", "kind"), [(["dora"], "DoRA's row lengths"), (["full"], "the weights of full fine-tuning")]
)
def test_what_it_cannot_hold_is_refused_before_anything_is_done(tiny_llama, tmp_path, method, kind):
    rank = BASE.index("--rank")
    flags = BASE[:rank] if method == ["full"] else BASE
    argv = ["--model", str(tiny_llama), "--data", str(write_rows(tmp_path / "rows.jsonl")), *flags]
    argv += ["--output", str(tmp_path / "run"), "--method", *method, "--export", "lora-gguf"]
    with pytest.raises(UserError, match=f"A GGUF LoRA cannot hold {kind}"):
        run_training(load_options(read_flags(argv))[0], context())
    assert not (tmp_path / "run").exists()


def test_a_dora_run_and_a_given_dora_adapter_are_refused_too(tiny_llama, tmp_path):
    run = train(tiny_llama, tmp_path, "--method", "dora", "--export", "none")
    with pytest.raises(UserError, match="cannot hold DoRA's row lengths"):
        fuse_run(run, {"export": "lora-gguf"}, context())
    argv = ["--model", str(tiny_llama), "--data", str(tmp_path / "rows.jsonl"), "--adapter", str(run), *BASE[:-3]]
    argv += ["--output", str(tmp_path / "next"), "--export", "lora-gguf"]
    with pytest.raises(UserError, match="cannot hold DoRA's row lengths"):
        run_training(load_options(read_flags(argv))[0], context())
    assert not (tmp_path / "next").exists()
