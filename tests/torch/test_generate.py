"""Generation with a cache of keys and values. The families are in tests/parity."""

from pathlib import Path

import pytest

import benchmarks.architectures as unknown
from tests import backends
from tests.backends import METHODS
from tests.tiny import write_model, write_rows, write_tokenizer
from torch_backend.forward import PlainForward

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("changes", [{}, METHODS["dora"], {"dropout": 0.2}], ids=["lora", "dora", "dropout"])
def test_greedy_tokens_are_those_of_the_whole_row(changes, tmp_path):
    folder = write_model(tmp_path / "model")
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    backends.check_generation("torch", folder, rows, **changes)


@pytest.mark.parametrize("kind", ["seed_oss", "mamba", "granitemoehybrid", "exaone_moe"])
def test_a_model_that_was_tried_keeps_its_row_and_computes_one_id_a_token(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lengths = unknown.write_model(kind, tmp_path / kind).path, []
    write_tokenizer(folder)
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    continuing = PlainForward.continuing

    def watched(forward):
        forward.model.register_forward_pre_hook(
            lambda model, given, named: lengths.append(named["input_ids"].shape[1]) if named["use_cache"] else None,
            with_kwargs=True,
        )
        return continuing(forward)

    monkeypatch.setattr(PlainForward, "continuing", watched)
    backends.check_generation("torch", folder, rows, targets=["q_proj", "in_proj"])
    assert set(lengths) == {1, 20}
