"""The Modelfile's prompts, tokenized by llama.cpp as Ollama has it do: the ids that training had, BOS once."""

import json
import shutil

import pytest

from common.data.dataset import Example
from common.data.encode import load_tokenizer
from common.export.modelfile import modelfile
from common.llama_cpp.build import ensure
from common.llama_cpp.convert import convert
from common.llama_cpp.server import Server, ServerOptions
from common.models.resolve import resolve
from tests.encoding import encode
from tests.go_interpreter import execute
from tests.progress import silent
from tests.unit.modelfile_parser import read_modelfile

SAID = [
    {"role": "system", "content": "Speak as a parrot."},
    {"role": "user", "content": "こんにちは"},
    {"role": "assistant", "content": "Aye!"},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "There."},
]
BOS = "<|endoftext|>"


def with_bos(folder, adds: bool, writes: bool) -> None:
    """SmolLM2 as a model whose tokenizer adds a BOS, or whose template writes one."""
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": BOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if adds:
        tokens = json.loads((folder / "tokenizer.json").read_text())
        bos, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        template = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text]}
        template |= {"special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}}
        tokens["post_processor"] = {"type": "Sequence", "processors": [tokens["post_processor"], template]}
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
    if writes:
        path = folder / "chat_template.jinja"
        path.write_text("{{ bos_token }}" + path.read_text())


@pytest.fixture(scope="module")
def smollm2():
    return resolve("HuggingFaceTB/SmolLM2-135M-Instruct", print).path


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    llama, gguf = ensure(None, silent), tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(smollm2, gguf, "model", llama, silent)
    with Server(llama, gguf, ServerOptions(context=512)) as found:
        yield found


@pytest.mark.parametrize(("adds", "writes"), [(False, False), (True, True), (True, False), (False, True)])
def test_the_ids_are_those_of_training(smollm2, server, tmp_path, adds, writes):
    folder = tmp_path / "model"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with_bos(folder, adds, writes)
    tokenizer = load_tokenizer(folder)
    template = dict(read_modelfile(modelfile(folder, "model.gguf", [2], "off", []).text))["template"]
    for count in (2, 4):
        row = encode(Example(tuple(SAID[: count + 1]), "row"), tokenizer)
        last = max(at for at in range(1, len(row.ids)) if row.mask[at] and not row.mask[at - 1])
        # llama.cpp adds the BOS of a vocabulary that has it so; SmolLM2's has not, so here it is put there
        served = [0] * adds + server.tokenize(execute(template, SAID[:count]), add_special=True)
        assert served == row.ids[:last].tolist()
        assert served.count(0) == (adds or writes)
