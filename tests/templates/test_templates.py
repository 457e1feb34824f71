"""The label masks on real chat templates and real vocabularies: none is wrong, and none is newly refused."""

import contextlib
import dataclasses

import numpy as np
import pytest

from common.data.chat_template import ChatTemplate, Refused
from common.data.encode import Encoder, MaskingOptions
from common.data.tool_text import tools_as_text
from common.data.turn_edges import BadRow
from tests.encoding import encode
from tests.templates import report as proof
from tests.templates.conversations import CONVERSATIONS, THOUGHTS
from tests.templates.families import build, families
from tests.templates.report import LABELED, WRONG
from tests.templates.vocabularies import agreement

VOCABULARIES = sorted({family.vocabulary for family in families() if "/" not in family.vocabulary})
# What must never be missing from the report.
NAMED = {
    *("google-gemma-2-2b-it", "Gemma 3 layout", "google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"),
    *("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "Qwen-Qwen2.5-7B-Instruct"),
    *("Qwen-Qwen3-0.6B", "Qwen3.5-4B", "mistralai-Mistral-Nemo-Instruct-2407", "Mistral-Small-3.2-24B-Instruct-2506"),
    *("Mistral 7B layout", "microsoft-Phi-3.5-mini-instruct", "SmolLM2-135M-Instruct", "HuggingFaceTB-SmolLM3-3B"),
    *("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "openai-gpt-oss-120b"),
    *("ibm-granite-granite-3.3-2B-Instruct", "ibm-granite-granite-4.0", "ibm-granite-granite-4.1", "ChatML"),
    *("LFM2.5-Instruct", "Qwen3.6", "Qwen3.8"),
}
# Of those that are labeled at all.
TAKE_NO_TOOLS = {
    *("HuggingFaceTB-SmolLM3-3B", "SmolLM2-135M-Instruct", "google-gemma-2-2b-it", "Gemma 3 layout", "ChatML"),
    *("Mistral 7B layout", "microsoft-Phi-3.5-mini-instruct", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"),
    *("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1", "llama-cpp-deepseek-r1"),
}
PLAIN = ("single", "multi", "system", "japanese")
# Every other template of the folder is labeled in all four plain conversations. Those that are not: the prompt has
# words that no stored turn has (Apriel-1.6, command-r-plus, firefunction's functions), or no token ends a turn.
NOT_LABELED = {
    "Apriel-1.6-15b-Thinker-fixed",
    "Cohere2MoE",
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "fireworks-ai-llama-3-firefunction-v2",
    "llama-cpp-rwkv-world",
}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, proof.Verdict]]:
    found = proof.run()
    proof.show(found)
    return {family.name: row for family, row in found.items()}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_gives_llama_cpps_own_ids(name):
    equal, every = agreement(name)
    assert equal == every >= 46


def test_no_labels_are_wrong(verdicts):
    assert {
        (name, row): verdict.why
        for name, rows in verdicts.items()
        for row, verdict in rows.items()
        if verdict.outcome == WRONG
    } == {}


def test_the_same_templates_are_labeled_as_before(verdicts):
    assert set(verdicts) >= NAMED
    assert {name for name, rows in verdicts.items() if {rows[plain].outcome for plain in PLAIN} != {LABELED}} == (
        NOT_LABELED
    )
    assert not NAMED & NOT_LABELED


def test_tools_are_labeled_as_text_where_a_template_takes_none():
    row = next(row for row in CONVERSATIONS if row.source == "tools")
    tokenizers = {family.name: build(family) for family in families() if family.name in TAKE_NO_TOOLS}
    assert not any(ChatTemplate(tokenizer, "off").takes_tools for tokenizer in tokenizers.values())
    found = {name: proof.judge(tools_as_text(row), tokenizer).outcome for name, tokenizer in tokenizers.items()}
    assert found == dict.fromkeys(TAKE_NO_TOOLS, LABELED)


@pytest.mark.parametrize("think", [True, False])
def test_a_row_is_rendered_as_apply_chat_template_renders_it(think):
    for family in families():
        tokenizer = build(family)
        template = ChatTemplate(tokenizer, "keep")
        given = {"enable_thinking": think, "thinking": think, "tokenize": False}
        given["chat_template"] = proof._TODAY.sub(proof._day, template.source)
        for row in CONVERSATIONS:
            messages = [{"name": None, **message} for message in row.messages]
            tools = list(row.tools) or template._no_tools
            named = [
                message | dict.fromkeys(("reasoning", "thinking"), message.get("reasoning_content"))
                for message in messages
            ]
            for prompt in (False, True):
                with contextlib.suppress(Refused):
                    text = template.render(messages, row.tools, prompt, think)
                    assert text == tokenizer.apply_chat_template(
                        named, tools, add_generation_prompt=prompt, date_string="26 Jul 2024", **given
                    ), (family.name, row.source)


def test_spans_without_offsets_are_those_by_offsets():
    quick = set()
    for family in families():
        encoder = Encoder(build(family), MaskingOptions())
        for row in CONVERSATIONS:
            with contextlib.suppress(BadRow):
                located = encoder.locate_turns(row)
                (tokens,) = encoder._text.tokens([located.text])
                turns = [(turn.start, turn.stop, turn.end) for turn in located.turns]
                if spans := encoder._text._by_special_tokens(tokens, turns):
                    assert spans == encoder._text._by_offsets(tokens, turns), (family.name, row.source)
                    quick.add(family.name)
    assert quick >= {"google-gemma-2-2b-it", "Gemma 3 layout", "openai-gpt-oss-120b", "Qwen-Qwen3-0.6B"}


def _mutants(mask):
    """Wrong masks, each by what is wrong with it."""
    starts = np.flatnonzero(mask & ~np.append(False, mask[:-1]))
    stops = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
    for name, where, value in (
        ("no end of turn", stops[0] - 1, False),
        ("no end of the last turn", stops[-1] - 1, False),
        ("the end of the header", slice(starts[1] - 2, starts[1]), True),
        ("the token after the end, and the next header", slice(stops[0], stops[0] + 2), True),
        ("the first token missing", starts[1], False),
        ("a turn missing", slice(starts[1], stops[1]), False),
        ("two turns as one", slice(starts[0], stops[1]), True),
        ("a hole in the answer", starts[0] + 1, False),
        ("everything", slice(None), True),
    ):
        wrong = mask.copy()
        wrong[where] = value
        yield name, wrong


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "Gemma 3 layout", "Mistral 7B layout", "Qwen-Qwen3-0.6B"])
def test_the_proof_finds_every_wrong_mask(name):
    tokenizer = build(next(family for family in families() if family.name == name))
    row = next(row for row in CONVERSATIONS if row.source == "multi")
    encoded = encode(row, tokenizer)
    assert proof.find_fault(row, tokenizer, encoded) == ""
    for fault, mask in _mutants(encoded.mask):
        assert proof.find_fault(row, tokenizer, dataclasses.replace(encoded, loss_weights=mask)), fault


def test_the_proof_finds_labels_on_the_users_copy_of_an_answer():
    tokenizer = build(next(family for family in families() if family.name == "Qwen-Qwen2.5-7B-Instruct"))
    row = next(row for row in CONVERSATIONS if row.source == "repeats")
    encoded = encode(row, tokenizer)
    ids = encoded.ids.tolist()
    first = int(np.argmax(encoded.mask))
    length = int(np.flatnonzero(~encoded.mask[first:])[0])
    copies = [i for i in range(len(ids)) if ids[i : i + length] == ids[first : first + length]]
    assert len(copies) == 3, "the answer twice, and the user's own words between"
    mask = encoded.mask.copy()
    mask[copies[2] : copies[2] + length], mask[copies[1] : copies[1] + length] = False, True
    assert "the user's text" in proof.find_fault(row, tokenizer, dataclasses.replace(encoded, loss_weights=mask))


def test_the_proof_finds_a_second_bos():
    tokenizer = build(next(family for family in families() if family.name == "Gemma 3 layout"))
    row = CONVERSATIONS[0]
    encoded = encode(row, tokenizer)
    ids = np.append(np.int32(tokenizer.bos_token_id), encoded.ids)
    doubled = dataclasses.replace(encoded, ids=ids, loss_weights=np.append(False, encoded.mask))
    assert proof.find_fault(row, tokenizer, doubled)


@pytest.mark.parametrize("source", ["reasoning", "think text"])
def test_with_thinking_kept_a_turn_is_trained_with_its_reasoning_or_not_at_all(source):
    row = next(row for row in CONVERSATIONS if row.source == source)
    found = {}
    for family in families():
        encoder = Encoder(build(family), MaskingOptions(thinking="keep"))
        with contextlib.suppress(BadRow):
            _, located, _ = encoder.encode_chat(row)
            trained = encoder.trained(row, located)
            texts = {turn.message: located.text[turn.start : turn.stop] for turn in located.turns}
            assert all(THOUGHTS[number // 2] in texts[number] for number in trained), family.name
            assert len(row.messages) - 1 in trained
            found[family.name] = texts
    assert found.keys() >= NAMED
    for name in ("google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"):
        assert found[name][3].startswith(f"<|channel>thought\n{THOUGHTS[1]}")


@pytest.mark.parametrize(("name", "kept"), [("Qwen3.6", False), ("Qwen3.8", True)])
def test_qwen_3_6_and_3_8_are_trained_on_the_reasoning_that_their_prompts_keep(name, kept):
    row = next(row for row in CONVERSATIONS if row.source == "reasoning")
    tokenizer = build(next(family for family in families() if family.name == name))
    encoded = encode(row, tokenizer, MaskingOptions(thinking="keep"))
    text = tokenizer.decode(encoded.ids)
    first = "The sum of two twos is wanted."
    assert (f"<think>\n{first}\n</think>" in text) == kept
    trained = tokenizer.decode(np.array(encoded.ids)[np.array(encoded.mask)])
    assert (first in trained) == kept
    assert "Records are missing here.\n</think>\n\nNobody remembers that." in trained
    assert ("Effort: xhigh." in text) == kept
    assert "Effort" not in trained
    without = tokenizer.decode(encode(row, tokenizer).ids)
    assert "Records are missing" not in without
    assert ("<think>\n\n</think>\n\nFour" in without) == kept
    assert "<think>\n\n</think>\n\nNobody" in without


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Qwen3.6", "Qwen3.8"])
def test_a_system_turn_stays_one_without_reasoning(name):
    row = next(row for row in CONVERSATIONS if row.source == "system")
    tokenizer = build(next(family for family in families() if family.name == name))
    text = tokenizer.decode(encode(row, tokenizer).ids)
    assert text.startswith(f"<|im_start|>system\n{row.messages[0]['content']}<|im_end|>\n")
