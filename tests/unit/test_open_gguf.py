"""A GGUF that claims more than it holds, and those of which transformers would make another model."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from common.errors import UserError
from common.models.gguf_import import check_readable, open_gguf


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IIQ", 9, 4, 1 << 40),  # an array of so many numbers
        struct.pack("<IIQ", 9, 8, 1 << 40),  # of texts
        struct.pack("<IQ", 8, 1 << 40),  # a text
        struct.pack("<I", 4),  # a number that is not there
    ],
)
def test_a_claim_beyond_the_end_is_an_error_at_once(value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.type") + value)
    with pytest.raises(UserError, match=r"a\.gguf cannot be read as a GGUF"):
        open_gguf(path, "")


def written(path: Path, kind: str, tensor: str = "output_norm.weight", **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, kind)
    for name, value in values.items():
        key = name.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tensor(tensor, np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        (
            "gemma3",
            {"gemma3__rope__scaling__type": "linear"},
            r"the RoPE scaling of this GGUF \(rope.scaling.type 'linear'",
        ),
        ("llama", {"tensor": "rope_freqs.weight"}, r"the RoPE scaling of this GGUF \(rope_freqs.weight"),
        ("phi3", {"tensor": "rope_factors_long.weight"}, r"the RoPE scaling of this GGUF \(rope_factors_long.weight"),
        ("llama", {"split__count": 2}, "this is one part of a GGUF in several"),
        ("gemma3", {"gemma3__block_count": 62}, "does not say how its attention is scaled"),
    ],
)
def test_what_would_become_another_model_is_refused(kind: str, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        check_readable(written(tmp_path / "a.gguf", kind, **more))


def test_a_usual_gguf_is_read(tmp_path: Path) -> None:
    check_readable(written(tmp_path / "a.gguf", "llama", split__count=1, llama__rope__scaling__type="none"))
    check_readable(written(tmp_path / "b.gguf", "gemma3", gemma3__block_count=34))
