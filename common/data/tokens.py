"""The tokens of a text, and where a turn's begin and end among them."""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.turn_edges import Unlabeled
from common.model_files import encode_texts, tokenize

_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # as sentencepiece writes them
_KNOWN, _SHORT = 1000, 200  # texts whose tokens are remembered, and the characters of the longest


class Tokens:
    """A text's tokens in order. special: which of them are special tokens, ascending."""

    def __init__(self, text: str, ids: Sequence[int], is_special: np.ndarray) -> None:
        self.text, self.ids = text, np.asarray(ids, np.int32)
        self.special = np.flatnonzero(is_special.take(self.ids, mode="clip"))


class Offsets:
    """The characters that each token of a text was made of, from `starts` to `ends`; both are ascending."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.starts, self.ends = np.asarray(pairs, np.int64).reshape(-1, 2).T
        if np.any(self.starts[1:] < self.starts[:-1]) or np.any(self.ends[1:] < self.ends[:-1]):
            raise Unlabeled("the tokens are not in the order of the text")

    def before(self, position: int) -> int:
        """How many tokens start before the position."""
        return int(np.searchsorted(self.starts, position))

    def cross(self, position: int) -> bool:
        """Whether a token has characters on both sides of the position."""
        count = self.before(position)
        return count > 0 and bool(self.ends[count - 1] > position)


class TextTokenizer:
    """A tokenizer with what is known of its special tokens.

    A special token is cut out of a text before all else, so the tokens before, between and behind special tokens are
    those of these parts alone. To compute offsets takes as long as to tokenize. They are not needed where a turn begins
    a known header after a special token and ends with one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id  # looked up once: each time takes 1 us
        added = tokenizer.added_tokens_decoder.items()
        special = {number: token for number, token in added if token.special and not token.normalized}
        self._is_special = np.zeros(max(special, default=0) + 2, bool)
        self._is_special[list(special)] = True
        texts = sorted((re.escape(str(token)) for token in special.values()), key=len, reverse=True)
        plain = not any(token.lstrip or token.rstrip or token.single_word for token in special.values())
        self._marks = re.compile("|".join(texts)) if texts and plain and _keeps_every_character(tokenizer) else None
        self._known: dict[str, list[int]] = {}  # the tokens of what stands between a special token and an answer

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, without any that the tokenizer would add."""
        found = encode_texts(self.tokenizer, texts, offsets=False)
        return [Tokens(text, encoding.ids, self._is_special) for text, encoding in zip(texts, found, strict=True)]

    def spans(self, tokens: Tokens, turns: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """As tokens, each turn's first, the one that ends it (or one beyond its last) and one beyond all of it.

        turns: the characters of each, its start, stop and end. Raises Unlabeled where a token crosses an edge of a
        turn, or the prompt would have other tokens without the answer behind it.
        """
        return self._by_special_tokens(tokens, turns) or self._by_offsets(tokens, turns)

    def _by_special_tokens(
        self, tokens: Tokens, turns: Sequence[tuple[int, int, int]]
    ) -> list[tuple[int, int, int]] | None:
        """The same without offsets; None where they are needed."""
        marks = [match.span() for match in self._marks.finditer(tokens.text)] if self._marks else []
        if len(marks) != len(tokens.special):
            return None
        numbers, found = {mark: number for number, mark in enumerate(marks)}, []
        ends = [end for _, end in marks]
        for start, stop, end in turns:
            opening, closing = bisect_right(ends, start) - 1, numbers.get((stop, end), 0)
            if opening < 0 or closing <= opening or marks[opening + 1][0] < start:
                return None
            before, last = int(tokens.special[opening]), int(tokens.special[closing])
            header = self._ids(tokens.text[marks[opening][0] : start])
            first = before + len(header)
            if first > last or tokens.ids[before:first].tolist() != header:
                return None
            found.append((first, last, last + 1))
        return found

    def _by_offsets(self, tokens: Tokens, turns: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        offsets, found = self.offsets(tokens), []
        for start, stop, end in turns:
            first, last, beyond = map(offsets.before, (start, stop, end))
            if offsets.cross(start) or offsets.cross(stop):
                raise Unlabeled("a token crosses the edge of an assistant turn")
            # some tokenizers put a token without characters before a text, which is not the answer's
            written = np.flatnonzero(offsets.ends[first:beyond] > offsets.starts[first:beyond])
            first += int(written[0]) if len(written) else 0
            self._check_prompt(tokens, offsets, start, first if len(written) else 0)
            found.append((first, last, beyond))
        return found

    def offsets(self, tokens: Tokens) -> Offsets:
        (encoding,) = encode_texts(self.tokenizer, [tokens.text], offsets=True)
        return Offsets(encoding.offsets)

    def _check_prompt(self, tokens: Tokens, offsets: Offsets, end: int, count: int) -> None:
        """Raises Unlabeled where the prompt, the text up to `end`, has not the first `count` tokens when it is alone.

        Only what follows its last special token is tokenized.
        """
        earlier = int(np.searchsorted(tokens.special, count))
        first = int(tokens.special[earlier - 1]) if earlier else 0
        start = int(offsets.starts[first]) if earlier else 0
        if self._ids(tokens.text[start:end]) != tokens.ids[first:count].tolist():
            raise Unlabeled("the prompt's tokens are not a prefix of the conversation's")

    def _ids(self, text: str) -> list[int]:
        """The text's tokens; those of a short one, such as the header of a turn, are remembered."""
        if text in self._known:
            return self._known[text]
        ids = tokenize(self.tokenizer, text)["input_ids"]
        if len(text) <= _SHORT and len(self._known) < _KNOWN:
            self._known[text] = ids
        return ids


def _keeps_every_character(tokenizer: Any) -> bool:
    """Whether every token stands for characters of the text, and no two texts have the same tokens, but for spaces.

    So it is with a byte-level tokenizer that adds none of its own, and with Gemma's, which has a token for each byte.
    """
    backend = tokenizer.backend_tokenizer
    splits = _listed(backend.pre_tokenizer, "pretokenizers")
    adds = any(part.get("add_prefix_space") or part["type"] == "Metaspace" for part in splits)
    norms = _listed(backend.normalizer, "normalizers")
    if any(part["type"] == "ByteLevel" for part in splits):
        return not adds and {part["type"] for part in norms} <= {"NFC"}
    bytes_known = all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return norms == [_SPACES] and not adds and bytes_known and getattr(backend.model, "byte_fallback", False)


def _listed(part: Any, inner: str) -> list[dict[str, Any]]:
    """The settings of a part of a tokenizer, as tokenizer.json has them: of each that a sequence is made of."""
    settings: dict[str, Any] = json.loads(part.__getstate__()) if part else {"type": "Sequence", inner: []}
    found: list[dict[str, Any]] = settings[inner] if settings["type"] == "Sequence" else [settings]
    return found
