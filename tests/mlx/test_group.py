"""What ranks send each other over MLX, here in a group of one."""

import pytest

from mlx_backend import group


@pytest.mark.parametrize("data", [b"", b"0", b"0123456789", b"012345678"])
def test_a_message_is_sent_in_parts(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_MOST", 3)
    assert group.MlxGroup().broadcast(data) == data
