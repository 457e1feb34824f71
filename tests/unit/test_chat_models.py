"""The model that a chat command names, checked before anything is loaded; a backend's model, prompted as trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.data.chat_template import Refused
from common.data.encode import load_tokenizer
from common.errors import UserError
from common.inference import chat_models
from common.inference.backend_chat import (
    ChatFormat,
    ChatModel,
    _decoded,
    adapt_messages,
    backend_chat_model,
    hidden_tokens,
)
from common.inference.chat_models import ChatModels, Target, choose, opened
from common.sampling import Sampling
from tests.contexts import context
from tests.tiny import CHATML


def write_run(folder: Path, status: str = "complete", **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    known = {
        "status": status,
        "options": {"model": "x/y"},
        "model_hash": "h",
        "recipe_hash": "r",
        "stop_ids": [2],
    } | more
    (folder / "run.json").write_text(json.dumps(known | more))
    return folder


def with_ggufs(folder: Path, *quants: str) -> Path:
    (folder / "gguf").mkdir(parents=True)
    for quant in quants:
        (folder / "gguf" / f"model-{quant}.gguf").write_bytes(b"GGUF")
    reports = [{"file": f"gguf/model-{quant}.gguf", "quant": quant} for quant in quants]
    return write_run(folder, export={"gguf": reports, "fused": "fused"})


def fault(*arguments: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        choose(*arguments)
    return caught.value


def test_the_first_gguf_of_a_run_or_the_one_named(tmp_path: Path) -> None:
    run = with_ggufs(tmp_path / "run", "Q4_K_M", "Q8_0")
    assert choose(run, None, None).path == run / "gguf" / "model-Q4_K_M.gguf"
    assert choose(run, "gguf", "Q8_0").path == run / "gguf" / "model-Q8_0.gguf"
    error = fault(run, None, "BF16")
    assert error.what == f"--quant BF16: {run} has Q4_K_M, Q8_0."
    assert error.fix.endswith(f"python cli.py fuse {run} --export gguf --quant BF16")
    assert "--with adapter does not use a GGUF" in fault(run, "adapter", "Q8_0").what


def test_a_run_without_a_gguf_says_how_to_make_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    error = fault(run, None, None)
    assert (error.what, f"python cli.py fuse {run} " in error.fix) == (f"{run} has no GGUF.", True)
    gone = with_ggufs(tmp_path / "gone", "Q4_K_M")
    (gone / "gguf" / "model-Q4_K_M.gguf").unlink()
    assert fault(gone, None, None).what == f"{gone} has no GGUF."
    assert choose(run, "adapter", None).kind == "adapter"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert fault(tmp_path / "no", None, None).what == f"{tmp_path / 'no'} holds no run (no run.json)."
    assert fault(write_run(tmp_path / "half", "interrupted"), None, None).fix.endswith(f"--resume {tmp_path / 'half'}")
    assert "has no fused folder" in fault(with_ggufs(tmp_path / "run", "Q4_K_M"), "fused", None).what
    full = write_run(tmp_path / "full", options={"method": "full"})
    assert "was trained with --method full" in fault(full, "adapter", None).what


def test_a_bare_gguf_and_a_runs_fused_folder(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert fault(path, None, None).what == f"{path}: no such file."
    path.write_bytes(b"GGUF")
    assert (choose(path, None, None).path, choose(path, None, None).run) == (path, None)
    assert "which has no other forms" in fault(path, "adapter", None).what
    run = with_ggufs(tmp_path / "run", "Q4_K_M")
    (run / "fused").mkdir()
    (run / "fused" / "config.json").write_text("{}")
    assert (choose(run / "fused", None, None).kind, choose(run / "fused", None, None).path) == ("fused", run)


def test_a_system_turn_goes_where_the_template_takes_it() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    folded = [{"role": "user", "content": "S\n\nu"}]

    def refuses(form: list[dict]) -> str:
        if form[0]["role"] == "system":
            raise Refused("no such role")
        return ""

    assert adapt_messages(messages, lambda form: "<S>") == messages
    assert adapt_messages(messages, lambda form: "<u>") == folded
    assert adapt_messages(messages, refuses) == folded
    assert adapt_messages(messages[1:], refuses) == messages[1:]
    assert adapt_messages(messages, lambda form: "<S><u>") == messages
    assert adapt_messages(messages, lambda form: "<u><a><S><v>") == folded  # Mistral Nemo's writes it into the last


class Speaker:
    """A backend that writes `text`, a byte a token, and then the end of a turn."""

    def __init__(self, text: str) -> None:
        self.text, self.prompts, self.adapters = text, [], []

    def generate(self, token_ids, max_new_tokens, stop_ids, pick, adapter=True):
        from tests.tiny import SPECIAL

        self.prompts.append([int(token) for token in token_ids])
        self.adapters.append(adapter)
        ids = [self.vocabulary[letter] for letter in self.text_pieces] + [SPECIAL.index("<|im_end|>")]
        for token in ids[:max_new_tokens]:
            if token in stop_ids:
                return
            yield token


@pytest.fixture
def speaker(tokenizer_folder: Path) -> Speaker:
    from common.data.encode import load_tokenizer

    tokenizer, found = load_tokenizer(tokenizer_folder), Speaker("港よ")
    found.vocabulary, found.text_pieces = tokenizer.get_vocab(), tokenizer.tokenize("港よ")
    found.tokenizer = tokenizer
    return found


def model(speaker: Any, folder: Path, template: str | None = None, context: int = 200, adapter: bool = True):
    form = ChatFormat(folder, template, [2], think=False, context=context)
    return backend_chat_model(speaker, form, "tuned", adapter)


def test_a_backends_answer_comes_in_whole_letters(speaker: Any, tokenizer_folder: Path) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    pieces = list(model(speaker, tokenizer_folder, adapter=False).answer(messages, Sampling(), ()))
    assert pieces == [("港", None), ("よ", None), ("", "stop")]
    assert speaker.adapters == [False]
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert speaker.prompts == [speaker.tokenizer(text, add_special_tokens=False)["input_ids"]]
    cut = list(model(speaker, tokenizer_folder).answer(messages, Sampling(max_tokens=4), ()))
    assert cut == [("港", None), ("", "length")]


def test_the_runs_own_template_is_used_with_its_thinking_block(speaker: Any, tokenizer_folder: Path) -> None:
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")
    assert template != CHATML
    list(model(speaker, tokenizer_folder, template).answer([{"role": "user", "content": "u"}], Sampling(), ()))
    assert speaker.tokenizer.decode(speaker.prompts[0]).endswith("assistant\n<think>\n\n</think>\n\n")


REASONED = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "<think>\nr\n</think>\n\nOne."},
    {"role": "user", "content": "v"},
]


@pytest.mark.parametrize(
    ("think", "field", "earlier"),
    [(False, False, "One."), (True, False, "<think>\nr\n</think>\n\nOne."), (True, True, "{r}One.")],
)
def test_earlier_reasoning_is_as_in_training(
    think: bool, field: bool, earlier: str, speaker: Any, tokenizer_folder: Path
) -> None:
    reasoning = "('{' + m.reasoning_content + '}' if m.reasoning_content else '')"
    template = CHATML.replace("m['content'] +", f"{reasoning} + m['content'] +") if field else CHATML
    form = ChatFormat(tokenizer_folder, template, [2], think=think, context=300)
    list(backend_chat_model(speaker, form, "tuned", True).answer(REASONED, Sampling(), ()))
    turns = f"<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n{earlier}<|im_end|>\n<|im_start|>user\nv<|im_end|>"
    assert speaker.tokenizer.decode(speaker.prompts[0]) == f"{turns}\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("thinking", "template", "given"),
    [
        ("off", "{{ messages }}", {"content": "One."}),
        ("keep", "{{ messages }}", {"content": REASONED[1]["content"]}),
        ("keep", "{{ m.reasoning_content }}", {"content": "One.", "reasoning_content": "r"}),
        (None, "", {"content": REASONED[1]["content"]}),
    ],
)
def test_llama_cpp_is_given_earlier_reasoning_as_in_training(
    thinking: str | None, template: str, given: dict[str, str]
) -> None:
    sent: list[Any] = []
    recipe = SimpleNamespace(thinking=thinking)
    run: Any = thinking and SimpleNamespace(recipe=recipe, read_template=lambda: template)
    server: Any = SimpleNamespace(stream=lambda messages, *rest: sent.extend(messages) or iter(()))
    list(chat_models._served(server, "", run).answer(REASONED, Sampling(), ()))
    assert sent == [REASONED[0], {"role": "assistant"} | given, REASONED[2]]


def test_calls_are_given_in_the_form_that_the_template_takes(speaker: Any, tokenizer_folder: Path) -> None:
    """As functionary's, which joins the arguments to a text."""
    written = "(m.tool_calls[0].function.arguments + '' if m.tool_calls else m['content'])"
    template = CHATML.replace("m['content'] +", f"{written} +")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "港"}}}
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages.append({"role": "tool", "content": "t"})
    list(model(speaker, tokenizer_folder, template).answer(messages, Sampling(), ()))
    assert '<|im_start|>assistant\n{"a": "港"}<|im_end|>' in speaker.tokenizer.decode(speaker.prompts[0])
    template = "{{ raise_exception('no calls') if messages[1] else 'q<|im_end|>' }}"
    with pytest.raises(UserError, match="refuses these turns: no calls"):
        list(model(speaker, tokenizer_folder, template).answer(messages, Sampling(), ()))


def test_an_answer_has_no_control_tokens_but_the_tags_of_reasoning(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    special = ["<|START_THINKING|>", "<|END_THINKING|>", "[TOOL_CALLS]", "<|tool_call>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special}, False)
    tokenizer.add_tokens(["<|looks special|>", "<tag>"])
    hidden = hidden_tokens(tokenizer)
    assert {"[TOOL_CALLS]", "<|looks special|>", "<|im_end|>"} <= {*hidden.values()}
    text = "<|START_THINKING|>r<|END_THINKING|>[TOOL_CALLS]<|looks special|>港<|tool_call><tag>"
    pieces = _decoded(iter(tokenizer.encode(text, add_special_tokens=False)), tokenizer, hidden, 99, None)
    assert "".join(piece for piece, _ in pieces) == "<|START_THINKING|>r<|END_THINKING|>港<|tool_call><tag>"


def test_tools_are_text_for_a_model_that_learned_them_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[Any], Any]] = []

    def answer(messages: Any, sampling: Any, tools: Any) -> Iterator[tuple[str, str | None]]:
        asked.append((list(messages), tools))
        yield "", "stop"

    found = ChatModels(ChatModel("tuned", answer), lambda: ChatModel("base", answer))
    monkeypatch.setattr(chat_models, "_in_backend", lambda *args: found)
    messages, tool = [{"role": "user", "content": "u"}], {"type": "function", "function": {"name": "t"}}
    for mode, template in (("system", "{{ messages }}"), ("system", "{{ tools }}"), ("error", "{{ messages }}")):
        run: Any = SimpleNamespace(recipe=SimpleNamespace(tools=mode), read_template=lambda text=template: text)
        with opened(Target("adapter", tmp_path, run, ""), context(), 100) as models:
            for model in (models.tuned, models.base()):
                list(model.answer(messages, Sampling(), (tool,)))
    (first, none), *_ = asked
    assert (first[0]["role"], none) == ("system", ())
    assert '<tools>\n{"type": "function", "function": {"name": "t"}}\n</tools>' in first[0]["content"]
    assert asked[1] == asked[0]
    assert asked[2:] == [(messages, (tool,))] * 4


def test_a_talk_longer_than_the_context_is_refused(speaker: Any, tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match=r"These turns have \d+ tokens, and --context is 30"):
        list(
            model(speaker, tokenizer_folder, context=30).answer([{"role": "user", "content": "u" * 40}], Sampling(), ())
        )
    assert np.size(speaker.prompts) == 0


def test_without_a_chat_template_there_is_no_talk(tiny_llama: Path, tmp_path: Path, speaker: Any) -> None:
    for file in tiny_llama.iterdir():
        if "template" not in file.name and file.suffix != ".safetensors":
            content = file.read_text(encoding="utf-8")
            (tmp_path / file.name).write_text(content, encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no chat template"):
        model(speaker, tmp_path)
