"""The Modelfile: read back as Ollama reads it, its template executed and compared with the chat template."""

import json
from dataclasses import fields
from pathlib import Path
from random import Random

import pytest

from common.data.encode import load_tokenizer
from common.export.go_template import TurnTexts
from common.export.modelfile import modelfile, write_modelfile
from tests.go_interpreter import execute
from tests.tiny import CHATML, write_tokenizer
from tests.unit.modelfile_parser import read_modelfile

SAID = [
    {"role": "system", "content": 'Be "brief".'},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "{{ .Role }}"},
]
FOLDING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
COUNTING = "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}<|im_end|>{% endfor %}"
LATE_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '[' + m.content }}{% if loop.last and messages[0].role == "
    "'system' %}{{ messages[0].content }}{% endif %}]<|im_end|>{% endif %}{% endfor %}"
)


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    folder = tmp_path / "fused"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.25}))
    return folder


def with_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def test_the_whole_file(fused: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    made = write_modelfile(fused, tmp_path / "gguf" / "model-Q4_K_M.gguf", [2], "off", SAID)
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["Modelfile"]
    text = (tmp_path / "gguf" / "Modelfile").read_text(encoding="utf-8")
    assert (made.text, made.missing, made.notes) == (text, "", ())
    commands = read_modelfile(text)
    assert [name for name, _ in commands] == [
        *("from", "template", "stop", "stop", "num_ctx", "temperature", "repeat_penalty")
    ]
    assert commands[0] == ("from", "./model-Q4_K_M.gguf")
    assert commands[2:] == [
        ("stop", "<|im_end|>"),
        ("stop", "<|endoftext|>"),
        ("num_ctx", "512"),
        ("temperature", "0.25"),
        ("repeat_penalty", "1"),  # else Ollama's own
    ]
    assert execute(dict(commands)["template"], SAID) == (
        '<|im_start|>system\nBe "brief".<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n{{ .Role }}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_all_of_the_sampling_stands_in_it_by_the_names_that_ollama_knows(fused: Path) -> None:
    given = {"temperature": 1, "top_k": 64, "top_p": 0.95, "repetition_penalty": 1.1, "min_p": "\nSYSTEM x"}
    (fused / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | given))
    commands = read_modelfile(modelfile(fused, "model.gguf", [2], "off", SAID).text)
    assert commands[-4:] == [("temperature", "1"), ("repeat_penalty", "1.1"), ("top_k", "64"), ("top_p", "0.95")]
    assert "system" not in dict(commands)


@pytest.mark.parametrize(
    ("longest", "trained", "context"),
    [(512, 2048, "512"), (131072, 2048, "8192"), (131072, 16384, "16384"), (12000, 16384, "12000")],
)
def test_the_context_holds_what_training_had(
    fused: Path, tmp_path: Path, longest: int, trained: int, context: str
) -> None:
    (fused / "config.json").write_text(json.dumps({"max_position_embeddings": longest}))
    made = write_modelfile(fused, tmp_path / "model.gguf", [2], "off", SAID, trained=trained)
    assert dict(read_modelfile(made.text))["num_ctx"] == context


@pytest.mark.parametrize(
    ("stop", "held"),
    [
        ('"""<|x|>"""\nADAPTER /home/me/private\nSYSTEM """pwned"""', False),
        ('"""', False),
        ("\x1b[2J", False),
        ("</s>\nADAPTER /home/me/private\n", True),
        ('"\rSYSTEM "pwned', True),
        ('say "stop"', True),
        ("# x", True),
    ],
)
def test_a_stop_text_is_one_parameter_or_none(fused: Path, stop: str, held: bool) -> None:
    """A stranger's tokenizer names it."""
    path = fused / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][2]["content"] = stop
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {stop if name == "<|im_end|>" else name: i for name, i in vocabulary.items()}
    path.write_text(json.dumps(content))
    settings = (fused / "tokenizer_config.json").read_text().replace('"<|im_end|>"', json.dumps(stop))
    (fused / "tokenizer_config.json").write_text(settings)
    made = modelfile(fused, "m.gguf", [2], "off", [])
    commands = read_modelfile(made.text)
    assert [value for name, value in commands if name == "stop"] == [*([stop] if held else []), "<|endoftext|>"]
    assert {"adapter", "system"}.isdisjoint(name for name, _ in commands)
    assert held or any("a Modelfile cannot hold it" in note for note in made.notes)


def test_an_answer_begun_is_gone_on_with(fused: Path) -> None:
    template = dict(read_modelfile(modelfile(fused, "m.gguf", [2], "off", []).text))["template"]
    assert execute(template, SAID[:3]).endswith("<|im_start|>assistant\nYes?")


@pytest.mark.parametrize(
    "odd",
    ['"""', "{{ .Content }}", "{", "\u200b\u00a0", "\ufeffa\tb", '\\n "q" \'', "#PARAMETER", "<|im_end|>\n\n", "é😀"],
)
def test_whatever_a_chat_template_writes_survives_the_modelfile(fused: Path, odd: str) -> None:
    written = "{{ " + json.dumps(odd, ensure_ascii=False) + " }}"
    with_template(fused, written + CHATML.replace("{% endfor %}", written + "{% endfor %}"))
    tokenizer = load_tokenizer(fused)
    made = modelfile(fused, "m.gguf", [2], "off", SAID)
    assert made.missing == ""
    written = execute(dict(read_modelfile(made.text))["template"], SAID)
    assert written == tokenizer.apply_chat_template(SAID, tokenize=False, add_generation_prompt=True)
    assert odd in written


def test_a_system_text_that_the_template_refuses_goes_into_the_users_turn(fused: Path) -> None:
    with_template(fused, FOLDING)
    made = modelfile(fused, "m.gguf", [2], "off", SAID)
    assert made.notes == ("Spaces around a text stay in Ollama's prompts; the chat template removes them.",)
    template = dict(read_modelfile(made.text))["template"]
    assert execute(template, SAID[:2]) == '<|im_start|>user Be "brief".\n\nHi<|im_end|><|im_start|>assistant '
    assert execute(template, SAID[1:2]) == "<|im_start|>user Hi<|im_end|><|im_start|>assistant "
    # of a long conversation Ollama leaves out the oldest turns
    assert "<|im_end|><|im_start|>user {{ .Role }}<|im_end|>" in execute(template, SAID[2:])


def test_a_system_text_that_the_template_moves_stays_in_the_first_users_turn(fused: Path) -> None:
    with_template(fused, LATE_SYSTEM)
    made = modelfile(fused, "m.gguf", [2], "off", SAID)
    assert made.missing == ""
    written = execute(dict(read_modelfile(made.text))["template"], SAID)
    assert 0 <= written.find('Be "brief".\n\nHi') < written.find(SAID[2]["content"].strip())


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (COUNTING, "the chat template renders a turn otherwise in a longer conversation"),
        (CHATML.replace("m['content']", "(m['content'] | upper)"), "the chat template refuses or leaves out"),
        (CHATML.replace("m['content']", "(m['content'] | replace('Four', '4'))"), "it would write "),
    ],
)
def test_what_cannot_be_expressed_is_left_out_and_said(fused: Path, template: str, why: str) -> None:
    with_template(fused, template)
    made = modelfile(fused, "m.gguf", [2], "off", [])
    assert made.missing.startswith(why)
    assert f"# No TEMPLATE: {why}" in made.text
    assert [name for name, _ in read_modelfile(made.text)] == [
        *("from", "stop", "stop", "num_ctx", "temperature", "repeat_penalty")
    ]


def test_the_runs_own_prompt_is_tried_too(fused: Path) -> None:
    with_template(fused, CHATML.replace("m['content']", "(m['content'] | replace('harbour', 'port'))"))
    assert modelfile(fused, "m.gguf", [2], "off", []).missing == ""
    sample = [{"role": "user", "content": "Where is the harbour?"}]
    assert "refuses or leaves out" in modelfile(fused, "m.gguf", [2], "off", sample).missing


def test_a_model_without_a_chat_template(fused: Path) -> None:
    (fused / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((fused / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (fused / "tokenizer_config.json").write_text(json.dumps(config))
    made = modelfile(fused, "m.gguf", [2], "off", [])
    assert made.missing == "the model has no chat template, and takes text as it is"
    assert read_modelfile(made.text)[0] == ("from", "./m.gguf")


def test_a_bos_that_the_tokenizer_writes_is_not_written_twice(fused: Path) -> None:
    with_template(fused, "{{ bos_token }}" + CHATML)

    def template() -> str:
        return dict(read_modelfile(modelfile(fused, "m.gguf", [2], "off", SAID).text))["template"]

    assert execute(template(), SAID[1:2]).startswith("<|endoftext|><|im_start|>user")
    tokens = json.loads((fused / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokens["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (fused / "tokenizer.json").write_text(json.dumps(tokens))
    assert execute(template(), SAID[1:2]).startswith("<|im_start|>user")


# --- the Go template, and the prompts that the export checks in its place

FRAGMENTS = ["{", "{{", "}}", '"', '"""', "\\", "- ", "-}}", "{{- ", " ", "\n", "\t", "\u200b", "\ufeff", "é", "x", ""]
TURNS = [{"role": role, "content": f"<{role} {{{{ .Role }}}}>"} for role in ("system", *("user", "assistant") * 2)]


@pytest.mark.parametrize("seed", range(100))
def test_the_go_template_writes_the_prompts_that_were_checked(seed: int) -> None:
    random = Random(seed)
    parts = ["".join(random.choices(FRAGMENTS, k=random.randrange(5))) for _ in fields(TurnTexts)[1:]]
    texts = TurnTexts(*parts, system_turn=seed % 2 == 0)
    template = dict(read_modelfile(f'FROM x\nTEMPLATE """{texts.go_template()}"""\n'))["template"]
    for start in (0, 1, 2):
        for count in range(start + 1, len(TURNS) + 1):
            assert execute(template, TURNS[start:count]) == texts.prompt(TURNS[start:count])


# --- the interpreter and the parser that the tests here rest on


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ('a  {{- " b " -}}  \n c', "a b c"),
        ("{{ if eq 1 2 }}x{{ else if ne 1 2 }}y{{ else }}z{{ end }}", "y"),
        ("{{ if not (and (eq 1 1) (eq 1 2)) }}x{{ else }}y{{ end }}", "x"),
        ("{{ if or (eq 1 2) (eq 1 1) }}x{{ end }}.", "x."),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ .Content }}{{ end }}", "0userHi1assistantYes"),
        ('{{ (index $.Messages 1).Content }}{{ if ne (index .Messages 0).Role "system" }}.{{ end }}', "Yes."),
        ("{{ range $i, $_ := .Messages }}{{ len (slice $.Messages $i) }}{{ end }}", "21"),
        (r'{{ "}}\n\"\U0000200b" }}', '}}\n"\u200b'),
    ],
)
def test_go_templates(template: str, written: str) -> None:
    assert execute(template, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]) == written


@pytest.mark.parametrize(
    "template", ["{{ if eq 1 1 }}x", "{{ end }}", "{{ printf 1 2 }}", "{{ range .Messages }}{{ end }}"]
)
def test_what_is_no_part_of_ours_is_refused(template: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        execute(template, [])


@pytest.mark.parametrize("text", ["TEMPLATE x\n", "FROM x\nFOO y\n", 'FROM x\nTEMPLATE """a', "FROM x\nSTOP y\n"])
def test_the_parser_refuses_what_ollama_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"FROM|command|open"):
        read_modelfile(text)
