"""Each chat template with the vocabulary it is tried on: the family's own where llama.cpp's source has it."""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from common.data.encode import load_tokenizer
from common.models.resolve import resolve
from tests.templates.vocabularies import models_folder, tokenizer
from tests.tiny import CHATML

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Gemma 3's layout: the system text goes before the first user's, roles alternate.
GEMMA3 = (
    "{{ bos_token }}{% set ns = namespace(head='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.head = m['content'] | trim + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + ns.head }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% set ns.head = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Mistral 7B Instruct's first layout, in which [INST] is text and not a token.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

_LLAMA, _IM_END = ("<|begin_of_text|>", "<|eot_id|>"), "<|im_end|>"
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_COHERE = ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>")
_GRANITE = ("<|end_of_text|>", "<|end_of_text|>")
_MINIMAX = "]~b] [e~[ ]~!b[ <minimax:tool_call> </minimax:tool_call> <mm:think> </mm:think> ]<]minimax[>["
_SEED = "<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call> </seed:tool_call>"
_LAGUNA = "〈|EOS|〉 <assistant> </assistant> <user> </user> <system> </system>"
_HY = "begin_of_sentence eos User Assistant"

# Start of the template's name, vocabulary, whether it is the family's own, bos, eos, tokens its text does not betray.
_TABLE: tuple[tuple[str, str, bool, str | None, str, str], ...] = (
    ("Apertus", "llama-bpe", False, "<s>", "<|assistant_end|>", ""),
    ("Apriel-1.6", "llama-bpe", False, "<s>", "<|end|>", ""),
    ("Bielik", "llama-spm", False, "<s>", _IM_END, ""),
    ("ByteDance-Seed", "qwen2", False, "<seed:bos>", "<seed:eos>", _SEED),
    ("Cohere2MoE", "command-r", False, *_COHERE, ""),
    ("CohereForAI-c4ai-command-r-plus", "command-r", True, *_COHERE, ""),
    ("CohereForAI-c4ai-command-r7b", "command-r", False, *_COHERE, ""),
    ("GLM", "llama-bpe", False, None, "<|endoftext|>", "[gMASK]"),
    ("GigaChat", "llama-bpe", False, "<s>", "</s>", ""),
    ("HuggingFaceTB-SmolLM3", "llama-bpe", True, None, _IM_END, ""),
    ("Kimi-K3", "llama-bpe", False, "[BOS]", "<|end_of_msg|>", ""),
    ("Kimi", "llama-bpe", False, "[BOS]", _IM_END, ""),
    ("LFM2", "llama-bpe", False, "<|startoftext|>", _IM_END, ""),
    ("MiMo", "qwen2", False, None, _IM_END, ""),
    ("MiniMax-M1", "llama-bpe", False, "<beginning_of_sentence>", "<end_of_sentence>", ""),
    ("MiniMax", "llama-bpe", False, "]~!b[", "[e~[", _MINIMAX),
    ("Mistral-Small-3.2", "llama-bpe", False, "<s>", "</s>", ""),
    ("NVIDIA-Nemotron-3", "llama-bpe", False, "<s>", _IM_END, ""),
    ("NVIDIA-Nemotron-Nano-v2", "llama-bpe", False, "<s>", "<SPECIAL_12>", "<SPECIAL_10> <SPECIAL_11>"),
    ("NousResearch-Hermes", "llama-bpe", True, _LLAMA[0], _IM_END, ""),
    ("Qwen3.5", "qwen35", True, None, _IM_END, ""),
    ("Qwen", "qwen2", True, None, _IM_END, ""),
    ("Reka-Edge", "llama-bpe", False, None, "<sep>", ""),
    ("Spark2.5", "llama-bpe", False, "<｜start▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ""),
    ("StepFun", "deepseek-llm", False, _DEEPSEEK[0], _IM_END, ""),
    ("deepseek-ai-DeepSeek-R1-Distill-Llama", "llama-bpe", True, *_DEEPSEEK, ""),
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen", "qwen2", True, *_DEEPSEEK, ""),
    ("deepseek-ai-DeepSeek", "deepseek-llm", False, *_DEEPSEEK, ""),
    ("fireworks-ai-llama-3", "llama-bpe", True, *_LLAMA, ""),
    ("google-gemma-2", "gemma-4", False, "<bos>", "<eos>", ""),
    ("google-gemma-4", "gemma-4", True, "<bos>", "<turn|>", ""),
    ("ibm-granite-granite-3", "starcoder", False, *_GRANITE, ""),
    ("ibm-granite-granite-4", "llama-bpe", False, *_GRANITE, ""),
    ("inclusionai-ling", "llama-bpe", False, "<|startoftext|>", "<|role_end|>", "<role> </role>"),
    ("llama-cpp-deepseek-r1", "deepseek-llm", False, *_DEEPSEEK, ""),
    ("llama-cpp-rwkv", "llama-bpe", False, "<s>", "</s>", ""),
    ("meetkai-functionary", "llama-bpe", True, *_LLAMA, ""),
    ("meta-llama", "llama-bpe", True, *_LLAMA, ""),
    ("microsoft-Phi-3.5", "phi-3", True, "<s>", "<|endoftext|>", ""),
    ("mistralai", "llama-bpe", False, "<s>", "</s>", ""),
    ("moonshotai-Kimi", "llama-bpe", False, "[BOS]", _IM_END, ""),
    ("muse-glimmer", "llama-bpe", False, "<|begin|>", "<|eot|>", ""),
    ("openai-gpt-oss", "llama-bpe", False, "<|startoftext|>", "<|return|>", ""),
    ("openbmb-MiniCPM5", "llama-bpe", False, "<s>", _IM_END, ""),
    ("poolside-Laguna", "llama-bpe", False, "〈|EOS|〉", "</assistant>", _LAGUNA),
    ("tencent-Hy3", "llama-bpe", False, None, "<｜hy_eos:opensource｜>", _HY),
    ("unsloth-Apriel", "llama-bpe", False, "<s>", "</s>", ""),
    ("unsloth-mistral", "llama-bpe", False, "<s>", "</s>", ""),
    ("upstage-Solar", "llama-bpe", False, "<s>", "<|end|>", ""),
)
# What matters to labels in the templates of Qwen3.6 and 3.8, as changes of Qwen3.5's, which llama.cpp's source has.
# The first keeps the reasoning of earlier turns where `preserve_thinking` says so; the second keeps it unless that is
# false, and tells the model in the system turn how much to reason (here in words of this test). Source: the hub's.
_LAST_TURN = "{%- if loop.index0 > ns.last_query_index %}"
_KEPT = "{{%- if preserve_thinking is {} preserve_thinking is true or loop.index0 > ns.last_query_index %}}"
_SYSTEM = "{{- '<|im_start|>system\\n' + content + '<|im_end|>\\n' }}"
_QWEN_3_6 = {
    _LAST_TURN: _KEPT.format("defined and"),
    "args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not string)"
    " else args_value | string": "args_value | string if args_value is string else args_value | tojson | safe",
}
_QWEN_3_8 = _QWEN_3_6 | {
    _LAST_TURN: _KEPT.format("undefined or"),
    "{%- if tools and": "{%- set effort = '' %}{%- if enable_thinking is undefined or enable_thinking is true %}"
    "{%- set effort = 'Effort: ' + reasoning_effort|default('xhigh') + '.' %}{%- endif %}{%- if tools and",
    '{{- "# Tools': '{{- effort + "\\n\\n" if effort }}{{- "# Tools',
    _SYSTEM: "{{- '<|im_start|>system\\n' + (effort + '\\n\\n' if effort else '') + content + '<|im_end|>\\n' }}"
    "{%- elif effort %}{{- '<|im_start|>system\\n' + effort + '<|im_end|>\\n' }}",
}
_SPECIAL = re.compile(
    r"<\|[^<>{}'\"\s|]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜(?:start|begin|end)[^<>{}'\"\s｜]*｜>|\[/?[A-Z_]{3,}\]"
    r"|<(?:start|end|begin|beginning)_of_[a-z]+>|<sep>|<sop>"
)
# Tokens that are no special ones, in Qwen's and DeepSeek's vocabularies too: decoding does not drop them.
_PLAIN = re.compile(r"<｜[^<>{}'\"\s｜]+｜>|</?(?:think|tool_call|tool_response)>")


@dataclass(frozen=True)
class Family:
    """A chat template and the tokenizer it is tried on; `own` says whether the vocabulary is the family's."""

    name: str
    template: str
    vocabulary: str
    own: bool
    bos: str | None
    eos: str | None
    more: tuple[str, ...] = ()


@cache
def families() -> tuple[Family, ...]:
    """Every file of llama.cpp's `models/templates`, then six layouts that it does not hold."""
    found = []
    for path in sorted((models_folder() / "templates").glob("*.jinja")):
        rows = [row for row in _TABLE if path.stem.startswith(row[0])]
        assert rows, f"{path.name} is new: give it a vocabulary in this table"
        _, vocabulary, own, bos, eos, more = rows[0]
        words = more.split()
        if more == _HY:  # the template puts its names together
            words = [f"<｜hy_{word}:opensource｜>" for word in words] + ["<think:opensource>", "</think:opensource>"]
        found.append(Family(path.stem, path.read_text(encoding="utf-8"), vocabulary, own, bos, eos, tuple(words)))
    (qwen,) = (family for family in found if family.name.startswith("Qwen3.5"))
    return (
        *found,
        replace(qwen, name="Qwen3.6", template=_changed(qwen.template, _QWEN_3_6)),
        replace(qwen, name="Qwen3.8", template=_changed(qwen.template, _QWEN_3_8)),
        Family("ChatML", CHATML, "qwen2", True, None, _IM_END),
        Family("Gemma 3 layout", GEMMA3, "gemma-4", False, "<bos>", "<eos>"),
        Family("Mistral 7B layout", MISTRAL, "llama-spm", True, "<s>", "</s>", ()),
        Family("SmolLM2-135M-Instruct", "", SMOLLM2, True, None, None),
    )


def _changed(template: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert template.count(old) == 1, f"llama.cpp's template of Qwen3.5 has another text than {old}"
        template = template.replace(old, new)
    return template


@cache
def build(family: Family) -> Any:
    """The family's tokenizer, its chat template in it."""
    if family.vocabulary == SMOLLM2:
        return load_tokenizer(resolve(SMOLLM2, lambda text: None).path)
    text = family.template if family.template != MISTRAL else ""
    ends = [token for token in (family.bos, family.eos) if token]
    special = [*ends, *_SPECIAL.findall(text), *family.more]
    plain = [token for token in _PLAIN.findall(text) if token not in special]
    fast = tokenizer(family.vocabulary, special, plain, bos_token=family.bos, eos_token=family.eos)
    fast.chat_template = family.template
    return fast


def standing_in(family: Family) -> str:
    """The vocabulary's name for the report, with a note where it is another family's."""
    name = family.vocabulary.rpartition("/")[2]
    return name if family.own else f"{name} (stands in)"
