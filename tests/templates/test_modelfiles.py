"""Real chat templates as Go templates for Ollama: exact or left out, none wrong."""

from dataclasses import fields, replace

import pytest

from common.export.go_template import TurnTexts
from common.export.modelfile import difference
from tests.go_interpreter import execute
from tests.templates.families import families
from tests.templates.modelfiles import cases, derived, wrong

LEFT_OUT = {"fireworks-ai-llama-3-firefunction-v2"}  # it wants functions
NAMES = {family.name: family for family in families()}


@pytest.mark.parametrize("thinking", ["off", "keep"])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_template_is_exact_or_left_out(name: str, thinking: str) -> None:
    texts, _, why = derived(NAMES[name], thinking)
    assert bool(why) == (name in LEFT_OUT), why or "it is expressed now"
    assert (texts is None) == bool(why)
    assert wrong(NAMES[name], thinking) == []


def test_the_conversations_are_there() -> None:
    assert all(len(cases(NAMES[name], "off")) > 10 for name in NAMES.keys() - LEFT_OUT)


def expressed(name: str, thinking: str) -> TurnTexts:
    texts = derived(NAMES[name], thinking)[0]
    assert texts is not None
    return texts


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "google-gemma-2-2b-it", "SmolLM2-135M-Instruct"])
@pytest.mark.parametrize("field", [field.name for field in fields(TurnTexts)])
def test_the_check_finds_each_wrong_text(name: str, field: str) -> None:
    texts = expressed(name, "off")
    known = {str(messages): expected for messages, expected in cases(NAMES[name], "off")}
    right = getattr(texts, field)
    wrong_texts = replace(texts, **{field: not right if isinstance(right, bool) else right + "!"})
    faults = [difference(wrong_texts, lambda m: known[str(m)], m) for m, _ in cases(NAMES[name], "off")]
    assert any(faults)


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "google-gemma-2-2b-it", "SmolLM2-135M-Instruct"])
@pytest.mark.parametrize("cut", ["<|im_start|>", "<start_of_turn>", "\n\n", "{{ .Content }}", "not $last", "eq $i 0"])
def test_a_wrong_template_writes_other_prompts(name: str, cut: str) -> None:
    template = expressed(name, "off").go_template()
    if cut not in template:
        assert cut in ("<|im_start|>", "<start_of_turn>", "eq $i 0", "\n\n"), "each cut is in one of the three"
        return
    spoilt = template.replace(cut, "$last" if cut == "not $last" else "ne $i 0" if cut == "eq $i 0" else "", 1)
    assert any(execute(spoilt, messages) != expected for messages, expected in cases(NAMES[name], "off"))


def test_gemma_has_its_system_text_in_the_first_user_turn() -> None:
    template = expressed("google-gemma-2-2b-it", "off").go_template()
    assert '{{ if eq .Role "system" }}<bos><start_of_turn>user\n{{ .Content }}\n\n{{ else' in template


def test_thinking_off_has_the_empty_block_in_the_prompt_alone() -> None:
    off, keep = (expressed("Qwen-Qwen3-0.6B", thinking).go_template() for thinking in ("off", "keep"))
    assert (
        "{{ if $last }}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ else }}<|im_start|>assistant\n{{ end }}" in off
    )
    assert "<think>" not in keep
