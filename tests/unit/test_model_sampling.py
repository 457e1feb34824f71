"""The sampling that goes into generation_config.json and the Modelfile."""

from typing import Any

import pytest

from common.export.model_sampling import export_sampling, settings_in

QWEN = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}  # as Qwen3's folder has it
GEMMA = {"top_k": 64, "top_p": 0.95}
LLAMA = {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("kind", "thinking", "given", "result"),
    [
        ("qwen3", "keep", QWEN, QWEN),
        ("qwen3", "off", QWEN, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}),
        ("qwen3", "off", {}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}),
        ("qwen3", "off", QWEN | {"temperature": 0.5}, QWEN | {"temperature": 0.5}),  # somebody's own choice
        ("qwen3_5_text", "keep", {}, {"temperature": 1.0, "top_k": 20, "top_p": 0.95}),
        ("gemma3_text", "off", GEMMA, GEMMA | {"temperature": 1.0}),
        ("gemma3_text", "keep", {}, GEMMA | {"temperature": 1.0}),
        ("gemma4_text", "off", {}, GEMMA | {"temperature": 1.0}),
        ("smollm3", "off", {}, {"temperature": 0.6, "top_p": 0.95}),
        ("llama", "off", LLAMA, LLAMA),
        ("llama", "off", {}, {}),
        ("qwen2", "off", {"repetition_penalty": 1.1, "eos_token_id": 3}, {"repetition_penalty": 1.1}),
    ],
)
def test_what_is_exported(kind: str, thinking: Any, given: dict[str, Any], result: dict[str, float]) -> None:
    assert export_sampling(given, kind, thinking) == result


@pytest.mark.parametrize("value", [None, "0.7", True, [1], float("nan"), float("inf"), -1, 0, 10**400])
def test_what_is_no_setting(value: Any) -> None:
    assert settings_in({"temperature": value, "top_p": 0.9}) == {"top_p": 0.9}


def test_top_k_is_a_whole_number() -> None:
    assert settings_in({"top_k": 50.5}) == {}
