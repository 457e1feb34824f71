"""The adapter's two layouts: names, shapes, values, and what does not fit."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.llama_cpp import lora
from common.llama_cpp.install import LlamaCpp
from common.models.adapter_files import (
    MLX_FILE,
    PEFT_FILE,
    adapter_hash,
    read_any,
    read_mlx,
    read_peft,
    write_both,
    write_mlx,
    write_peft,
)
from common.models.lora_init import initial_adapter, validate
from tests.traps import ENDLESS
from tests.unit.bigram import recipe

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"
LLAMA = LlamaCpp(Path("none"), Path("none"), Path("none"), "", "")
SHAPES = {Q: (8, 6), DOWN: (6, 10)}  # (out, in)


def adapter(seed: int = 0, rank: int = 2, alpha: float = 5.0) -> Adapter:
    random = np.random.default_rng(seed)
    weights = {
        name: LoraWeight(
            random.normal(size=(rank, into)).astype(np.float32),
            random.normal(size=(out, rank)).astype(np.float32),
            alpha,
        )
        for name, (out, into) in SHAPES.items()
    }
    return Adapter("some/model", 4, 0.1, weights)


def same(one: Adapter, other: Adapter) -> bool:
    settings = ("base_model", "layers", "dropout", "dora")
    return (
        all(getattr(one, name) == getattr(other, name) for name in settings)
        and one.weights.keys() == other.weights.keys()
        and all(
            np.array_equal(w.A, other.weights[n].A)
            and np.array_equal(w.B, other.weights[n].B)
            and w.alpha == other.weights[n].alpha
            and np.array_equal(w.parts().get("magnitude"), other.weights[n].parts().get("magnitude"))
            for n, w in one.weights.items()
        )
    )


def test_the_runs_chat_template_stands_beside_both_layouts(tmp_path: Path) -> None:
    write_both(tmp_path, adapter())
    assert list(tmp_path.rglob("chat_template.jinja")) == []
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}\n")
    write_both(tmp_path, adapter())
    for layout, read in (("adapter", read_peft), ("adapter-mlx", read_mlx)):
        assert (tmp_path / layout / "chat_template.jinja").read_text() == "{{ messages }}\n"
        assert read(tmp_path / layout).weights.keys() == SHAPES.keys()


@pytest.mark.parametrize("start", ["model.layers", "model.language_model.layers"])
def test_an_adapter_of_a_multimodal_model_has_the_names_that_libraries_know(start: str, tmp_path: Path) -> None:
    """Whatever its files call the language model's layers; read back it has the files' names."""
    some = {name.replace("model.layers", start): weight for name, weight in adapter().weights.items()}
    last = list(some)[-1]
    some[last] = LoraWeight(some[last].A[:1], some[last].B[:, :1], 3.0)
    written = write_both(tmp_path, Adapter("some/model", 4, 0.1, some), multimodal=True)
    peft, mlx = load_file(tmp_path / "adapter" / PEFT_FILE), load_file(tmp_path / "adapter-mlx" / MLX_FILE)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in peft)
    assert all(name.startswith("language_model.model.layers.") for name in mlx)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name.replace(start, "model.language_model.layers") for name in some)
    found = read_peft(tmp_path / "adapter", 4)
    assert same(found, written)
    assert found.weights.keys() == read_mlx(tmp_path / "adapter-mlx").weights.keys() == some.keys()


# --- the start


def test_the_start_is_drawn_from_the_seed_alone() -> None:
    first = initial_adapter(SHAPES, 4, recipe(seed=1))
    assert same(first, initial_adapter(SHAPES, 4, recipe(seed=1)))
    assert not same(first, initial_adapter(SHAPES, 4, recipe(seed=2)))


def test_the_start_does_not_depend_on_the_order_of_layers() -> None:
    turned = dict(reversed(SHAPES.items()))
    assert same(initial_adapter(SHAPES, 4, recipe()), initial_adapter(turned, 4, recipe()))


def test_the_start_changes_nothing_and_is_uniform_within_its_bound() -> None:
    start = initial_adapter({Q: (50, 400)}, 1, recipe(rank=64)).weights[Q]
    assert (start.A.shape, start.B.shape) == ((64, 400), (50, 64))
    assert (start.A.dtype, start.B.dtype) == (np.float32, np.float32)
    assert not start.B.any()
    bound = 1 / 20  # 1 / sqrt(in)
    assert abs(start.A).max() <= bound
    assert start.A.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


# --- the layouts


def test_pefts_layout(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"base_model.model.{Q}.lora_A.weight": (2, 6),
        f"base_model.model.{Q}.lora_B.weight": (8, 2),
        f"base_model.model.{DOWN}.lora_A.weight": (2, 10),
        f"base_model.model.{DOWN}.lora_B.weight": (6, 2),
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == (
        "LORA",
        "CAUSAL_LM",
        "some/model",
    )
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5.0, 0.1)
    assert config["target_modules"] == [Q, DOWN]  # not in every layer, so the short names would mean more
    assert (config["use_rslora"], config["bias"]) == (False, "none")


def test_mlx_lms_layout(tmp_path: Path) -> None:
    write_mlx(tmp_path / "adapter", adapter())
    tensors = load_file(tmp_path / "adapter" / "adapters.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{Q}.lora_a": (6, 2),
        f"{Q}.lora_b": (2, 8),
        f"{DOWN}.lora_a": (10, 2),
        f"{DOWN}.lora_b": (2, 6),
    }
    assert np.array_equal(tensors[f"{Q}.lora_a"], adapter().weights[Q].A.T)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 4,
        "lora_parameters": {
            "rank": 2,
            "scale": 2.5,
            "dropout": 0.1,
            "keys": ["mlp.down_proj", "self_attn.q_proj"],
        },
        "model": "some/model",
    }


def test_both_layouts_bring_back_the_same_adapter(tmp_path: Path) -> None:
    write_both(tmp_path, adapter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter-mlx"]
    assert same(read_peft(tmp_path / "adapter", 4), adapter())
    assert same(read_mlx(tmp_path / "adapter-mlx", 4), adapter())


def test_an_alpha_that_the_rank_does_not_divide_survives_both(tmp_path: Path) -> None:
    odd = adapter(rank=3, alpha=7.1)
    write_both(tmp_path, odd)
    assert read_peft(tmp_path / "adapter").weights[Q].alpha == 7.1
    assert read_mlx(tmp_path / "adapter-mlx").weights[Q].alpha == pytest.approx(7.1, rel=1e-12)


def test_matrices_that_are_views_of_others_are_written_right(tmp_path: Path) -> None:
    flat = adapter()
    turned = {n: LoraWeight(np.asfortranarray(w.A), np.asfortranarray(w.B), w.alpha) for n, w in flat.weights.items()}
    write_both(tmp_path, Adapter("some/model", 4, 0.1, turned))
    assert same(read_peft(tmp_path / "adapter", 4), flat)
    assert same(read_mlx(tmp_path / "adapter-mlx", 4), flat)


def test_writing_again_replaces_the_old_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_both(tmp_path, adapter(seed))
    assert same(read_peft(tmp_path / "adapter", 4), adapter(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter-mlx"]


# --- what does not fit


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    good = adapter()
    nan = good.weights[Q].B.copy()
    nan[3, 1] = np.nan
    broken = Adapter(
        "some/model",
        4,
        0.1,
        {
            Q: LoraWeight(good.weights[Q].A[:, :5], nan, 5.0),
            DOWN: LoraWeight(good.weights[DOWN].A, good.weights[DOWN].B[:5], 5.0),
            "model.layers.9.mlp.up_proj": good.weights[Q],
        },
    )
    with pytest.raises(UserError) as caught:
        validate(broken, SHAPES, tmp_path)
    assert caught.value.what.split("\n") == [
        f"The adapter in {tmp_path} does not fit its base model:",
        f"{Q}.lora_A: shape (2, 5), the base model wants (2, 6)",
        f"{Q}.lora_B: holds values that are not finite",
        f"{DOWN}.lora_B: shape (5, 2), the base model wants (6, 2)",
        "model.layers.9.mlp.up_proj: the base model has no such linear layer",
    ]


def test_an_adapter_of_nothing_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds no LoRA weights"):
        validate(Adapter("some/model", 4, 0.1, {}), SHAPES, tmp_path)


def test_an_adapter_that_fits(tmp_path: Path) -> None:
    validate(adapter(), SHAPES, tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_with_half_an_adapter(tmp_path: Path, name: str) -> None:
    write_peft(tmp_path / "adapter", adapter())
    (tmp_path / "adapter" / name).unlink()
    with pytest.raises(UserError) as caught:
        read_peft(tmp_path / "adapter")
    assert caught.value.what.startswith(f"{tmp_path / 'adapter'}: there is no complete adapter here: it has no {name}.")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(tmp_path: Path, name: str) -> None:
    write_peft(tmp_path / "adapter", adapter())
    path = tmp_path / "adapter" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError) as caught:
        read_peft(tmp_path / "adapter")
    damage = f"{path} is not JSON: " if name.endswith(".json") else f"{path} is damaged: "
    assert caught.value.what.startswith(damage)


# --- what formats of others have no place for


def mixed(dora: bool = False, rslora: bool = False) -> Adapter:
    """Two modules of different ranks and alphas."""
    random = np.random.default_rng(9)
    weights = {}
    for name, rank, alpha in ((Q, 2, 5.0), (DOWN, 3, 8.0)):
        out, into = SHAPES[name]
        A, B = (random.normal(size=shape).astype(np.float32) for shape in ((rank, into), (out, rank)))
        lengths = random.uniform(1, 2, out).astype(np.float32) if dora else None
        weights[name] = LoraWeight(A, B, alpha, rslora, lengths)
    return Adapter("some/model", 4, 0.1, weights, dora=dora)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_mixed_ranks_survive_both_layouts(tmp_path: Path, dora: bool, rslora: bool) -> None:
    wanted = mixed(dora, rslora)
    write_both(tmp_path, wanted)
    assert same(read_peft(tmp_path / "adapter", 4), wanted)
    found = read_mlx(tmp_path / "adapter-mlx", 4)
    for name, weight in wanted.weights.items():
        again = found.weights[name]
        assert again.rank == 3  # the largest, filled up with zeros
        np.testing.assert_allclose(again.scale * again.B @ again.A, weight.scale * weight.B @ weight.A, atol=1e-5)
        assert np.array_equal(again.parts().get("magnitude"), weight.parts().get("magnitude"))


def test_pefts_patterns_name_the_modules_that_differ(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", mixed())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 5.0)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({DOWN: 3}, {DOWN: 8.0})


@pytest.mark.parametrize(("layers", "count"), [(4, 1), (10, 7), (0, -1)])
def test_mlx_lm_counts_adapted_layers_from_the_last(tmp_path: Path, layers: int, count: int) -> None:
    only = Adapter("some/model", layers, 0.0, {DOWN: adapter().weights[DOWN]})  # in layer 3
    write_mlx(tmp_path / "adapter", only)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["num_layers"] == count


def test_short_names_only_where_they_mean_just_the_adapted_modules(tmp_path: Path) -> None:
    everywhere = {f"model.layers.{n}.mlp.down_proj": adapter().weights[DOWN] for n in range(2)}
    for layers, names in ((2, ["down_proj"]), (3, sorted(everywhere))):
        write_peft(tmp_path / "adapter", Adapter("m", layers, 0.0, everywhere))
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == names


def test_the_hash_of_an_adapter_is_that_of_what_it_computes(tmp_path: Path) -> None:
    write_both(tmp_path, adapter())
    assert adapter_hash(read_any(tmp_path / "adapter")) == adapter_hash(read_any(tmp_path / "adapter-mlx"))
    assert adapter_hash(adapter(0)) != adapter_hash(adapter(1))
    assert adapter_hash(adapter(alpha=5.0)) != adapter_hash(adapter(alpha=6.0))


def test_a_run_folder_stands_for_its_adapter(tmp_path: Path) -> None:
    write_both(tmp_path / "run", adapter())
    assert same(read_any(tmp_path / "run", 4), adapter())


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(UserError, match="holds no adapter") as caught:
        read_any(tmp_path)
    assert "Pickled adapters" in caught.value.fix


def change(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_rank_that_is_not_the_matrices_is_a_fault(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", rank_pattern={"q_proj": 7})
    with pytest.raises(UserError, match=f"it says rank 7 for {Q}, whose lora_A has 2 rows"):
        read_peft(tmp_path / "adapter")


def test_dora_without_its_magnitudes_is_a_fault(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", use_dora=True)
    with pytest.raises(UserError, match="has no magnitude"):
        read_peft(tmp_path / "adapter")


def test_mlx_lm_without_a_scale_is_a_fault(tmp_path: Path) -> None:
    write_mlx(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", lora_parameters={"rank": 2})
    with pytest.raises(UserError, match=r"lora_parameters\.scale is missing"):
        read_mlx(tmp_path / "adapter")


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda"])
def test_starts_that_change_the_base_are_refused(tmp_path: Path, start: str) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(UserError, match=f"its init_lora_weights is {start}"):
        read_peft(tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        *({"lora_alpha": None}, {"lora_alpha": True}, {"lora_alpha": "inf"}, {"lora_alpha": 10**400}),
        *({"alpha_pattern": {"q_proj": False}}, {"alpha_pattern": {"(" * 5000: 2}}),
        *({"lora_dropout": None}, {"lora_dropout": 5}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}),
        *({"rank_pattern": {"(": 2}}, {"rank_pattern": [1]}, {"rank_pattern": {"a{" + "9" * 30 + "}": 2}}),
        {"rank_pattern": {"(?R)": 2}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_odd_settings_are_one_clear_error(tmp_path: Path, changes: dict) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match="this adapter cannot be read"):
        read_peft(tmp_path / "adapter")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("key", ["lora_alpha", "lora_dropout"])
def test_numbers_that_nothing_computes_with(tmp_path: Path, key: str, number: str) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", **{key: "HERE"})
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"HERE"', number))
    with pytest.raises(UserError, match="adapter_config"):
        read_peft(tmp_path / "adapter")


@pytest.mark.parametrize("changes", [{"scale": True}, {"scale": "2"}, {"scale": 1e40}, {"dropout": 2}], ids=str)
def test_mlx_lms_numbers_are_looked_at_too(tmp_path: Path, changes: dict) -> None:
    write_mlx(tmp_path / "adapter", adapter())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    change(tmp_path / "adapter", lora_parameters=config["lora_parameters"] | changes)
    with pytest.raises(UserError, match=f"its {next(iter(changes))} is"):
        read_mlx(tmp_path / "adapter")


def test_an_alpha_that_is_not_finite_fits_no_model(tmp_path: Path) -> None:
    """A GGUF LoRA states one in a format that has NaN."""
    made = adapter(alpha=math.nan)
    shapes = {name: (w.B.shape[0], w.A.shape[1]) for name, w in made.weights.items()}
    with pytest.raises(UserError, match="its alpha is nan"):
        validate(made, shapes, tmp_path)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_cannot_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("common.models.adapter_settings._PATTERN_SECONDS", 0.1)
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", **{key: {ENDLESS: 8}})
    with pytest.raises(UserError, match=rf"its {key} cannot be used \(regex timed out\)"):
        read_peft(tmp_path / "adapter")


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:a|b){1000000}",
        "(?:a|b){,1000000}",
        "(?:(?:a|b){1000}){1000}",
        "(?:" * 60 + "a|b" + ")+" * 60,
        "(?x:(?:a|b){1#}\n000000})",  # regex reads numbers across comments
        "|".join(f"word{number}" for number in range(20_000)),
    ],
    ids=["repeats", "at most", "nested", "nested +", "verbose", "words"],
)
def test_a_pattern_that_takes_long_to_compile_is_not_compiled(tmp_path: Path, pattern: str) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", rank_pattern={pattern: 8})
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"its rank_pattern cannot be used .* would take too long to compile"):
        read_peft(tmp_path / "adapter")
    assert time.perf_counter() - started < 2


def test_many_patterns_share_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.models.adapter_settings._PATTERN_SECONDS", 0.0)
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", rank_pattern={"q_proj": 8})
    with pytest.raises(UserError, match="would take too long to compile"):
        read_peft(tmp_path / "adapter")


def test_patterns_are_pefts_regular_expressions(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", alpha_pattern={r"layers\.\d+\.self_attn\.(q|k)_proj": 3.0, "q_proj": 4.0})
    assert read_peft(tmp_path / "adapter").weights[Q].alpha == 3.0


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"])
def test_other_patterns_are_not_read(tmp_path: Path, key: str) -> None:
    """The tensors' names say what is adapted."""
    write_peft(tmp_path / "adapter", adapter())
    change(tmp_path / "adapter", **{key: "(" + "[a-z_.0-9]+)+X"})
    assert same(read_peft(tmp_path / "adapter", 4), adapter())


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json is not a JSON object"):
        read_peft(tmp_path / "adapter")


def test_modules_with_an_alpha_of_0_are_kept_in_mlx_lms_layout(tmp_path: Path) -> None:
    weights = {
        f"model.layers.{layer}.mlp.up_proj": LoraWeight(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32), alpha)
        for layer, alpha in enumerate((0.0, 0.0, 6.0))
    }
    write_mlx(tmp_path / "mlx", Adapter("owner/name", 3, 0.0, weights))
    products = [weight.scale * weight.B @ weight.A for weight in read_mlx(tmp_path / "mlx").weights.values()]
    assert [product.max() for product in products] == [0, 0, 6]


def test_a_base_models_name_that_no_file_can_hold(tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", adapter())
    change(tmp_path / "peft", base_model_name_or_path="owner/\ud800")
    write_mlx(tmp_path / "mlx", read_peft(tmp_path / "peft"))
    assert read_mlx(tmp_path / "mlx").base_model == "owner/?"


def of_alphas(*alphas: float) -> Adapter:
    one = {f"model.layers.{n}.mlp.up_proj": alpha for n, alpha in enumerate(alphas)}
    A, B = np.ones((2, 4), np.float32), np.ones((3, 2), np.float32)
    return Adapter("owner/name", len(one), 0.0, {name: LoraWeight(A, B, alpha) for name, alpha in one.items()})


def test_scales_that_float32_cannot_hold_are_refused_in_mlx_lms_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: its scale is 1e\+59 times another module's"):
        write_mlx(tmp_path / "mlx", of_alphas(1e-30, 1e29))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("alphas", "kept"), [((0.0, 6.0), 6.0), ((0.0, 0.0), 1.0), ((1e-60, 2.0), 2.0)])
def test_a_gguf_lora_never_states_an_alpha_of_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphas: tuple[float, float], kept: float
) -> None:
    written: list[Adapter] = []
    monkeypatch.setattr(lora, "_convert", lambda adapter, *rest: written.append(adapter))
    lora.write_gguf_lora(of_alphas(*alphas), tmp_path, tmp_path / "lora.gguf", LLAMA)
    weights = list(written[0].weights.values())
    assert [weight.alpha for weight in weights] == [kept, kept]
    assert np.allclose([weight.scale * weight.B.max() for weight in weights], np.array(alphas) / 2)


def test_scales_that_float32_cannot_hold_are_refused_for_a_gguf_lora(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_B times that is not finite"):
        lora.write_gguf_lora(of_alphas(1e-30, 1e29), tmp_path, tmp_path / "lora.gguf", LLAMA)


def test_matrices_that_mlx_lm_has_apart_are_joined_again(tmp_path: Path) -> None:
    name = "model.layers.0.shared_mlp.{}_linear"
    random = np.random.default_rng(0)
    weights = {
        name.format(part): LoraWeight(*(random.normal(size=shape).astype(np.float32) for shape in shapes), alpha=4.0)
        for part, shapes in (("input", ((2, 8), (12, 2))), ("output", ((2, 6), (8, 2))))
    }
    write_both(tmp_path, Adapter("owner/name", 1, 0.0, weights))
    path = tmp_path / "adapter-mlx" / "adapters.safetensors"
    tensors = load_file(path)
    assert {key.split(".")[4] for key in tensors} == {"gate_proj", "up_proj", "down_proj"}
    save_file(tensors | {"model.layers.0.mlp.up_proj.lora_a": np.ones((8, 2), np.float32)}, path)
    with pytest.raises(UserError, match="gate_proj and up_proj are not parts of one adapted matrix"):
        read_mlx(tmp_path / "adapter-mlx")
