"""Which tokens carry loss, by hand-written lists. The tokenizer knows bytes only: a letter is a token."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.chat import Renderer
from common.data import Example
from common.errors import UserError
from common.template import Encoded, encode, encode_all, load_tokenizer, stop_ids, template_hash
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


def test_every_answer_of_several_turns_is_labelled_and_nothing_else(tokenizer: Any) -> None:
    row = example(
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No way")
    )
    assert labels(encode(row, tokenizer), tokenizer) == ["Y", "o", END, "N", "o", SPACE, "w", "a", "y", END]


def test_the_turns_end_is_labelled_and_the_newline_after_it_is_not(tokenizer: Any) -> None:
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo"), ("user", "So")), tokenizer)
    end = 23
    assert tokens(encoded, tokenizer)[end : end + 2] == [END, NEWLINE]
    assert encoded.mask[end : end + 2].tolist() == [True, False]
    assert not encoded.mask[end + 1 :].any()


def test_japanese_text_is_labelled_byte_by_byte(tokenizer: Any) -> None:
    encoded = encode(example(("user", "港"), ("assistant", "あい")), tokenizer)
    assert labels(encoded, tokenizer) == ["ã", "ģ", "Ĥ", "ã", "ģ", "Ħ", END]


def test_spaces_around_an_answer_are_part_of_it(tokenizer: Any) -> None:
    encoded = encode(example(("user", "Hi"), ("assistant", " Yo\n")), tokenizer)
    assert labels(encoded, tokenizer) == [SPACE, "Y", "o", NEWLINE, END]


def test_an_answer_that_repeats_the_prompt_is_labelled_where_it_stands(tokenizer: Any) -> None:
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


def test_an_empty_thinking_block_of_the_prompt_stays_unlabelled(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING.replace(
        "m['content'] +", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content'] +"
    )
    encoded = encode(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert "".join(tokens(encoded, tokenizer)).count("<think>") == 1
    assert labels(encoded, tokenizer) == ["Y", "o", END]


def test_an_empty_thinking_block_beside_a_plain_prompt_stays_unlabelled(tokenizer: Any) -> None:
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


# --- what cannot be labelled


def test_a_template_that_renders_an_old_turn_differently_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    said = fault(example(("user", "Hi"), ("assistant", "Yo"), ("user", "So"), ("assistant", "No")), tokenizer)
    assert said.startswith("train.jsonl:17: this row cannot be labelled exactly: turn 2 renders differently")


def test_a_template_that_changes_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    said = fault(example(("user", "Hi"), ("assistant", "Yo")), tokenizer)
    assert said == (
        "train.jsonl:17: this row cannot be labelled exactly: "
        "the template leaves out or changes the answer of turn 2."
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
    assert said.endswith("a token lies across the edge of an assistant turn.")


# --- the template itself


def test_a_row_renders_the_same_on_every_day(tokenizer: Any) -> None:
    # as Llama 3.2's template does: a run resumed tomorrow must see the same tokens
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'Today Date: ' + date_string }}" + CHATML
    )
    text = Renderer(tokenizer, "off").render([{"role": "user", "content": "Hi"}], (), False, False)
    assert f"{date.today():%d %b %Y}" not in text


def test_render_ends_in_the_prompt_when_asked(tokenizer: Any) -> None:
    messages, renderer = [{"role": "user", "content": "Hi"}], Renderer(tokenizer, "off")
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
    assert "--chat-template NAME or FILE (ours that fit: chatml)" in caught.value.fix


def test_a_broken_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


# --- rows


def test_rows_of_more_than_max_length_tokens_are_kept_apart(tokenizer: Any) -> None:
    examples = [example(("user", "Hi"), ("assistant", "Y" * count)) for count in (1, 2, 3)]  # 24, 25, 26 tokens
    kept, long = encode_all(examples, tokenizer, 25)
    assert ([len(row.ids) for row in kept], [len(row.ids) for row in long]) == ([24, 25], [26])


def test_stop_ids_are_what_ends_the_answers(tokenizer: Any) -> None:
    row = encode(example(("user", "Hi"), ("assistant", "Yo"), ("user", "Yo?"), ("assistant", "No")), tokenizer)
    assert stop_ids([row]) == [SPECIAL.index(END)]


def test_stop_ids_come_most_frequent_first() -> None:
    mask = np.array([False, True, True, False, True])
    rows = [Encoded(np.array([9], np.int32), mask, "", ends) for ends in ((5, 7), (7, 7))]
    assert stop_ids(rows) == [7, 5]
