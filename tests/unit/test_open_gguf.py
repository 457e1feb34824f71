"""A GGUF that claims more than it holds."""

import struct
from pathlib import Path

import pytest

from common.errors import UserError
from common.models.gguf_import import open_gguf


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
