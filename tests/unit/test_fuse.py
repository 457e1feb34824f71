"""Fused bytes against float64, rounded once; everything else copied as it is."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.model_files import shard_files
from common.models import fuse as module
from common.models import safetensors_files
from common.models.fuse import differing, fuse
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import read_header
from tests.unit.base_folder import DOWN, DTYPES, Q, tensors, write_base

INTEGERS = {"BF16": np.int16, "F16": np.int16, "F32": np.int32}


def adapter(names: tuple[str, ...] = (Q, DOWN), rank: int = 3) -> Adapter:
    random = np.random.default_rng(5)
    weights = {}
    for name in names:
        into = 12 if name == DOWN else 8
        A, B = (random.normal(0, 0.1, shape).astype(np.float32) for shape in ((rank, into), (8, rank)))
        weights[name] = LoraWeight(A, B, 7.0)
    return Adapter("some/model", 1, 0.0, weights)


def fused(base: Path, out: Path, the_adapter: Adapter | None = None) -> Path:
    out.mkdir()
    fuse(ModelFolder(base), the_adapter or adapter(), out, lambda share, text: None)
    return out


def reference(base: np.ndarray, weight: LoraWeight) -> np.ndarray:
    """In float64, rounded once."""
    delta = weight.B.astype(np.float64) @ weight.A.astype(np.float64)
    return (base.astype(np.float64) + weight.alpha / weight.rank * delta).astype(base.dtype)


def ulps(one: np.ndarray, other: np.ndarray, dtype: str) -> int:
    """How many representable numbers lie between the two, at most."""
    bits = INTEGERS[dtype]
    low = np.iinfo(bits).min
    ordered = [np.where(a.view(bits) < 0, low - a.view(bits).astype(np.int64), a.view(bits)) for a in (one, other)]
    return int(np.abs(ordered[0] - ordered[1]).max())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_adapted_layers_are_the_sum_in_float64_rounded_once(tmp_path: Path, dtype: str) -> None:
    out = fused(write_base(tmp_path / "base", dtype), tmp_path / "out")
    got, before = load_file(out / "model.safetensors"), tensors(dtype)
    for name in (Q, DOWN):
        wanted = reference(before[f"{name}.weight"], adapter().weights[name])
        assert got[f"{name}.weight"].dtype == DTYPES[dtype]
        assert ulps(got[f"{name}.weight"], wanted, dtype) <= 1
        assert not np.array_equal(got[f"{name}.weight"], before[f"{name}.weight"])


def test_in_float32_the_error_is_within_two_units_of_the_summands(tmp_path: Path) -> None:
    got = load_file(fused(write_base(tmp_path / "base", "F32"), tmp_path / "out") / "model.safetensors")
    for name, weight in adapter().weights.items():
        base = tensors("F32")[f"{name}.weight"]
        exact = reference(base.astype(np.float64), weight)
        largest = np.abs(base) + np.float32(weight.scale) * (np.abs(weight.B) @ np.abs(weight.A))
        assert got[f"{name}.weight"].dtype == np.float32
        assert (np.abs(got[f"{name}.weight"] - exact) <= 2 * np.spacing(largest)).all()


def test_in_bf16_nearly_every_number_is_the_exact_rounding(tmp_path: Path) -> None:
    out = fused(write_base(tmp_path / "base", "BF16"), tmp_path / "out")
    got = load_file(out / "model.safetensors")[f"{DOWN}.weight"]
    wanted = reference(tensors("BF16")[f"{DOWN}.weight"], adapter().weights[DOWN])
    assert np.mean(got == wanted) > 0.98


def test_ulps_counts_neighbors() -> None:
    one = np.array([1.0, -1.0, 0.0], np.float32)
    assert ulps(one, np.nextafter(one, np.float32(9)), "F32") == 1
    assert ulps(np.array([0.0], np.float32), np.array([-0.0], np.float32), "F32") <= 1


@pytest.mark.parametrize("elements", [1, 8, 20, 24, 1 << 22])
def test_the_bytes_do_not_depend_on_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    base = write_base(tmp_path / "base", "F32")
    whole = (fused(base, tmp_path / "whole") / "model.safetensors").read_bytes()
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    assert (fused(base, tmp_path / "blocks") / "model.safetensors").read_bytes() == whole


def test_the_header_and_all_other_tensors_stay_byte_for_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    out = fused(base, tmp_path / "out")
    old, new = ((folder / "model.safetensors").read_bytes() for folder in (base, out))
    header, start = read_header(base / "model.safetensors")
    assert (len(new), new[:start]) == (len(old), old[:start])
    assert b'"__metadata__":{"format":"pt"}' in new[:start]
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        changed = name in (f"{Q}.weight", f"{DOWN}.weight")
        assert (new[begin:end] != old[begin:end]) == changed, name


def test_several_shards_make_the_same_tensors(tmp_path: Path) -> None:
    one = fused(write_base(tmp_path / "base1"), tmp_path / "out1")
    base = write_base(tmp_path / "base3", shards=3)
    three = fused(base, tmp_path / "out3")
    assert sorted(p.name for p in three.iterdir()) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    together = {name: tensor for path in three.iterdir() for name, tensor in load_file(path).items()}
    alone = load_file(one / "model.safetensors")
    assert together.keys() == alone.keys()
    assert all(np.array_equal(together[name], alone[name]) for name in alone)


def test_an_adapter_that_was_not_trained_changes_no_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    start = {name: LoraWeight(w.A, np.zeros_like(w.B), 7.0) for name, w in adapter().weights.items()}
    out = fused(base, tmp_path / "out", Adapter("some/model", 1, 0.0, start))
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_an_adapter_for_a_layer_that_the_base_lacks(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    with pytest.raises(UserError) as caught:
        fused(base, tmp_path / "out", adapter((Q, "model.layers.7.self_attn.q_proj")))
    assert caught.value.what == (
        f"{base} has no weights for 1 trained modules, such as model.layers.7.self_attn.q_proj.weight."
    )


def test_progress_rises_with_every_tensor(tmp_path: Path) -> None:
    base, said = write_base(tmp_path / "base", shards=2), []
    (tmp_path / "out").mkdir()
    fuse(ModelFolder(base), adapter(), tmp_path / "out", lambda share, text: said.append((share, text)))
    shares = [share for share, _ in said]
    assert shares == sorted(shares)
    assert len(said) == 5
    assert 0 < shares[0] < shares[-1] <= 1


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"version https://git-lfs.github.com/spec/v1\n", b"\x02" + b"\0" * 7 + b"{"]
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        read_header(path)


SOUND = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "1",
        '{"a": ' * 5000,
        json.dumps({"a": []}),
        json.dumps({"a": SOUND | {"dtype": 1}}),
        json.dumps({"a": SOUND | {"shape": [2, 4]}}),
        json.dumps({"a": SOUND | {"shape": [-2, -3]}}),
        json.dumps({"a": SOUND | {"shape": [2.0, 3]}}),
        json.dumps({"a": SOUND | {"shape": None}}),
        json.dumps({"a": SOUND | {"data_offsets": [0]}}),
        json.dumps({"a": SOUND | {"data_offsets": [24, 0]}, "b": SOUND}),
        json.dumps({"a": SOUND | {"data_offsets": [-24, 0]}, "b": SOUND}),
        json.dumps({"a": {"dtype": "F32", "shape": [2, 3]}}),
    ],
)
def test_a_header_that_says_something_else(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"

    def write(text: str) -> None:
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(24))

    write(json.dumps({"a": SOUND, "__metadata__": {"format": "pt"}}))
    assert read_header(path)[0] == {"a": SOUND}
    write(header)
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        read_header(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # a sparse file
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        read_header(path)


def test_a_file_that_was_not_fetched_to_its_end(tmp_path: Path) -> None:
    path = write_base(tmp_path / "base") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        read_header(path)


def test_dora_brings_rows_to_their_learned_lengths(tmp_path: Path) -> None:
    lora = adapter()
    lengths = {name: np.linspace(0.5, 2, 8, dtype=np.float32) for name in lora.weights}
    dora = {n: LoraWeight(w.A, w.B, w.alpha, False, lengths[n]) for n, w in lora.weights.items()}
    got = load_file(
        fused(write_base(tmp_path / "base", "F32"), tmp_path / "out", Adapter("m", 1, 0.0, dora, dora=True))
        / "model.safetensors"
    )
    for name, weight in lora.weights.items():
        sum_ = reference(tensors("F32")[f"{name}.weight"].astype(np.float64), weight)
        wanted = lengths[name][:, None] * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True)
        np.testing.assert_allclose(got[f"{name}.weight"], wanted, rtol=2e-6)


def test_tensors_that_stand_in_for_the_bases_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "BF16")
    other = tensors("F32")[f"{Q}.weight"] * 3
    (tmp_path / "out").mkdir()
    only_down = Adapter("m", 1, 0.0, {DOWN: adapter().weights[DOWN]})
    fuse(ModelFolder(base), only_down, tmp_path / "out", lambda share, text: None, {f"{Q}.weight": lambda: other})
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(got[f"{Q}.weight"], other.astype(DTYPES["BF16"]))
    assert not np.array_equal(got[f"{DOWN}.weight"], tensors("BF16")[f"{DOWN}.weight"])


def test_full_fine_tuning_replaces_whole_tensors(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "BF16")
    trained = {name: tensor.astype(np.float32) + 1 for name, tensor in tensors("BF16").items()}
    out = fused(base, tmp_path / "out", Adapter("m", 1, 0.0, {}, trained))
    got = load_file(out / "model.safetensors")
    assert all(np.array_equal(got[name], trained[name].astype(got[name].dtype)) for name in trained)


def test_a_head_that_is_stored_beside_tied_embeddings_is_trained_with_them(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "F32")
    stored = tensors("F32")
    embedding = next(name for name in stored if name.endswith("embed_tokens.weight"))
    save_file({**stored, "lm_head.weight": stored[embedding]}, base / "model.safetensors")
    trained = {name: tensor + 1 for name, tensor in stored.items()}
    got = load_file(fused(base, tmp_path / "out", Adapter("m", 1, 0.0, {}, trained)) / "model.safetensors")
    assert np.array_equal(got["lm_head.weight"], trained[embedding])


@pytest.mark.parametrize("method", ["lora", "copied", "replaced"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A layer eight times as tall, and a shard of eight such: the same few blocks."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(safetensors_files, "_COPY_BYTES", 1 << 16)
    peaks = []
    for count, rows in ((1, 512), (8, 4096)):
        names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(count)]
        base = write_base(tmp_path / f"base{rows}", weights={f"{n}.weight": np.ones((rows, 256), "<f4") for n in names})
        trained = (
            {}
            if method != "lora"
            else dict.fromkeys(names, LoraWeight(np.ones((2, 256), np.float32), np.ones((rows, 2), np.float32), 2.0))
        )
        one = np.ones((rows, 256), np.float32)
        given = {f"{name}.weight": lambda one=one: one for name in names} if method == "replaced" else {}
        (tmp_path / f"out{rows}").mkdir()
        tracemalloc.start()
        fuse(
            ModelFolder(base),
            Adapter("m", count, 0.0, trained),
            tmp_path / f"out{rows}",
            lambda share, text: None,
            given,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    small, large = peaks
    assert small > 1 << 16
    assert large < 1.2 * small  # the files differ by a factor of 64


def test_trained_tensors_that_a_folder_does_not_hold_are_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    names = [f"{Q}.weight", "model.embed_tokens.weight"]
    stored = {hf: tensor for shard in shard_files(base) for hf, tensor in load_file(shard).items()}
    trained = {name: stored[name].astype(np.float32) for name in names}
    assert differing(ModelFolder(base), trained) == []
    assert differing(
        ModelFolder(base), trained | {names[0]: trained[names[0]] + 1, "model.new.weight": trained[names[1]]}
    ) == [
        names[0],
        "model.new.weight",
    ]
