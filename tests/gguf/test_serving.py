"""The exported model in llama.cpp: it stops by itself where its turns were trained to end, prompted as trained."""

import json

import pytest

from common.data.encode import Encoder, MaskingOptions, exported_template, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.encoded_rows import stop_ids
from common.data.load import read_rows
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.build import ensure
from common.llama_cpp.convert import convert
from common.llama_cpp.server import Server, ServerOptions
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from tests import backends
from tests.progress import silent
from tests.tiny import CHATML, chat

# The two tokens of ChatML in each other's place: nobody takes <|im_start|> for the end of a turn. (SmolLM2's unused
# tokens will not do: their embeddings are all alike, so that no training tells one from another.)
END = "<|im_start|>"
SWAPPED = CHATML.replace("<|im_start|>", "<|im_x|>").replace("<|im_end|>", END).replace("<|im_x|>", "<|im_end|>")
PROMPT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llama():
    return ensure(None, silent)


@pytest.fixture(scope="module")
def smollm2():
    return resolve("HuggingFaceTB/SmolLM2-135M-Instruct", print).path


def test_a_model_trained_to_another_end_of_turn_stops_there_by_itself(smollm2, llama, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(SWAPPED)
    tokenizer = load_tokenizer(smollm2, str(template))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(chat(said, "Aye, captain.")) + "\n" for said in ("Hi", "Yo", "Go", "So")))
    (rows,), _ = encode_parts([read_rows(data)], Encoder(tokenizer, MaskingOptions()), "error")
    assert stop_ids(rows) == [tokenizer.convert_tokens_to_ids(END)]
    recipe = backends.make_recipe(smollm2, rank=8, alpha=32.0, learning_rate=3e-3)
    backend = backends.load("torch", smollm2, recipe)
    losses = backends.run_steps(backend, recipe, rows, 30)
    adapter = backend.get_adapter()
    backend.close()
    assert losses[-1] < 0.1, losses
    served = ServingConfig(stop_ids(rows), exported_template(tokenizer, MaskingOptions()))
    write_fused(ModelFolder(smollm2), adapter, tmp_path / "fused", served, silent)
    convert(tmp_path / "fused", tmp_path / "model.gguf", "model", llama, silent)
    with Server(llama, tmp_path / "model.gguf", ServerOptions(context=512)) as server:
        assert server.chat(PROMPT, 60) == "Aye, captain."


@pytest.mark.parametrize(
    "name", ["Qwen-Qwen3-0.6B", pytest.param("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", marks=pytest.mark.long)]
)
def test_llama_cpp_prompts_as_training_did_though_it_asks_for_thoughts(smollm2, llama, tmp_path, name):
    """llama-server switches thinking on unless it is told otherwise; the exported template does not listen."""
    source = llama.converter.parent / "models" / "templates" / f"{name}.jinja"
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = source.read_text(encoding="utf-8")
    adapter = backends.start_adapter(smollm2, backends.make_recipe(smollm2, targets=["q_proj"], rank=1))
    prompts = {}
    for thinking in ("off", "keep"):
        style = MaskingOptions(thinking=thinking)
        served = ServingConfig([2], exported_template(tokenizer, style))
        write_fused(ModelFolder(smollm2), adapter, tmp_path / thinking, served, silent)
        convert(tmp_path / thinking, tmp_path / f"{thinking}.gguf", "model", llama, silent)
        with Server(llama, tmp_path / f"{thinking}.gguf", ServerOptions(context=512)) as server:
            answer = server._request("/apply-template", {"messages": PROMPT})
            prompts[thinking] = answer["prompt"]
    encoder = Encoder(tokenizer, MaskingOptions())
    assert encoder.template is not None
    bos = tokenizer.bos_token  # llama.cpp leaves it to the tokenizer
    assert prompts["off"].removeprefix(bos) == encoder.template.prompt(PROMPT, (), False).removeprefix(bos)
    assert prompts["off"].rstrip().endswith("</think>")
    assert not prompts["keep"].rstrip().endswith("</think>")
