"""llama.cpp's server, given the exported template, prompts as training did: every template, conversation and mode."""

import pytest

from common.data.encode import Encoder, MaskingOptions, exported_template
from common.data.turn_edges import BadRow
from common.llama_cpp.build import ensure
from common.llama_cpp.server import Server, ServerOptions, for_llama_cpp
from common.models.gguf_import import MIRRORS, mirror_gguf
from common.verify.cases import _prompt, _Row
from tests.progress import silent
from tests.templates.conversations import CONVERSATIONS
from tests.templates.families import SMOLLM2, build, families

SOON = {
    *("meta-llama-Llama-3.2-3B-Instruct", "Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B", "google-gemma-2-2b-it"),
    *("mistralai-Mistral-Nemo-Instruct-2407", "LFM2.5-8B-A1B", "Gemma 3 layout", "Qwen3.6"),
    *("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "ibm-granite-granite-3.3-2B-Instruct"),
    "mistralai-Ministral-3-14B-Reasoning-2512",
}
KNOWN = {
    # results of tools go into a field of their own, which the published template no longer needs
    *(
        ("google-gemma-4-31B-it-interleaved", "tools"),
        ("StepFun3.5-Flash", "whitespace"),
        ("StepFun3.5-Flash", "faint"),
    ),
    # Jinja escapes the definitions of tools as in HTML, llama.cpp does not
    ("meetkai-functionary-medium-v3.1", "tools"),
    # thinking is taken for a thing that they have no switch for
    *(("Apertus-8B-Instruct", "reasoning"), ("Apertus-8B-Instruct", "think text")),
    *(("Kimi-K2-Thinking", "reasoning"), ("Kimi-K2-Thinking", "think text")),
}


@pytest.fixture(scope="module")
def gguf():
    return mirror_gguf(MIRRORS[SMOLLM2], print)


@pytest.mark.parametrize("thinking", ["off", "keep"])
@pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.name, marks=() if f.name in SOON else pytest.mark.long) for f in families()]
)
def test_it_prompts_as_training_did(family, thinking, gguf, tmp_path):
    tokenizer, masking = build(family), MaskingOptions(thinking=thinking)
    encoder, prompts = Encoder(tokenizer, masking), {}
    for row in CONVERSATIONS:
        try:
            encoded, conversation, example = encoder.encode_chat(row)
        except BadRow:
            continue
        last = conversation.turns[-1]
        prompt, want = _prompt(_Row(row, encoded, True), encoder), conversation.text[: last.start]
        prompts[row.source] = prompt.messages, prompt.tools, prompt.settings, want
        if row.source == "system":  # as a chat sends it, whatever the template has to be given
            turns = [for_llama_cpp(message) for message in example.messages[:-1]]
            prompts["system, as sent"] = turns, prompt.tools, prompt.settings, want
    if not prompts:
        pytest.skip("the template takes none of the conversations")
    template = tmp_path / "served.jinja"
    template.write_text(exported_template(tokenizer, masking), encoding="utf-8")
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    with Server(ensure(None, silent), gguf, ServerOptions(256, template=template)) as server:
        wrong = {}
        for name, (messages, tools, settings, want) in prompts.items():
            text = server.prompt(messages, tools, bos_token=bos, eos_token=eos, **settings)
            if text.removeprefix(bos) != want.removeprefix(bos) and (family.name, name) not in KNOWN:
                wrong[name] = text, want
    assert wrong == {}
