"""The client of twintune-logits, with a program in place of the tool: requests in parts, and one that hangs."""

import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.llama_cpp.logits import GgufLogits

# It knows three tokens, answers each position by the ids' sum, and hangs at a row of one id.
TOOL = """
import array, sys, time
sys.stdout.buffer.write(array.array("i", [3]).tobytes()); sys.stdout.buffer.flush()
while head := sys.stdin.buffer.read(8):
    tokens, wanted = array.array("i", head)
    ids = array.array("i", sys.stdin.buffer.read(4 * tokens)); sys.stdin.buffer.read(4 * wanted)
    if tokens == 1: print("thinking", file=sys.stderr, flush=True); time.sleep(300)
    sys.stdout.buffer.write(array.array("f", [sum(ids)] * 3 * wanted).tobytes()); sys.stdout.buffer.flush()
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    path = tmp_path / "twintune-logits"
    path.write_text(f"#!{sys.executable}\n{TOOL}")
    path.chmod(0o755)
    return path


class Short:
    """A pipe that takes a part of what it is given, as a system may where a signal comes."""

    def __init__(self, pipe) -> None:
        self.pipe, self.close = pipe, pipe.close

    def write(self, data) -> int:
        return self.pipe.write(data[:1000])


def test_a_request_of_which_a_part_is_taken_is_sent_to_its_end(tool: Path, tmp_path: Path) -> None:
    with GgufLogits(tool, tmp_path / "m.gguf", 50_000, seconds=60) as model:
        model._process.stdin = Short(model._process.stdin)
        found = model(np.ones(50_000, np.int32), np.array([3, 5]))
    assert model.vocabulary == 3
    np.testing.assert_array_equal(found, np.full((2, 3), 50_000, np.float32))


@pytest.mark.slow
def test_a_tool_that_hangs_is_ended(tool: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no logits for .*m\.gguf within 2 s:\nthinking"),
        GgufLogits(tool, tmp_path / "m.gguf", 8, seconds=2) as model,
    ):
        model(np.ones(1, np.int32), np.array([0]))


def test_a_tool_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"returned no logits for .*\n.*nothing: No such file"),
        GgufLogits(tmp_path / "nothing", tmp_path / "m.gguf", 8),
    ):
        pass
