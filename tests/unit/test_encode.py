"""Which tokens carry loss, by hand-written lists. The tokenizer knows bytes only: a letter is a token."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from common.data import tokens as tokens_module
from common.data.chat_template import ChatTemplate
from common.data.dataset import Example
from common.data.encode import (
    Encoded,
    Encoder,
    MaskingOptions,
    load_tokenizer,
    own_templates,
    template_hash,
)
from common.data.encoded_rows import EncodedRows, rows_hash, stop_ids
from common.data.turn_edges import BadRow
from common.errors import UserError
from tests.encoding import encode
from tests.tiny import CHATML, SPECIAL

START, END = "<|im_start|>", "<|im_end|>"
NEWLINE, SPACE = "Ċ", "Ġ"  # as byte-level tokens are written


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    """A new one each time: tests change its template."""
    return load_tokenizer(tokenizer_folder)


def example(*pairs: tuple[str, str]) -> Example:
    return Example(tuple({"role": role, "content": content} for role, content in pairs), "train.jsonl:17")


def tokens(encoded: Encoded, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(encoded.ids.tolist())


def labels(encoded: Encoded, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(encoded.ids[encoded.mask].tolist())


def fault(row: Example, tokenizer: Any) -> str:
    with pytest.raises(UserError) as caught:
        encode(row, tokenizer)
    return caught.value.what


# --- exact masks


def test_every_token_and_its_label_of_one_answer(tokenizer: Any) -> None:
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert tokens(encoded, tokenizer) == [
        *[START, "u", "s", "e", "r", NEWLINE, "H", "i", END, NEWLINE],
        *[START, "a", "s", "s", "i", "s", "t", "a", "n", "t", NEWLINE, "Y", "o", END, NEWLINE],
    ]
    assert encoded.mask.tolist() == [False] * 21 + [True, True, True, False]
    assert (encoded.ids.dtype, encoded.source, encoded.label_tokens) == (np.int32, "train.jsonl:17", 3)


def test_weights_of_row_and_turn_are_multiplied(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "A"), ("user", "Hi"), ("assistant", "B"), ("assistant", "C"))
    row.messages[1]["weight"] = 0.5
    row.messages[4]["train"] = False
    row = replace(row, weight=0.2)
    encoded = encode(row, tokenizer)
    assert encoded.loss_weights.dtype == np.float32
    assert labels(encoded, tokenizer) == ["A", END, "B", END]
    assert encoded.loss_weights[encoded.mask].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2])
    everything = encode(row, tokenizer, MaskingOptions(train_on="all"))
    assert set(everything.loss_weights.round(3).tolist()) == {np.float32(0.1), np.float32(0.2), 0.0}
    assert everything.loss_weights[0] == np.float32(0.2)
    last = encode(replace(row, messages=row.messages[:4]), tokenizer, MaskingOptions(train_on="last"))
    assert labels(last, tokenizer) == ["B", END]
    text = encode(Example((), "x:1", text="Hi", weight=0.5), tokenizer)
    assert text.loss_weights.tolist() == [0.5] * 3


def test_rows_of_weight_1_keep_a_mask_of_bytes(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"))
    assert encode(row, tokenizer).loss_weights.dtype == bool
    assert encode(Example((), "x:1", text="Hi"), tokenizer).loss_weights.dtype == bool


def test_the_hash_of_the_rows_sees_ids_weights_order_and_part(tokenizer: Any) -> None:
    one, two = (encode(example(("user", "Hi"), ("assistant", answer)), tokenizer) for answer in "AB")
    ones = replace(one, loss_weights=one.loss_weights.astype(np.float32))
    parts = [
        ([one, two], []),
        ([two, one], []),
        ([one], [two]),
        ([one, replace(two, loss_weights=two.loss_weights / 2)], []),
    ]
    assert len({rows_hash(*part) for part in parts}) == 4
    assert rows_hash([ones, replace(two, source="elsewhere")], []) == rows_hash(*parts[0])


def test_the_hash_of_the_rows_of_version_2_is_what_it_was() -> None:
    ids = np.arange(4, dtype=np.int32)
    train = [Encoded(ids, ids > 1, "a:1"), Encoded(ids, np.array([0, 0.5, 1, 1], np.float32), "a:2")]
    parts = train, [Encoded(ids[:2], ids[:2] > 0, "b:1")]
    assert rows_hash(*parts, version=2) == "18a4211b30821874be1ef97c7b1ff4a3fbdb31e35ffd8c047d915bf09b66cd7e"
    assert rows_hash(*parts, version=3) != rows_hash(*parts, version=2)


def test_every_answer_of_several_turns_is_labeled_and_nothing_else(tokenizer: Any) -> None:
    row = example(
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No way")
    )
    assert labels(encode(row, tokenizer), tokenizer) == ["Y", "o", END, "N", "o", SPACE, "w", "a", "y", END]


def test_the_turns_end_is_labeled_and_the_newline_after_it_is_not(tokenizer: Any) -> None:
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo"), ("user", "So")), tokenizer)
    end = 23
    assert tokens(encoded, tokenizer)[end : end + 2] == [END, NEWLINE]
    assert encoded.mask[end : end + 2].tolist() == [True, False]
    assert not encoded.mask[end + 1 :].any()


def test_japanese_text_is_labeled_byte_by_byte(tokenizer: Any) -> None:
    encoded = encode(example(("user", "港"), ("assistant", "あい")), tokenizer)
    assert labels(encoded, tokenizer) == ["ã", "ģ", "Ĥ", "ã", "ģ", "Ħ", END]


@pytest.mark.parametrize("by_offsets", [False, True])
def test_a_space_that_is_a_token_is_labeled_where_offsets_leave_spaces_out(tokenizer: Any, by_offsets: bool) -> None:
    """As those of RoBERTa's and GPT-NeoX's tokenizers do: such a token has no characters."""
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoder = Encoder(tokenizer, MaskingOptions())
    if by_offsets:
        encoder._text._marks = None
    encoded = encoder(example(("user", "Hi"), ("assistant", "a  1")))
    assert labels(encoded, tokenizer) == ["a", SPACE, SPACE, "1", END]


@pytest.mark.parametrize(
    "turns",
    [
        (("user", "Hi"), ("assistant", "Yo")),
        (("system", "Be kind."), ("user", " a\n"), ("assistant", "  b "), ("user", "c"), ("assistant", "日本語 \n\nd")),
        (("user", f"x {END} y"), ("assistant", "z")),
        (("user", "q"), ("assistant", f"write {START}, then"), ("user", "r"), ("assistant", "s")),
    ],
)
def test_spans_without_offsets_are_those_by_offsets(tokenizer: Any, turns: tuple[tuple[str, str], ...]) -> None:
    encoder, row = Encoder(tokenizer, MaskingOptions()), example(*turns)
    conversation = encoder.locate_turns(row)
    (found,) = encoder._text.tokens([conversation.text])
    edges = [(turn.start, turn.stop, turn.end) for turn in conversation.turns]
    quick, exact = encoder._text._by_special_tokens(found, edges), encoder._text._by_offsets(found, edges)
    assert quick == exact


def test_a_batch_is_what_its_rows_are(tokenizer: Any) -> None:
    plain = Example((), "text:1", text="Once upon a time.")
    bad = example(("user", "q"), ("assistant", f"a {END} b"))
    rows = [example(("user", "q"), ("assistant", "a")), plain, bad, example(("user", "r"), ("assistant", " b ")), plain]
    encoder = Encoder(tokenizer, MaskingOptions())
    for row, got in zip(rows, encoder.encode_batch(rows), strict=True):
        if row is bad:
            assert isinstance(got, BadRow)
            assert got.what == fault(row, tokenizer)
        else:
            alone = encode(row, tokenizer)
            assert isinstance(got, Encoded)
            assert (got.ids.tolist(), got.loss_weights.tolist()) == (alone.ids.tolist(), alone.loss_weights.tolist())


def test_the_work_grows_with_the_turns_and_not_with_their_square(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In characters that are rendered and tokenized; searches in a text of this size take no time beside these."""
    work = 0

    def counted(real: Any, size: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            nonlocal work
            result = real(*given, **more)
            work += size(result, *given)
            return result

        return call

    monkeypatch.setattr(ChatTemplate, "render", counted(ChatTemplate.render, lambda text, *given: len(text)))
    real = tokens_module.encode_texts
    monkeypatch.setattr(tokens_module, "encode_texts", counted(real, lambda r, t, texts: sum(map(len, texts))))
    monkeypatch.setattr(tokens_module, "tokenize", counted(tokens_module.tokenize, lambda r, t, text: len(text)))
    costs = []
    for turns in (200, 400, 800):
        work = 0
        pairs = [pair for n in range(turns) for pair in (("user", f"Question {n}"), ("assistant", f"Answer {n}."))]
        encode(example(*pairs), tokenizer)
        costs.append(work)
    assert costs[0] < costs[1] < 2.5 * costs[0]
    assert costs[2] < 2.5 * costs[1]


def test_spaces_around_an_answer_are_part_of_it(tokenizer: Any) -> None:
    encoded = encode(example(("user", "Hi"), ("assistant", " Yo\n")), tokenizer)
    assert labels(encoded, tokenizer) == [SPACE, "Y", "o", NEWLINE, END]


def test_an_answer_that_repeats_the_prompt_is_labeled_where_it_stands(tokenizer: Any) -> None:
    encoded = encode(example(("user", "assistant"), ("assistant", "assistant")), tokenizer)
    assert labels(encoded, tokenizer) == [*"assistant", END]
    assert encoded.mask[-11:].tolist() == [True] * 10 + [False]


def test_a_template_that_trims_the_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | trim")
    encoded = encode(example(("user", "Hi"), ("assistant", "\n Yo \n")), tokenizer)
    assert labels(encoded, tokenizer) == ["Y", "o", END]


def test_a_template_without_an_end_token_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    said = fault(example(("user", "Hi"), ("assistant", "Yo"), ("user", "So")), tokenizer)
    assert said.endswith("the template ends a turn with no special token, so the model would never stop.")


# --- thinking

THINKING = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'")


def test_an_empty_thinking_block_of_the_prompt_stays_unlabeled(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING.replace(
        "m['content'] +", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content'] +"
    )
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert "".join(tokens(encoded, tokenizer)).count("<think>") == 1
    assert labels(encoded, tokenizer) == ["Y", "o", END]


def test_an_empty_thinking_block_beside_a_plain_prompt_stays_unlabeled(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace(
        "m['content'] +", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content'] +"
    )
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert labels(encoded, tokenizer) == ["Y", "o", END]


def test_several_turns_where_the_last_alone_gets_a_thinking_block(tokenizer: Any) -> None:
    # as Qwen3's template does
    tokenizer.chat_template = THINKING.replace(
        "m['content'] +",
        "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '') + m['content'] +",
    )
    row = example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No"))
    assert labels(encode(row, tokenizer), tokenizer) == ["Y", "o", END, "N", "o", END]


KEEP = MaskingOptions(thinking="keep")
LEFT_OUT = "reasoning of earlier turns left out by the template: these turns are not trained"


def reasoning_row(*turns: tuple[str, str, str]) -> Example:
    """Of (role, content, reasoning)."""
    messages = [{"role": role, "content": content} for role, content, _ in turns]
    for message, (_, _, reasoning) in zip(messages, turns, strict=True):
        if reasoning:
            message["reasoning_content"] = reasoning
    return Example(tuple(messages), "train.jsonl:17")


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_turn_whose_reasoning_the_template_drops_is_not_trained(tokenizer: Any, train_on: Any) -> None:
    tokenizer.chat_template = SWITCH
    row = reasoning_row(("user", "Hi", ""), ("assistant", "Yo", "Hm"), ("user", "So", ""), ("assistant", "No", "Oh"))
    encoded = encode(row, tokenizer, replace(KEEP, train_on=train_on))
    assert "<|im_start|>assistant\nYo<|im_end|>" in said(encoded, tokenizer, labeled=False)
    assert "Yo" not in said(encoded, tokenizer)
    assert said(encoded, tokenizer).endswith("<think>\nOh\n</think>\n\nNo<|im_end|>" + "\n" * (train_on == "all"))
    assert encoded.notes == (LEFT_OUT,)
    assert len(encoded.ends) == 1


def test_a_dropped_turn_is_the_same_one_where_the_system_text_is_folded(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No') }}{% endif %}" + SWITCH
    row = reasoning_row(
        *(("system", "Be", ""), ("user", "Hi", ""), ("assistant", "Yo", "Hm")),
        *(("user", "So", ""), ("assistant", "No", "Oh")),
    )
    encoded = encode(row, tokenizer, KEEP)
    assert said(encoded, tokenizer) == "<think>\nOh\n</think>\n\nNo<|im_end|>"
    assert encoded.notes == (LEFT_OUT, "system text put into the first user turn")


def test_the_thinking_block_of_an_earlier_turn_is_labeled_from_its_tag_on(tokenizer: Any) -> None:
    """As Qwen3's template writes the reasoning before a call, and an empty block before the answer to its result."""
    tokenizer.chat_template = SWITCH.replace("m.reasoning_content and loop.last", "m.reasoning_content").replace(
        "else '')", "else '<think>\n\n</think>\n\n' if m.role == 'assistant' else '')"
    )
    row = reasoning_row(("user", "Hi", ""), ("assistant", "Yo", "Hm"), ("user", "So", ""), ("assistant", "No", ""))
    encoded = encode(row, tokenizer, KEEP)
    assert said(encoded, tokenizer) == "<think>\nHm\n</think>\n\nYo<|im_end|>No<|im_end|>"
    assert "assistant\n<think>\n\n</think>\n\nNo" in said(encoded, tokenizer, labeled=False)


def test_a_block_that_the_prompt_opens_is_closed_before_a_last_answer_without_reasoning(tokenizer: Any) -> None:
    """As under poolside's Laguna, whose system turn says whether to reason: thinking is on for the whole row."""
    tokenizer.chat_template = (
        "{{ '<|im_start|>system\nReason: ' + enable_thinking | string + '<|im_end|>\n' }}"
        + CHATML.replace(
            "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + ('<think>' if enable_thinking else '')"
        ).replace(
            "m['content'] +",
            "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m['content'] +",
        )
    )
    row = reasoning_row(("user", "Hi", ""), ("assistant", "Yo", "Hm"), ("user", "So", ""), ("assistant", "No", ""))
    encoded = encode(row, tokenizer, KEEP)
    assert said(encoded, tokenizer) == "Hm</think>Yo<|im_end|>No<|im_end|>"
    assert "assistant\n<think>\n</think>\n\nNo" in said(encoded, tokenizer, labeled=False)


def test_reasoning_of_every_turn_stands_in_its_answer_where_the_template_has_no_field(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    answers = "<think>\nHm\n</think>\n\nYo", "<think>\nOh\n</think>\n\nNo"
    row = example(("user", "Hi"), ("assistant", answers[0]), ("user", "So"), ("assistant", answers[1]), ("user", "Bye"))
    encoded = encode(row, tokenizer, KEEP)
    assert said(encoded, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert encoded.notes == ()


@pytest.mark.parametrize("line", ["", "\n"])
def test_reasoning_stands_in_the_tags_that_the_template_writes_before_calls(tokenizer: Any, line: str) -> None:
    """As Gemma 4's do, in two versions, which write no reasoning before answers."""
    block = f"'<|channel>thought\n' + m.reasoning_content + '{line}<channel|>'"
    tokenizer.chat_template = CHATML.replace(
        "m['content'] +", f"({block} if m.reasoning_content and m.tool_calls else '') + m['content'] +"
    )
    encoded = encode(thoughtful("in the answer"), tokenizer, KEEP)
    assert said(encoded, tokenizer) == f"<|channel>thought\nHm{line}<channel|>Yo<|im_end|>"
    row = reasoning_row(("user", "Hi", ""), ("assistant", "Yo", "Hm"), ("user", "So", ""), ("assistant", "No", ""))
    encoded = encode(row, tokenizer, KEEP)
    assert (said(encoded, tokenizer), encoded.notes) == ("No<|im_end|>", (LEFT_OUT,))


def test_a_closing_tag_alone_ends_reasoning_only_where_the_template_has_such_tags(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "Close it with\n</think>\nand go on."))
    encoded = encode(row, tokenizer)
    assert (said(encoded, tokenizer), encoded.notes) == (f"Close it with\n</think>\nand go on.{END}", ())
    tokenizer.chat_template = OPEN
    encoded = encode(row, tokenizer)
    assert said(encoded, tokenizer) == f"and go on.{END}"
    assert encoded.notes == ("reasoning left out (--thinking off)",)


# --- what cannot be labeled


def test_a_template_that_renders_an_old_turn_differently_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    said = fault(example(("user", "Hi"), ("assistant", "Yo"), ("user", "So"), ("assistant", "No")), tokenizer)
    assert said.startswith("train.jsonl:17: this row cannot be labeled exactly: turn 2 renders differently")


def test_a_template_that_changes_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    said = fault(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert said == (
        "train.jsonl:17: this row cannot be labeled exactly: the template leaves out or changes the answer of turn 2."
    )
    tokenizer.chat_template = CHATML.replace(
        "m['content']", "(m['content'] | upper if m['role'] == 'assistant' else m['content'])"
    )
    said = fault(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert said.endswith("the template leaves out or changes the answer of turn 2.")


def test_words_before_the_answer_that_no_prompt_has_are_the_models_to_write(tokenizer: Any) -> None:
    # as gpt-oss's channels are
    tokenizer.chat_template = CHATML.replace("m['content'] +", "'Oh: ' + m['content'] +")
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert labels(encoded, tokenizer) == ["O", "h", ":", SPACE, "Y", "o", END]


def test_a_template_that_refuses_a_row_names_it(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Users first, please') }}{% endif %}" + CHATML
    )
    row = example(("assistant", "Be brief."), ("user", "Hi"), ("assistant", "Yo"))
    assert fault(row, tokenizer) == ("train.jsonl:17: the model's chat template refuses this row: Users first, please")


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn') }}{% endif %}" + CHATML
SILENT = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")


@pytest.mark.parametrize("template", [REFUSING, SILENT], ids=["refusing", "silently leaving it out"])
def test_system_text_goes_into_the_first_user_turn_where_there_is_no_such_role(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    row = example(("system", "Be"), ("user", "Hi"), ("assistant", "Yo"))
    encoded = encode(row, tokenizer)
    prompt = [START, "u", "s", "e", "r", NEWLINE, "B", "e", NEWLINE, NEWLINE, "H", "i", END, NEWLINE]
    assert tokens(encoded, tokenizer)[: len(prompt)] == prompt
    assert labels(encoded, tokenizer) == ["Y", "o", END]
    assert encoded.notes == ("system text put into the first user turn",)


def test_a_token_across_the_edge_of_an_answer_is_refused(tokenizer: Any) -> None:
    # without its newline the prompt ends in "t", and "tY" is one word to a tokenizer that merges it
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("tY", special=False)])
    tokenizer.chat_template = CHATML.replace("m['role'] + '\n'", "m['role']").replace("assistant\n", "assistant")
    said = fault(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert said.endswith("a token crosses the edge of an assistant turn.")


# --- the template itself


@pytest.mark.parametrize("format", ["'%d %b %Y'", "form", "form | trim", "'%d' ~ ' %b %Y'", "format=form"])
def test_a_row_renders_the_same_on_every_day(tokenizer: Any, format: str) -> None:
    # as Llama 3.2's template does: a run resumed tomorrow must see the same tokens
    tokenizer.chat_template = (
        "{% set form = '%d %b %Y' %}{% if not day is defined %}{% set day = strftime_now(" + format + ") %}{% endif %}"
        "{{ 'Today Date: ' + day + '\n' }}" + CHATML
    )
    text = ChatTemplate(tokenizer, "off").render([{"role": "user", "content": "Hi"}], (), False, False)
    assert text.startswith("Today Date: 26 Jul 2024\n")


def test_the_day_is_the_same_where_a_template_marks_what_it_generates(tokenizer: Any) -> None:
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    tokenizer.chat_template = "{% set form = '%d %b %Y' %}{{ strftime_now(form) }} " + marked
    template = ChatTemplate(tokenizer, "off")
    assert template.generation_spans([{"role": "user", "content": "Hi"}], (), False, "26 Jul 2024 Hi") == ((12, 14),)


def test_render_ends_in_the_prompt_when_asked(tokenizer: Any) -> None:
    messages, renderer = [{"role": "user", "content": "Hi"}], ChatTemplate(tokenizer, "off")
    assert renderer.render(messages, (), False, False) == f"{START}user\nHi{END}\n"
    assert renderer.prompt(messages, (), False) == f"{START}user\nHi{END}\n{START}assistant\n"


def test_the_template_hash_changes_with_the_template(tokenizer: Any) -> None:
    before = template_hash(tokenizer)
    tokenizer.chat_template += " "
    assert template_hash(tokenizer) != before


def test_a_tokenizer_without_a_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        encode(example(("user", "Hi"), ("assistant", "Yo")), load_tokenizer(tmp_path))
    assert caught.value.what == "train.jsonl:17: the model has no chat template, so chat rows cannot be rendered."
    assert "-it, -Instruct" in caught.value.fix
    assert "--chat-template NAME or FILE (built-in ones that fit: chatml)" in caught.value.fix


def test_a_broken_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_fast_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert f"{tmp_path}: its tokenizer (ByT5Tokenizer) is not a fast one" in caught.value.what
    assert "tokenizer.json" in caught.value.fix


# --- rows


def test_stop_ids_are_what_ends_the_answers(tokenizer: Any) -> None:
    row = encode(example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No")), tokenizer)
    assert stop_ids(EncodedRows.of([row])) == [SPECIAL.index(END)]


def test_stop_ids_come_most_frequent_first() -> None:
    mask = np.array([False, True, True, False, True])
    rows = [Encoded(np.array([9], np.int32), mask, "", ends) for ends in ((5, 7), (7, 7))]
    assert stop_ids(EncodedRows.of(rows)) == [7, 5]


# --- what carries loss


def test_only_the_last_turn_or_every_token(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No"))
    assert labels(encode(row, tokenizer, MaskingOptions(train_on="last")), tokenizer) == ["N", "o", END]
    assert encode(row, tokenizer, MaskingOptions(train_on="all")).mask.all()


def test_a_turn_that_the_row_takes_out(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No"))
    row.messages[1]["train"] = False
    encoded = encode(row, tokenizer)
    assert labels(encoded, tokenizer) == ["N", "o", END]
    assert len(encoded.ends) == 1


def test_plain_text_is_learned_whole_with_its_end(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    encoded = encode(Example((), "a.txt:1", text="Yo"), tokenizer)
    assert labels(encoded, tokenizer) == ["Y", "o", END]
    assert encoded.ends == (SPECIAL.index(END),)


# --- BOS


def test_one_bos_where_the_template_leaves_it_to_the_tokenizer(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert encoded.ids.tolist() == [0, *plain.ids.tolist()]
    assert encoded.mask.tolist() == [False, *plain.mask.tolist()]
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer).ids.tolist() == encoded.ids.tolist()


def test_two_bos_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + CHATML
    assert fault(example(("user", "Hi"), ("assistant", "Yo")), tokenizer).endswith("it starts with two BOS tokens.")


# --- a template's own marks


def test_the_templates_marks_say_what_is_generated_and_the_end_is_learned_all_the_same(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{{ 'S:' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert labels(encoded, tokenizer) == ["Y", "o", END]


# --- ends


def test_an_end_that_is_written_only_when_a_turn_follows_is_learned_in_the_last_turn_too(tokenizer: Any) -> None:
    # as Apertus's template does
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' and not loop.first %}{{ '<|endoftext|>' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No"))
    assert labels(encode(row, tokenizer), tokenizer) == ["Y", "o", SPECIAL[0], "N", "o", SPECIAL[0]]


def test_what_a_finished_conversation_has_after_the_turns_end_is_not_learned(tokenizer: Any) -> None:
    # as Phi-3's template does
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert labels(encoded, tokenizer) == ["Y", "o", END]


def test_a_history_turns_end_that_is_not_where_the_model_stops_is_not_learned(tokenizer: Any) -> None:
    # as gpt-oss's template does
    tokenizer.chat_template = CHATML.replace(
        "m['content'] + '<|im_end|>\n'",
        "m['content'] + ('<|endoftext|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>')",
    )
    row = example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No"))
    assert labels(encode(row, tokenizer), tokenizer) == ["Y", "o", "N", "o", SPECIAL[0]]


# --- thinking, kept and off

SWITCH = CHATML.replace(
    "'<|im_start|>assistant\n'",
    "'<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n\n')",
).replace(
    "m['content'] +",
    "(('<think>\n' + m.reasoning_content + '\n</think>\n\n') if m.reasoning_content and loop.last else '')"
    " + m['content'] +",
)
OPEN = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")


def thoughtful(form: str) -> Example:
    if form == "in the answer":
        return example(("user", "Hi"), ("assistant", "<think>\nHm\n</think>\n\nYo"))
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "reasoning_content": "Hm"})
    return Example(messages, "train.jsonl:17")


def said(encoded: Encoded, tokenizer: Any, labeled: bool = True) -> str:
    return tokenizer.decode(encoded.ids[encoded.mask].tolist() if labeled else encoded.ids.tolist())


@pytest.mark.parametrize("form", ["of its own", "in the answer"])
def test_thoughts_are_left_out_when_thinking_is_off(tokenizer: Any, form: str) -> None:
    tokenizer.chat_template = SWITCH
    encoded = encode(thoughtful(form), tokenizer)
    assert said(encoded, tokenizer) == "Yo<|im_end|>"
    assert "assistant\n<think>\n\n</think>\n\nYo" in said(encoded, tokenizer, labeled=False)
    assert encoded.notes == ("reasoning left out (--thinking off)",)


@pytest.mark.parametrize("form", ["of its own", "in the answer"])
def test_thoughts_are_learned_when_they_are_kept(tokenizer: Any, form: str) -> None:
    tokenizer.chat_template = SWITCH
    encoded = encode(thoughtful(form), tokenizer, MaskingOptions(thinking="keep"))
    assert said(encoded, tokenizer) == "<think>\nHm\n</think>\n\nYo<|im_end|>"


def test_a_row_without_thoughts_among_kept_ones_has_the_empty_block_in_its_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = SWITCH
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer, MaskingOptions(thinking="keep"))
    assert said(encoded, tokenizer) == "Yo<|im_end|>"
    assert "<think>\n\n</think>\n\nYo" in said(encoded, tokenizer, labeled=False)


def test_a_template_that_always_opens_a_block_gets_it_closed(tokenizer: Any) -> None:
    # as DeepSeek-R1's distills do
    tokenizer.chat_template = OPEN
    row = example(("user", "Hi"), ("assistant", "Yo"))
    encoded = encode(row, tokenizer)
    assert said(encoded, tokenizer) == "Yo<|im_end|>"
    assert "assistant\n<think>\n\n</think>\n\nYo" in said(encoded, tokenizer, labeled=False)
    kept = encode(thoughtful("of its own"), tokenizer, MaskingOptions(thinking="keep"))
    assert said(kept, tokenizer) == "Hm\n</think>\n\nYo<|im_end|>"


@pytest.mark.parametrize("template", [SWITCH, OPEN], ids=["a switch", "always open"])
def test_the_exported_template_prompts_as_training_did_whatever_the_server_asks(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    exported = ChatTemplate(tokenizer, "off").exported_template()
    messages = [{"role": "user", "content": "Hi"}]
    for settings in ({}, {"enable_thinking": True}):
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=exported, tokenize=False, add_generation_prompt=True, **settings
        )
        assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    kept = ChatTemplate(tokenizer, "keep").exported_template()
    for settings, block in (({}, template == OPEN), ({"enable_thinking": False}, True)):
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=kept, tokenize=False, add_generation_prompt=True, **settings
        )
        assert ("<think>" in prompt) == block
    tokenizer.chat_template = exported  # of a fused model that is trained again
    assert ChatTemplate(tokenizer, "keep").exported_template() == kept


# --- tools

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Tokyo"}}}
TOOLS = "{{ tools | tojson if tools else '' }}" + CHATML.replace(
    "m['content'] +",
    "m['content'] + (m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson)"
    " if m.tool_calls else '') +",
)


def calling() -> Example:
    messages = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "Yo"},
    )
    return Example(messages, "train.jsonl:17", ({"type": "function", "function": {"name": "weather"}},))


def test_a_tool_call_is_learned_and_its_result_is_not(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    assert said(encode(calling(), tokenizer), tokenizer) == 'weather{"city": "Tokyo"}<|im_end|>Yo<|im_end|>'


def test_a_template_that_leaves_tool_calls_out_is_refused(tokenizer: Any) -> None:
    assert "the template leaves out the row's tools" in fault(calling(), tokenizer)
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + CHATML
    assert fault(calling(), tokenizer).endswith("the template leaves out the tool call of turn 2.")
    tokenizer.chat_template = TOOLS.replace("for m in messages", "for m in messages if m['role'] != 'tool'")
    assert "leaves out the tool's answer of turn 3" in fault(calling(), tokenizer)


# --- other templates


def test_a_named_template_takes_the_place_of_none(tokenizer_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"))
    wanted = encode(row, tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert encode(row, load_tokenizer(tmp_path, "chatml")).ids.tolist() == wanted.ids.tolist()
    (tmp_path / "own.jinja").write_text(CHATML.replace("user", "USER"))
    assert encode(row, load_tokenizer(tmp_path, str(tmp_path / "own.jinja"))).ids.tolist() == wanted.ids.tolist()


def test_a_named_template_whose_tokens_the_vocabulary_lacks(tokenizer_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(tokenizer_folder, "gemma")
    assert caught.value.what == (
        "--chat-template gemma: it writes <end_of_turn>, <start_of_turn>, which the model's vocabulary lacks."
    )
    assert caught.value.fix == "Choose one that fits: chatml."
    with pytest.raises(UserError, match="neither a built-in template nor a readable file"):
        load_tokenizer(tokenizer_folder, "nonesuch")


@pytest.mark.parametrize("name", own_templates())
def test_our_own_templates_label_what_they_should(tokenizer: Any, name: str) -> None:
    special = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (Path("common/data/chat_templates") / f"{name}.jinja").read_text()
    row = example(("system", "Be"), ("user", "Hi"), ("assistant", "Yo"), ("user", "So"), ("assistant", "No"))
    end = {"chatml": END, "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}[name]
    encoded = encode(row, tokenizer)
    assert said(encoded, tokenizer) == f"Yo{end}No{end}"
    assert encoded.notes == ()
    assert "Be" in said(encoded, tokenizer, labeled=False)


# --- what a review found


def test_every_token_but_those_of_a_turn_taken_out(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"), ("user", "So"), ("assistant", "No"))
    row.messages[1]["train"] = False
    encoded = encode(row, tokenizer, MaskingOptions(train_on="all"))
    assert said(encoded, tokenizer).count("Yo") == 0
    assert said(encoded, tokenizer).count("Hi") == 1


def test_an_end_of_turn_within_an_answer_is_refused(tokenizer: Any) -> None:
    words = fault(example(("user", "Hi"), ("assistant", f"a{END}b")), tokenizer)
    assert words.endswith("turn 2 has the end-of-turn token in its text, and would teach a stop there.")


def test_marks_are_those_of_the_text_that_is_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m.reasoning or '' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoded = encode(thoughtful("of its own"), tokenizer, MaskingOptions(thinking="keep"))
    assert said(encoded, tokenizer) == "Yo<|im_end|>"


def test_two_bos_in_plain_text_are_refused(tokenizer: Any) -> None:
    assert "two BOS" in fault(Example((), "a.txt:1", text=SPECIAL[0] * 2 + "Hi"), tokenizer)


def test_of_several_named_templates_the_default_is_taken(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = {"tool_use": "x", "default": CHATML}
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHATML
