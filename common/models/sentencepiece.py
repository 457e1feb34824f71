"""A sentencepiece `tokenizer.model` from `tokenizer.json`, and the check that both give the same ids.

llama.cpp's converter reads the vocabularies of Gemma, Llama 2, Mistral and Phi-3 from `tokenizer.model` only. Given
`tokenizer.json` alone it fails, or silently uses another model's tokenizer. No library converts in this direction:
transformers made such a `tokenizer.json` from a `tokenizer.model`, and this module reverses it.

Source: sentencepiece_model.proto; llama.cpp's conversion/base.py (_create_vocab_sentencepiece) and llama-vocab.cpp.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError, first_line
from common.model_files import open_tokenizer, tokenize
from common.models.model_folder import ModelFolder, is_model_folder

NAME = "tokenizer.model"
REMEDY = f"Copy {NAME} from the base model into that folder, or stop at --export fused."
_SPACE = "▁"  # U+2581, how sentencepiece writes a space
_READ_AS_JSON = "gemma4"  # models whose vocabulary llama.cpp reads from tokenizer.json
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# Texts on which a wrongly rebuilt tokenizer gives other ids.
HARD_TEXTS = (
    "Hello, world! It's 12345 and 3.14, isn't it?",
    " one space before, one after ",
    "  two  spaces\tand a tab   ",
    *("a" + " " * count + "b" for count in (3, 7, 16, 31, 32, 40, 97)),
    *("a" + "\n" * count + "b" for count in (1, 2, 3, 5, 31, 32, 40, 70)),
    "\t\t\tif x:\n\t\t\t\treturn\n \n  \n\t \n",
    "\r\nWindows\r\n\r\nends\r",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, zero\u200bwidth, \u2028line\u2029paragraph",
    "\ufeffmark \u00ad soft \x00 nul \x07 bell \x7f \x0b\x0c",
    "こんにちは、世界。日本語の文です。ｱｲｳ　東京都渋谷区１２３",
    "我想在apple工作1314151天～ 繁體中文",
    "안녕하세요 세계",
    "def f(x):\n    return {'a': [x ** 2], \"b\": x != 0}\n\n\n#include <stdio.h>\nint main() { return a->b; }\n",
    "<html><table><tr><td>1</td></tr></table>&nbsp;</html> [INST] <<SYS>> </INST>",
    "😀 👨‍👩‍👧‍👦 👍🏽 🇯🇵 ❤️ é ñ ½ ² ① Ω — “quotes” … ﬁ",
    "e\u0301 n\u0303 a\u030a が か\u3099 ﷺ Z͑ͫ̓͂a̴l͖g̵o",
    "Привет, мир! Ελληνικά שלום مرحبا بالعالم हिन्दी ไทย ქართული አማርኛ தமிழ்",
    "ᚠᛇᚻ 𐍈 𒀀 𓀀 ꙮ ⵣ ᓀ 𝔘𝔫𝔦 𠮷 \U0010fffd \ue000",
    "a byte's piece written out: <0x0A>",
    "aaaaaaaaaaaaaaaaa 0000000000000 ------------ ======== ........ !!!!!!!",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
)


@dataclass(frozen=True)
class Rebuilt:
    """model: the serialized ModelProto. user_defined: {text: id} of its user-defined pieces, as they occur in texts."""

    model: bytes
    user_defined: dict[str, int]


def read_state(folder: Path) -> dict[str, Any] | None:
    """The folder's `tokenizer.json` where it is a sentencepiece BPE with byte fallback, else None."""
    state = _read(folder / "tokenizer.json")
    model = state.get("model") or {}
    return state if "merges" in model and model.get("byte_fallback") else None


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object, empty where there is no file. Raises UserError for anything else."""
    return read_json(path, "Copy the file from the base model again.") if path.is_file() else {}


def rebuild_checked(folder: Path, tokenizer: Any | None = None, texts: Sequence[str] = ()) -> Rebuilt | None:
    """The folder's `tokenizer.model`, checked on HARD_TEXTS and `texts`; None where its kind of tokenizer has none.

    tokenizer: the folder's, where it is loaded already. Raises UserError where it cannot be rebuilt.
    """
    kind = ModelFolder(folder).model_type if is_model_folder(folder) else ""
    if (state := read_state(folder)) is None or kind.startswith(_READ_AS_JSON):
        return None
    tokenizer = open_tokenizer(folder) if tokenizer is None else tokenizer
    state |= _effective(tokenizer)
    names = {name: getattr(tokenizer, f"{name}_token") for name in ("unk", "bos", "eos", "pad")}
    try:
        rebuilt = rebuild(state, names)
        check_model(rebuilt.model, tokenizer, texts)
    except ValueError as error:
        raise UserError(
            f"{folder} has no {NAME}, and none can be made from its tokenizer.json: {error}", REMEDY
        ) from None
    return rebuilt


def write(folder: Path) -> None:
    """Write the rebuilt and checked `tokenizer.model`, where the folder's kind has one; UserError where that fails.

    `added_tokens.json` is written too: the converter reads user-defined pieces from nowhere else.
    """
    if (rebuilt := rebuild_checked(folder)) is None:
        return
    if rebuilt.user_defined:
        (folder / "added_tokens.json").write_text(json.dumps(rebuilt.user_defined, ensure_ascii=False), "utf-8")
    else:
        (folder / "added_tokens.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = _read(path)
    if decoder := config.get("added_tokens_decoder"):
        # The converter would split texts at these before merging; to transformers a text's spaces are no ▁.
        config["added_tokens_decoder"] = {
            number: token for number, token in decoder.items() if token.get("special") or _SPACE not in token["content"]
        }
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / NAME).write_bytes(rebuilt.model)


def adapt_space_prefix(folder: Path) -> None:
    """Make llama.cpp tokenize prompts as training did, where transformers puts a space only before a text's start.

    A chat that starts with a control token never had that space. llama.cpp, where it puts one, does so after every
    control token. So the folder's tokenizer is changed to put none.
    """
    if (state := read_state(folder)) is None:
        return
    tokenizer = open_tokenizer(folder)
    part = _effective(tokenizer)["pre_tokenizer"] or {}
    if part.get("type") != "Metaspace" or part["prepend_scheme"] != "first":
        return
    from jinja2 import TemplateError

    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return  # a template that needs other turns: the tokenizer stays as it is
    if not chat.startswith(tuple(token.content for token in tokenizer.added_tokens_decoder.values())):
        return
    state["pre_tokenizer"] = part | {"prepend_scheme": "never"}
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"  # the converter, and transformers' own class, read it here
    config = _read(path)
    path.write_text(json.dumps(config | {"add_prefix_space": False}, indent=2, ensure_ascii=False), encoding="utf-8")


def comparable(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """`texts` without what transformers and sentencepiece treat differently, whatever the vocabulary.

    transformers' Metaspace puts a space before a text unless there is one; sentencepiece and llama.cpp always do.
    """
    part = _effective(tokenizer)["pre_tokenizer"] or {}
    prefixed = part.get("type") == "Metaspace" and part["prepend_scheme"] != "never"
    return [text.lstrip(" ") if prefixed else text for text in texts]


def _effective(tokenizer: Any) -> dict[str, Any]:
    """Added tokens, normalizer and pre-tokenizer as they are used: some classes of transformers replace them."""
    backend = tokenizer.backend_tokenizer
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    return {name: part and json.loads(part.__getstate__()) for name, part in parts.items()} | {
        "added_tokens": [
            {"id": number, "content": token.content, "special": token.special}
            for number, token in tokenizer.added_tokens_decoder.items()
        ]
    }


def rebuild(state: dict[str, Any], names: dict[str, str | None]) -> Rebuilt:
    """The sentencepiece model that encodes as `state`, the contents of a `tokenizer.json`, does.

    names: which pieces are "unk", "bos", "eos" and "pad". Both algorithms join the first pair of neighbors in an order:
    by the merge's rank there, by the resulting piece's score here. So a piece's score is minus the rank of its first
    merge. Raises ValueError, with the reason, where sentencepiece has no equivalent.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = state["model"]
    added = {token["id"]: token for token in state.get("added_tokens", [])}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    unknown = model.get("unk_token") or names.get("unk") or "<unk>"
    _check_vocabulary(model, texts, unknown)
    ranks = _first_ranks(model["merges"])

    proto, kinds = ModelProto(), ModelProto.SentencePiece
    user_defined: dict[str, int] = {}
    for number in range(len(texts)):
        text, kind = texts[number], kinds.NORMAL
        if text == unknown:
            kind = kinds.UNKNOWN
        elif number in added and added[number]["special"]:
            kind = kinds.CONTROL
        elif number in added and _SPACE not in text:  # with it, transformers looks for a written ▁, not for spaces
            kind = kinds.USER_DEFINED
            user_defined[text] = number
            text = text.replace(" ", _SPACE)
        elif _BYTE.fullmatch(text):
            kind = kinds.BYTE
        proto.pieces.add(piece=text, score=-float(ranks.get(text, len(model["merges"]))), type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(texts)
    trainer.byte_fallback = True
    numbers = {text: number for number, text in texts.items()}
    for name, piece in {**names, "unk": unknown}.items():
        setattr(trainer, f"{name}_id", numbers.get(piece or "", -1))
        if piece:
            setattr(trainer, f"{name}_piece", piece)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = _prefixed(state)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return Rebuilt(proto.SerializeToString(), user_defined)


def _check_vocabulary(model: dict[str, Any], texts: dict[int, str], unknown: str) -> None:
    """Raises ValueError where a sentencepiece model cannot hold these pieces. `texts`: all of them by number."""
    for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"sentencepiece has no {name}.")
    if sorted(texts) != list(range(len(texts))):
        raise ValueError(f"its {len(texts)} pieces are not numbered from 0 to {len(texts) - 1}.")
    if missing := [byte for byte in (f"<0x{i:02X}>" for i in range(256)) if byte not in model["vocab"]]:
        raise ValueError(f"{len(missing)} bytes have no piece, such as {missing[0]}.")
    if unknown not in model["vocab"]:
        raise ValueError(f"its vocabulary has no {unknown}.")


def _first_ranks(merges: list[Any]) -> dict[str, int]:
    """The rank of the first merge that makes each piece. A merge is "a b" or ["a", "b"]."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return ranks


def _prefixed(state: dict[str, Any]) -> bool:
    """Whether a space is put before a text; ValueError where a text is changed by more than writing its spaces as ▁."""
    escaped = prefixed = False
    for part in [*_flat(state.get("normalizer")), *_flat(state.get("pre_tokenizer"))]:
        match part:
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escaped = True
            case {"type": "Prepend", "prepend": "▁"}:
                prefixed = True
            case {"type": "Metaspace", "replacement": "▁"}:
                escaped, prefixed = True, part.get("prepend_scheme", "always") != "never"
            case {"type": "Split", "pattern": {"String": " "}} if escaped:
                pass  # no space is left to split at
            case _:
                shown = json.dumps(part, ensure_ascii=False)[:200]
                raise ValueError(f"sentencepiece has no equivalent of its {shown}.")
    if not escaped:
        raise ValueError("it does not write spaces as ▁.")
    return prefixed


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [part] if inner is None else [deep for one in inner for deep in _flat(one)]


def check_model(model: bytes, tokenizer: Any, texts: Sequence[str]) -> None:
    """ValueError, with the first difference, unless `model` encodes HARD_TEXTS and `texts` as `tokenizer` does.

    Texts are split at control tokens, which sentencepiece by design does not read from a text. Where a space is put
    before a text, they are split at every added token, after which transformers starts again. Parts with a ▁ of their
    own are skipped: to sentencepiece it is a space.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
    except Exception as error:  # a piece that is empty, or stands twice
        raise ValueError(f"sentencepiece refuses it: {first_line(error)}") from None
    added = tokenizer.added_tokens_decoder
    size = processor.get_piece_size()
    if beyond := [token.content for number, token in added.items() if number >= size]:
        raise ValueError(f"{beyond[0]!r} is missing.")
    prefixed = processor.normalize("a") != "a"
    cut = [
        token.content
        for number, token in added.items()
        if prefixed or processor.is_control(number) or processor.is_unknown(number)
    ]
    parts = [*HARD_TEXTS, *texts]
    if cut:
        at = re.compile("|".join(re.escape(token) for token in sorted(cut, key=len, reverse=True)))
        parts = [part for text in parts for part in at.split(text)]
    parts = [part for part in dict.fromkeys(comparable(parts, tokenizer)) if part and _SPACE not in part]
    expected = tokenize(tokenizer, parts)["input_ids"]
    for part, wanted, got in zip(parts, expected, processor.encode(parts), strict=True):
        if wanted != got:
            first = next((i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), -1)
            shown = slice(max(first - 3, 0), first + 5) if first >= 0 else slice(-8, None)
            raise ValueError(
                f"rebuilt, it encodes {part[:60]!r} with the ids ... {got[shown]} in place of {wanted[shown]}."
            )
