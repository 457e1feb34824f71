"""Small tokenizers whose tokenizer.json is a sentencepiece BPE with byte fallback, made in the blink of an eye."""

import json
from pathlib import Path

BYTES = [f"<0x{number:02X}>" for number in range(256)]
CORPUS = [
    "the cat sat on the mat and the hat, then the other cat ran",
    "hello hello world, this is what there is; is it not what it is?",
    "return x and return the other thing in the end",
    "aaaa bbbb abab     spaces        here",
    "日本語の文です。日本の文",
]


def vocabulary(first: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`first`, bytes, pieces in the order of their merging, characters; and, as sentencepiece has it, every merge that
    makes a piece."""
    from tokenizers import Tokenizer, models, trainers

    learned = Tokenizer(models.BPE())
    # in one piece, so that runs of spaces are learned too
    learned.train_from_iterator(
        [line.replace(" ", "▁") for line in CORPUS], trainers.BpeTrainer(vocab_size=160, max_token_length=6)
    )
    pieces = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    long = [piece for piece, _ in pieces if len(piece) > 1 and piece not in first]
    letters = [piece for piece, _ in pieces if len(piece) == 1]
    ids = {piece: number for number, piece in enumerate([*first, *BYTES, *long, *letters])}
    known = {*long, *letters, *first}
    made = [piece for piece in [*first, *long] if set(piece) <= {"▁", "\n"} or piece in long]
    merges = [(p[:i], p[i:]) for p in made for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
    return ids, merges


def write_gemma_like(folder: Path) -> Path:
    """No space is put before a text; runs of newlines, runs of spaces and a tag are added, but not special."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    plain = [*("\n" * count for count in range(1, 5)), "▁▁", "▁▁▁", "▁▁▁▁", "<td>"]
    ids, merges = vocabulary(special + plain)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    names = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return _write(folder, ids, merges, special, plain, spaces, split, "<unk>", names)


def write_llama_like(folder: Path, metaspace: str | None = None) -> Path:
    """A space is put before a text and after every added token; by Metaspace where it is given a prepend scheme."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    ids, merges = vocabulary(special)
    normalizer = pre_tokenizer = None
    if metaspace:
        pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": metaspace, "split": False}
    else:
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    names = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    return _write(folder, ids, merges, special, [], normalizer, pre_tokenizer, None, names)


def _write(folder, ids, merges, special, plain, normalizer, pre_tokenizer, unknown, names) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": ids[text], "content": text, **flags, "special": text in special} for text in special + plain]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
        | {"ignore_merges": False, "vocab": ids, "merges": [list(merge) for merge in merges]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    config = names | {"unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
