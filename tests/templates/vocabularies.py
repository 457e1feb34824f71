"""llama.cpp's `models/ggml-vocab-*.gguf` as fast tokenizers: real vocabularies, real merges, exact offsets.

Only BPE in its two forms is built (byte-level, and sentencepiece's with byte fallback): WordPiece and Unigram serve
encoders, which do not chat.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from common.llama_cpp.build import ensure

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # llama.cpp's `enum llama_token_type`
SEPARATOR = "\n__ggml_vocab_test__\n"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PREFIX = "tokenizer.ggml."
# The words of one regular expression; the families differ in what counts as a letter and how digits are grouped.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?[^\s{others}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": (_WORDS.format(letters=r"\p{L}", others=r"\p{L}", digits=r"\p{N}{1,3}"),),
    "qwen2": (_WORDS.format(letters=r"\p{L}", others=r"\p{L}", digits=r"\p{N}"),),
    "qwen35": (_WORDS.format(letters=r"[\p{L}\p{M}]", others=r"\p{L}\p{M}", digits=r"\p{N}"),),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-\ud7ff]+",
        r"\p{N}",
    ),
}
_GPT2 = {"gpt-2": False, "command-r": True, "starcoder": True, "refact": True}  # True: every digit by itself


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer, and the model built of it; the model is shared by all its tokenizers."""

    name: str
    kind: str  # "gpt2" (byte-level), "llama" (sentencepiece) or "gemma4" (sentencepiece's alphabet, explicit merges)
    pre: str
    tokens: list[str]
    types: list[int]
    bos: str
    eos: str
    model: Any  # tokenizers.models.BPE


def models_folder() -> Path:
    """llama.cpp's `models`, which lies in its source alone."""
    folder = ensure(None, lambda done, text: None).converter.parent / "models"
    assert folder.is_dir(), f"{folder} is missing: this tier wants llama.cpp with its source (unset LLAMA_CPP_DIR)"
    return folder


@cache
def vocabulary(name: str) -> Vocabulary:
    """`models/ggml-vocab-NAME.gguf`, read and built once a session."""
    from tokenizers import models

    fields = _metadata(models_folder() / f"ggml-vocab-{name}.gguf")
    kind, tokens = fields["model"], fields["tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
        model = models.BPE(ids, merges, ignore_merges=name == "llama-bpe")
    else:
        if "merges" in fields:  # the space between the halves is the first one that is not the first letter
            merges = [(m[: (at := m.index(" ", 1))], m[at + 1 :]) for m in fields["merges"]]
        else:
            merges = _merges_by_score(ids, fields["scores"])
        model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    bos, eos = (tokens[fields[f"{which}_token_id"]] for which in ("bos", "eos"))
    return Vocabulary(name, kind, fields.get("pre", ""), tokens, fields["token_type"], bos, eos, model)


def tokenizer(name: str, special: Iterable[str] = (), plain: Iterable[str] = (), **named: str | None) -> Any:
    """A `PreTrainedTokenizerFast` over the vocabulary, with its own control tokens and those that a family adds.

    `special` and `plain` are added tokens with and without the flag `special`; `named` sets `bos_token`, `eos_token`.
    """
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source = vocabulary(name)
    backend = Tokenizer(source.model)
    _dress(backend, source)
    own = zip(source.tokens, source.types, strict=True)
    added = [AddedToken(t, normalized=False, special=True, rstrip=_eats_space(name, t)) for t, k in own if k == CONTROL]
    own = zip(source.tokens, source.types, strict=True)
    flat = [t for t, k in own if k == USER_DEFINED and not t.startswith("[PAD")]
    known = {*(token.content for token in added), *flat}
    added += [AddedToken(t, normalized=False, special=True) for t in dict.fromkeys(special) if t not in known]
    backend.add_special_tokens(added)
    known = {token.content for token in added}
    flat = [t for t in dict.fromkeys([*flat, *plain]) if t not in known]
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in flat])
    # Its constructor copies the backend it is given, which takes seconds: an empty one is copied, and replaced.
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))
    fast._tokenizer = backend
    for which, token in named.items():
        setattr(fast, which, token)
    return fast


def agreement(name: str) -> tuple[int, int]:
    """`(equal, all)` of the texts on which llama.cpp tests this vocabulary, by its own recorded ids."""
    file = models_folder() / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    wanted = [[int(i) for i in line.split()] for line in Path(f"{file}.out").read_text().splitlines()]
    fast = tokenizer(name)
    pairs = list(zip(texts, wanted, strict=True))
    return sum(fast(text, add_special_tokens=False)["input_ids"] == ids for text, ids in pairs), len(pairs)


def _dress(backend: Any, source: Vocabulary) -> None:
    """What stands before and after the model: the cut into words, the alphabet, and back."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    if source.kind == "gpt2":
        if source.pre in _GPT2:
            steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if _GPT2[source.pre] else []
        else:
            steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[source.pre]]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=source.pre in _GPT2))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        return
    space = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if source.kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = space
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
        backend.decoder = decoders.Sequence(back)


def _eats_space(name: str, token: str) -> bool:
    """Whether the token takes the white space after it, line feeds too: Phi-3's do."""
    return name == "phi-3" and token not in ("<s>", "<unk>", "<|endoftext|>")


def _merges_by_score(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Sentencepiece joins the pair whose whole scores best: every split of a piece into two, by the piece's score."""
    found = []
    for piece, whole in ids.items():
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(-scores[whole], ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(found)]


def _metadata(path: Path) -> dict[str, Any]:
    """The fields `tokenizer.ggml.*` of a GGUF file, without that prefix."""
    with path.open("rb") as file:
        magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
        assert (magic, version) == (b"GGUF", 3), path
        fields = {}
        for _ in range(count):
            name = _string(file)
            fields[name.removeprefix(_PREFIX)] = _value(file, *struct.unpack("<I", file.read(4)))
        return fields


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        kind, count = struct.unpack("<IQ", file.read(12))
        if kind == _STRING:
            return [_string(file) for _ in range(count)]
        form = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(form, file.read(struct.calcsize(form))))
    return struct.unpack("<" + _SCALARS[kind], file.read(struct.calcsize("<" + _SCALARS[kind])))[0]


def _string(file: BinaryIO) -> str:
    return file.read(*struct.unpack("<Q", file.read(8))).decode("utf-8", "surrogateescape")
