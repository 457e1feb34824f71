"""Which layers get which rank and alpha."""

import pytest

from common.commands.arguments import read_flags
from common.errors import UserError
from common.models.lora_init import choose_layers, initial_adapter, ranks_and_alphas
from common.option_sources import load_options
from tests.unit.bigram import recipe

SHAPES = {
    f"model.layers.{n}.{part}": (8, 6) for n in (0, 1, 2, 10, 11) for part in ("self_attn.q_proj", "mlp.up_proj")
} | {f"model.layers.{n}.mlp.up_proj": (8, 6) for n in range(3, 10)}


def numbers(layers: str | None) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in choose_layers(SHAPES, layers, 12)})


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, list(range(12))),
        ("last:3", [9, 10, 11]),
        ("last:12", list(range(12))),
        ("2-4", [2, 3, 4]),
        ("0,7-8,11", [0, 7, 8, 11]),
        ("5", [5]),
    ],
)
def test_layers(layers: str | None, chosen: list[int]) -> None:
    assert numbers(layers) == chosen


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("last:13", "the model has 12 layers"),
        ("3-12", "no layer 12; its layers are 0 to 11"),
        ("99", "no layer 99"),
        ("0-999999999", "no layer 999999999"),
    ],
)
def test_layers_that_are_not_there(layers: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_layers(SHAPES, layers, 12)


def test_layers_without_any_of_the_targets() -> None:
    some = {name: shape for name, shape in SHAPES.items() if ".1." in name or ".3." in name}
    assert numbers("last:12") == list(range(12))
    assert list(choose_layers(some, "2-3", 12)) == [name for name in some if ".3." in name]
    with pytest.raises(UserError, match="none of --targets is in these layers") as caught:
        choose_layers(some, "last:1", 12)
    assert "They are in the layers 1, 3." in caught.value.fix


@pytest.mark.parametrize("text", ["last:0", "last", "4-2", "a", "1,,2", "-1", "", "0-3000000000", "last:" + "9" * 5000])
def test_layers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="is neither last:N nor layer numbers"):
        load_options(read_flags([f"--layers={text}"]))


def test_the_first_pattern_that_matches_counts() -> None:
    found = ranks_and_alphas(
        recipe(rank=4, alpha=8.0, rank_pattern={"layers.1.*": 2, "q_proj": 6}, alpha_pattern={"up_proj": 3.0}),
        list(SHAPES),
    )
    assert found["model.layers.0.self_attn.q_proj"] == (6, 8.0)
    assert found["model.layers.0.mlp.up_proj"] == (4, 3.0)
    assert found["model.layers.1.self_attn.q_proj"] == (2, 8.0)
    assert found["model.layers.1.mlp.up_proj"] == (2, 3.0)
    assert found["model.layers.10.self_attn.q_proj"] == (6, 8.0)  # layers.1. is not layers.10.


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"rank_pattern": {"k_proj": 2}}, "--rank-pattern k_proj: matches no adapted layer"),
        ({"alpha_pattern": {"proj": 2.0}}, "--alpha-pattern proj: matches no adapted layer"),
        (
            {"rank_pattern": {"*_proj": 2, "up_proj": 4}},
            "--rank-pattern up_proj: matches no adapted layer that an earlier",
        ),
    ],
)
def test_a_pattern_that_does_nothing_is_a_fault(patterns: dict, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("*", r"\*")):
        ranks_and_alphas(recipe(**patterns), list(SHAPES))


def test_scales_by_method() -> None:
    name = "model.layers.0.mlp.up_proj"
    shapes = {name: (8, 6)}
    assert initial_adapter(shapes, 1, recipe(rank=4, alpha=8.0)).weights[name].scale == 2.0
    assert initial_adapter(shapes, 1, recipe(rank=4, alpha=8.0, rslora=True)).weights[name].scale == 4.0


def test_patterns_from_flags_and_from_yaml(tmp_path) -> None:
    flags = load_options(read_flags(["--rank-pattern", "q_proj=2", "layers.0.*=6"]))[0]
    path = tmp_path / "a.yaml"
    path.write_text("rank_pattern: {q_proj: 2, layers.0.*: 6}\n")
    yaml = load_options({"config": str(path)})[0]
    assert flags.rank_pattern == yaml.rank_pattern == {"q_proj": 2, "layers.0.*": 6}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rank-pattern", "q_proj"], "'q_proj' is not NAME=VALUE"),
        (["--rank-pattern", "q_proj=x"], "--rank-pattern"),
        (["--alpha-pattern", "q_proj=0"], "q_proj=0.0: must be above 0"),
        (["--method", "full", "--rank", "4"], "rank has no effect with method full"),
        (["--method", "full", "--quantization", "4bit"], "quantized weights cannot be trained"),
        (["--method", "full", "--precision", "bf16"], "method full keeps its weights in float32"),
        (["--adapter", "a", "--rank", "4"], "rank is taken from --adapter"),
        (["--fuse-into", "dequantized"], "fuse_into is for a quantized base"),
    ],
)
def test_what_does_not_go_together(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_options(read_flags([*argv, "--data", "some.jsonl"]))
    assert words in caught.value.what


def test_a_rank_beyond_every_size_is_refused_before_memory_is_taken() -> None:
    shapes = {f"model.layers.0.self_attn.{name}_proj": (64, 32) for name in "qk"}
    assert initial_adapter(shapes, 1, recipe(rank=64)).weights
    with pytest.raises(UserError, match=r"--rank 1000000000: .*k_proj is a matrix of 64 x 32"):
        initial_adapter(shapes, 1, recipe(rank=10**9))
