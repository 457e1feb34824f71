"""What is known of a row without its text: keys for equal rows and equal prompts, and what looks suspicious."""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from common.data.dataset import Dataset, Example, beginning_keys, content_key, prompt_key
from common.data.personal import has_secret
from common.data.quality import breaks_off, placeholder
from common.recipe import VERSION

# Plain text; a placeholder in it; its last answer ends in the middle; a key or token in it.
TEXT, PLACEHOLDER, BREAKS_OFF, SECRET = 1, 2, 4, 8


@dataclass(frozen=True)
class Facts:
    """Of N rows. Two rows with one key of 64 bits are taken for equal: among a million others, 1 time in 10^13."""

    contents: np.ndarray  # [N] uint64: equal for equal rows, whatever their weights
    beginnings: np.ndarray  # [N, 2] uint64: contents up to the first answer and up to the one before the last; or all
    prompts: np.ndarray  # [N] uint64: equal for rows that ask the same
    digests: np.ndarray  # [N, 32] uint8: SHA-256 of contents and weights
    flags: np.ndarray  # [N] uint8: TEXT, PLACEHOLDER, BREAKS_OFF, SECRET

    @staticmethod
    def of(rows: Iterable[Example]) -> "Facts":
        found = [_facts(row) for row in rows]
        contents, beginnings, prompts, digests, flags = zip(*found, strict=True) if found else ((),) * 5
        return Facts(
            np.frombuffer(b"".join(contents), "<u8"),
            np.frombuffer(b"".join(beginnings), "<u8").reshape(-1, 2),
            np.frombuffer(b"".join(prompts), "<u8"),
            np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
            np.array(flags, np.uint8),
        )

    @staticmethod
    def joined(parts: Sequence["Facts"]) -> "Facts":
        names = Facts.__dataclass_fields__
        return Facts(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def take(self, chosen: np.ndarray) -> "Facts":
        return Facts(*(getattr(self, name)[chosen] for name in Facts.__dataclass_fields__))

    def are(self, flag: int) -> np.ndarray:
        """[N] bool: which rows have the flag."""
        return (self.flags & flag) > 0


_BREAK = re.compile(r"\\[nrt]")  # in JSON: its letter would be taken for the first of a key


def _facts(row: Example) -> tuple[bytes, bytes, bytes, bytes, int]:
    key = content_key(row)
    digest = hashlib.sha256(key.encode())
    content = digest.digest()[:8]
    beginnings = b"".join(map(_short, beginning_keys(row))) or 2 * content
    if (weights := _weights(row)) is not None:
        digest.update(weights)
    text = row.text if row.text is not None else "\n".join(message["content"] for message in row.messages)
    flags = TEXT * (row.text is not None) | PLACEHOLDER * bool(placeholder(text)) | BREAKS_OFF * breaks_off(row)
    flags |= SECRET * has_secret(_BREAK.sub(" ", key))
    return content, beginnings, _short(prompt_key(row)), digest.digest(), flags


def _short(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()[:8]


def _weights(row: Example) -> bytes | None:
    """The weights of the row and its messages as JSON; None where all are 1."""
    weights = [row.weight, *(message.get("weight", 1.0) for message in row.messages)]
    return json.dumps(weights).encode() if any(weight != 1 for weight in weights) else None


class Sources(Sequence[str]):
    """The sources of a file's rows: `train.jsonl:17`."""

    def __init__(self, name: str, numbers: np.ndarray) -> None:
        self.name, self.numbers = name, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> "Sources": ...
    def __getitem__(self, at: Any) -> Any:
        return Sources(self.name, self.numbers[at]) if isinstance(at, slice) else f"{self.name}:{self.numbers[at]}"


class KnownRows(Sequence[Example]):
    """Rows of which more is known than their text."""

    facts: Facts
    sources: Sequence[str]

    @abstractmethod
    def take(self, chosen: np.ndarray) -> "KnownRows":
        """The rows with these indices, which ascend."""


def facts_of(rows: Sequence[Example]) -> Facts:
    return rows.facts if isinstance(rows, KnownRows) else Facts.of(rows)


def sources_of(rows: Sequence[Example]) -> Sequence[str]:
    return rows.sources if isinstance(rows, KnownRows) else [row.source for row in rows]


def take(rows: Sequence[Example], chosen: np.ndarray) -> Sequence[Example]:
    """The rows with these indices, which ascend."""
    return rows.take(chosen) if isinstance(rows, KnownRows) else [rows[i] for i in chosen]


def data_hash(data: Dataset, version: int = VERSION) -> str:
    """SHA-256 over the contents of training and validation rows in order; names and formatting do not enter.

    Weights do where they are not 1. version: of the recipe that holds the hash.
    """
    digest = hashlib.sha256()
    for part in (data.train, data.valid):
        if version > 2:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(facts_of(part).digests.tobytes())
            continue
        for row in part:
            digest.update(content_key(row).encode())
            digest.update((_weights(row) or b"") + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()
