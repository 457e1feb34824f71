"""Readers of what a user writes: rows, prompts, YAML, flags; and all that is checked before a training."""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

import cli
from common.commands.arguments import joined, sampling_of, unknown
from common.commands.check_data import explain
from common.commands.prepare import prepare
from common.data import load, row_parts
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.facts import data_hash
from common.data.findings import quality_warnings
from common.data.load import load_data
from common.inference.prompts import read_prompts
from common.option_sources import load_options
from common.option_translation import KNOWN
from common.options import Options, by_flag
from tests.contexts import context
from tests.faults import mutations
from tests.faults.reader import Reader
from tests.tiny import write_model, write_rows, write_tokenizer

_USER, _ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is.\n"}
_CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, _USER, _ANSWER]},
    {"messages": [_USER, _ANSWER, _USER, _ANSWER | {"weight": 0}, _USER, _ANSWER | {"train": True}]},
    {
        "messages": [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            _ANSWER,
        ],
        "tools": [_TOOL],
    },
    {"messages": [_USER, {"role": "assistant", "content": "<think>Well.</think>Yes.", "reasoning_content": "Hm."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, _ANSWER]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": "c"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [_USER], "chosen": [_ANSWER], "rejected": [_ANSWER]},
    {"question": "a", "answer": "b", "weight": 0.5},
    {"text": "Plain text."},
    {"id": 7, "messages": [_USER, _ANSWER], "source": "x", "score": 1.5},
]


def _row_files() -> dict[str, bytes]:
    good = {}
    for number, row in enumerate(ROWS):
        rows = [row | {key: f"{value} {i}" for key, value in row.items() if isinstance(value, str)} for i in range(4)]
        good[f"{number}/train.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        good[f"{number}/train.json"] = json.dumps(rows).encode()
    good["csv/train.csv"] = b'instruction,input,output\n"a ""b""",,c\nd,e,"f\ng"\nh,i,j\n'
    good["csv2/train.csv"] = b"\xef\xbb\xbfprompt,completion\r\na,b\r\nc,d\r\n"
    good["tsv/train.tsv"] = b"prompt\tcompletion\na\tb\nc\td\n"
    good["txt/train.txt"] = b"First line.\n\nSecond line.\nThird line.\n"
    return good


def rows(folder: Path) -> Reader:
    """Training rows, read, counted, hashed, searched for what is suspicious, and encoded."""
    good = _row_files() | _parquet(folder)
    write_tokenizer(folder / "tokenizer")
    encoders = [
        Encoder(load_tokenizer(folder / "tokenizer", template), MaskingOptions(trained, "keep"))
        for template, trained in ((None, "assistant"), (None, "all"))
    ]

    def read(case: dict[str, bytes | None]) -> None:
        data = load_data(str((folder / next(iter(case))).parent), 0.3, 1)
        data_hash(data)
        quality_warnings(data)
        for encoder in encoders:
            for example in data.train[:3]:
                encoder(example)
                explain(example, encoder)

    return Reader(folder, good, read, mutations.files(good))


def large_rows(folder: Path) -> Reader:
    """The same files as if they were large: read and encoded by parts, and kept in a cache."""
    good = _row_files() | _parquet(folder)
    write_tokenizer(folder / "tokenizer")
    encoder = Encoder(load_tokenizer(folder / "tokenizer", None), MaskingOptions())
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # this process reads nothing else
    load.LARGE, row_parts.processes = 1, lambda: 1

    def read(case: dict[str, bytes | None]) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        data = load_data(str((folder / next(iter(case))).parent), 0.3, 1)
        data_hash(data)
        encode_parts([data.train, data.valid], encoder, "drop")

    return Reader(folder, good, read, mutations.files(good))


def _parquet(folder: Path) -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    found = {}
    for number, row in enumerate(ROWS):
        if number == 4:  # a column of texts and lists is not Arrow's
            continue
        path = folder / f"{number}-parquet" / "train.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist([row] * 4), path)
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def prompts(folder: Path) -> Reader:
    """The same files as prompts."""
    good = _row_files()
    return Reader(folder, good, lambda case: read_prompts(folder / next(iter(case))) and None, mutations.files(good))


# --- options

_GIVEN: dict[str, list[Any]] = {
    "model": ["tiny", "other"],
    "data": ["rows.jsonl", "folder"],
    "adapter": ["adapter", "lora", "qlora"],
    "chat_template": ["chatml", "rows.jsonl"],
    "targets": [["q_proj", "v_proj"], "all-linear", "mlp"],
    "quant": [["Q4_K_M"], "Q8_0"],
    "layers": ["last:1", "0", "0-1"],
    "rank_pattern": [{"q_proj": 4}, ["q_proj=4"]],
    "alpha_pattern": [{"q_proj": 4.5}],
    "field": [{"instruction": "a"}, "output=b"],
    "memory_limit": ["16GB", "900MB"],
    "lora_parameters": [{"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}],
    "export": ["none", "gguf", "fused"],
    "output": ["out"],
    "resume": ["run"],
}
_PLAIN = [1, 2, 8, 0.5, 1e-4, True, False, "auto", "none", "adamw", "bf16", "cosine"]
_NAMES = sorted({*by_flag(), *KNOWN} - {"config"})


@st.composite
def _settings(draw: mutations.Draw) -> dict[str, Any]:
    """A few options, most of them with a value of their kind."""
    names = draw(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=6, unique=True))
    found = {}
    for name in names:
        fit = st.sampled_from([*_GIVEN.get(name, []), *_PLAIN, *_choices(name)])
        found[name] = draw(st.one_of(fit, fit, mutations.VALUES))
    return found


def _choices(name: str) -> list[Any]:
    field = by_flag().get(name)
    default = [] if field is None or field.get_default() is None else [field.get_default()]
    return [*getattr(field and field.annotation, "__args__", ()), *default] if default else default


@st.composite
def _yaml_file(draw: mutations.Draw, example: bytes) -> dict[str, bytes | None]:
    settings = draw(_settings())
    text = yaml.safe_dump(mutations._without_surrogates(_plain(settings)), allow_unicode=True).encode()
    if draw(st.booleans()):
        text = draw(st.sampled_from([mutations.yaml_text, mutations.damaged]))(
            draw, draw(st.sampled_from([text, example]))
        )
    return {"config.yaml": text}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def yaml_configs(folder: Path) -> Reader:
    """--config with every option, and every key of other programs."""
    good = {"config.yaml": (Path(cli.__file__).parent / "configs" / "quickstart.yaml").read_bytes()}

    def read(case: dict[str, bytes | None]) -> None:
        load_options({"config": str(folder / "config.yaml")})

    return Reader(folder, good, read, _yaml_file(good["config.yaml"]))


_WORDS = [text for text in mutations.TEXTS if len(text) < 100 and "\0" not in text]  # as an operating system hands on
_COMMANDS = ["train"] * 20 + ["plan"] * 4 + [name for name in cli.COMMANDS if name not in ("train", "plan")]


@st.composite
def _command_line(draw: mutations.Draw) -> dict[str, bytes | None]:
    words = [draw(st.sampled_from(_COMMANDS))]
    word = st.one_of(st.sampled_from(_WORDS), st.sampled_from([str(value) for value in _PLAIN]), st.text(max_size=9))
    for name in draw(st.lists(st.sampled_from(_NAMES), max_size=6)):
        flag = f"--{name.replace('_', '-')}" if draw(st.booleans()) else f"--{name}"
        fit = [str(part) for value in _GIVEN.get(name, []) for part in (value if isinstance(value, list) else [value])]
        values = draw(st.lists(st.one_of(word, st.sampled_from([*fit, "1", "8"])), max_size=3))
        words += [f"{flag}={values[0]}"] if values and draw(st.booleans()) else [flag, *values]
    if draw(st.integers(0, 9)) == 0:
        words.insert(1, draw(word))
    return {"words.json": json.dumps([word.replace("\0", "") for word in words]).encode()}


def flags(folder: Path) -> Reader:
    """Every command line: parsed, and for train and plan merged into options."""
    good = {"words.json": b'["train"]'}
    parser_of = cache(cli.build_parser)

    def read(case: dict[str, bytes | None]) -> None:
        words = json.loads(case["words.json"] or b"")
        parser = parser_of(words[0])  # the largest takes a tenth of a second
        try:
            args, extra = parser.parse_known_args(joined(words))
        except SystemExit:  # --help
            return
        if hasattr(args, "temperature"):
            sampling_of(args)
        if hasattr(args, "flags"):
            load_options(args.flags | unknown(extra), words[0], args.allowed)

    return Reader(folder, good, read, _command_line())


@st.composite
def _training(draw: mutations.Draw) -> dict[str, bytes | None]:
    settings = draw(_settings())
    return {"options.json": mutations._as_json(_plain(settings)).encode()}


def preparation(folder: Path) -> Reader:
    """Everything before the first step of a training, with options that are valid one by one."""
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl")
    base: dict[str, Any] = {"model": str(folder / "tiny"), "data": str(folder / "rows.jsonl"), "export": "none"}
    base |= {"output": str(folder / "out"), "backend": "torch", "device": "cpu"}
    for name in ("chat_template", "adapter", "resume", "llama_cpp", "backend", "device", "config"):
        base.setdefault(name, None)
    good = {"options.json": b"{}"}

    def read(case: dict[str, bytes | None]) -> None:
        given = {name: value for name, value in base.items() if value is not None}
        options, _ = load_options(given | json.loads(case["options.json"] or b""))
        if options.export in ("gguf", "lora-gguf"):  # it would look for llama.cpp, and build it
            options = Options.model_validate(
                options.model_dump(by_alias=True, exclude_unset=True) | {"export": "fused"}
            )
        prepare(options, None, context())

    return Reader(folder, good, read, _training(), limit=20)
