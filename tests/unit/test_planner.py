"""What is estimated of memory, and the plan chosen by it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_backend
import torch_backend
from common.data.layouts import choose_layouts, layout_for
from common.errors import UserError
from common.memory_terms import MicroBatchShape, key_heads_at_once
from common.models.families import text_config
from common.models.load import runnable
from common.models.lora_init import initial_adapter
from common.models.shapes import tensor_shapes
from common.options import Options, read_size
from common.recipe import Plan
from common.training.memory_estimate import MemoryEstimate, TrainingMemory, model_dims
from common.training.planner import Work, choose_plan, largest, prediction
from common.verify.tiny_models import tiny_config
from tests.backends import make_recipe
from tests.unit.bigram import row

CONFIG = text_config(
    tiny_config("llama", {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096})
    | {"tie_word_embeddings": True, "mlp_bias": False, "max_position_embeddings": 4096}
)
MODULES = {
    name.removesuffix(".weight"): shape
    for name, shape in tensor_shapes(CONFIG).items()
    if name.endswith("_proj.weight")
}
PLAN = Plan(backend="torch", device="cpu", micro_batch_tokens=1, save_every=10)


def recipe(**changes):
    return make_recipe(Path("model"), **{"rank": 8, "batch_size": 8, "steps": 6, **changes})


def adapter(of=None):
    return initial_adapter(MODULES, 8, of or recipe())


PACKAGES = {"torch": torch_backend, "mlx": mlx_backend}


def predict(of=None, plan=PLAN, shapes=(), config=CONFIG) -> MemoryEstimate:
    of = of or recipe()
    given = None if of.method == "full" else adapter(of)
    return TrainingMemory(PACKAGES[plan.backend], model_dims(config), of, given).estimate(plan, shapes)


def rows(*lengths: int):
    return [row([1] * (length + 1), 2) for length in lengths]


USUAL = MicroBatchShape(4, 100, 400, 200)
MEMORY = TrainingMemory(torch_backend, model_dims(CONFIG), recipe(), adapter())


def peak(shape: MicroBatchShape = USUAL, of=None, **plan) -> int:
    return predict(of, PLAN.model_copy(update=plan), [shape]).peak


def chosen(limit: str | None = None, lengths=(300,) * 40, **options):
    given = Options.model_validate({"memory_limit": limit, **options})
    return choose_plan(given, MEMORY, PLAN, rows(*lengths))


def test_a_resumed_runs_plan_was_accepted_before() -> None:
    options = Options(memory_limit="1MB", micro_batch_tokens=300, gradient_checkpointing=False)
    with pytest.raises(UserError, match="memory-limit"):
        choose_plan(options, MEMORY, PLAN, rows(300))
    assert choose_plan(options, MEMORY, PLAN, rows(300), as_begun=True).plan.micro_batch_tokens == 300


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("1.5 GiB", 3 * 2**29), ("900mb", 900 * 10**6), ("2g", 2 * 10**9), ("4096", 4096)],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["much", "GB", "-3GB", "0", "3 XB", "1e9", "16"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size such as 16GB or 900MB|greater|'16' is 16 bytes: a size has a"):
        Options(memory_limit=text)


def test_the_weights_are_counted_to_the_byte() -> None:
    count = sum(a * b for a, b in MODULES.values()) + 4096 * 512 + 17 * 512
    sizes, torch, mlx = model_dims(CONFIG), torch_backend.memory_terms, mlx_backend.memory_terms
    assert sizes.linear + sizes.other == count
    assert torch.weight_bytes(sizes, recipe()) == mlx.weight_bytes(sizes, recipe()) == 4 * count
    assert torch.weight_bytes(sizes, recipe(precision="bf16")) == 2 * count
    halved = model_dims(CONFIG | {"dtype": "bfloat16"})
    assert (torch.weight_bytes(halved, recipe()), torch.held_bytes(halved, recipe(), "cpu")) == (4 * count, 2 * count)
    assert torch.held_bytes(sizes, recipe(), "cpu") == torch.held_bytes(halved, recipe(), "cuda") == 4 * count
    assert torch.held_bytes(halved, recipe(method="dora"), "cpu") == 2 * count
    four_bits = recipe(precision="bf16", quantization="mlx-4bit-64")
    assert mlx.weight_bytes(sizes, four_bits) == round(sizes.linear * (0.5 + 4 / 64)) + 2 * sizes.other
    ready_made = replace(sizes, quantized=True)
    assert mlx.weight_bytes(ready_made, four_bits) == round(count * (0.5 + 4 / 64))
    assert mlx.loading_bytes(ready_made, recipe(quantization="mlx-4bit-64")) == 0
    assert (
        torch.weight_bytes(sizes, recipe(quantization="nf4"))
        < torch.weight_bytes(sizes, recipe(quantization="int8"))
        < 4 * count
    )


def test_mlx_loads_a_head_of_its_own_beside_all_the_rest() -> None:
    mlx, of = mlx_backend.memory_terms, recipe(precision="fp32")
    tied = model_dims(CONFIG | {"dtype": "bfloat16"})
    untied = model_dims(CONFIG | {"dtype": "bfloat16", "tie_word_embeddings": False})
    assert (tied.untied, untied.untied) == (False, True)
    assert mlx.loading_bytes(untied, of) == mlx.weight_bytes(untied, of) + 2 * 4096 * 512
    assert mlx.loading_bytes(tied, of) == 6 * 4096 * 512


def test_only_adapter_gradients_and_moments_are_counted() -> None:
    parts = predict(shapes=[MicroBatchShape(1, 10, 10, 5)]).parts
    count = sum(weight.A.size + weight.B.size for weight in adapter().weights.values())
    assert parts["adapter"] == 2 * 4 * count  # and what training starts from
    assert parts["gradients and moments"] == 12 * count
    every = predict(recipe(method="full"), shapes=[MicroBatchShape(1, 10, 10, 5)]).parts
    assert every["gradients and moments"] == 3 * every["weights"]


def test_the_prediction_grows_with_what_costs_memory() -> None:
    assert peak(MicroBatchShape(8, 100, 800, 400)) > peak() > peak(MicroBatchShape(2, 100, 200, 100))
    assert peak(gradient_checkpointing=True) < peak()
    assert peak(of=recipe(rank=64)) > peak()
    many = MicroBatchShape(64, 100, 6400, 3200)  # bf16's compiled products take a fixed amount
    assert peak(many, of=recipe(precision="bf16")) < peak(many)
    large, lean = CONFIG | {"vocab_size": 100_000}, PLAN.model_copy(update={"gradient_checkpointing": True})
    one, other = (
        predict(plan=lean.model_copy(update={"loss_chunk": chunk}), shapes=[USUAL], config=large).peak
        for chunk in (32, 200)
    )
    assert other > one
    assert peak(MicroBatchShape(1, 2000, 2000, 5), backend="mlx") > 1.5 * peak(
        MicroBatchShape(1, 2000, 2000, 5)
    )  # it writes scores out


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_gated_delta_net_takes_more_than_attention_and_grows_with_the_tokens(backend: str) -> None:
    sizes = {"head_dim": 16, "layer_types": None, "linear_key_head_dim": 16}
    nets, plain = (
        text_config(tiny_config("qwen3_5_text", sizes | {"full_attention_interval": every})) for every in (4, 1)
    )
    shape, longer = MicroBatchShape(8, 64, 512, 300), MicroBatchShape(16, 64, 1024, 300)

    def step(config: dict[str, Any], shape: MicroBatchShape) -> float:
        parts = predict(plan=PLAN.model_copy(update={"backend": backend}), shapes=[shape], config=config).parts
        return parts["saved activations"] + parts["working memory"]

    assert step(plain, shape) < step(nets, shape) < 3 * step(plain, shape)
    assert step(nets, shape) < step(nets, longer) < 2.05 * step(nets, shape)
    memory_terms = torch_backend.memory_terms
    assert "gated delta nets" in memory_terms.unshardable(model_dims(nets), recipe())


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_short_convolution_is_counted_and_writes_no_scores(backend: str) -> None:
    few, many = (
        text_config(tiny_config("lfm2", {"layer_types": [*["full_attention"] * (4 - count), *["conv"] * count]}))
        for count in (1, 3)
    )

    plan, shape = PLAN.model_copy(update={"backend": backend}), MicroBatchShape(4, 4096, 4 * 4096, 300)
    saved = [predict(plan=plan, shapes=[shape], config=one).parts["saved activations"] for one in (few, many)]
    assert (saved[1] < saved[0]) == (backend == "mlx")  # which writes scores out
    dims = model_dims(many)
    assert (dims.convolved, dims.inner, dims.padded) == (3, 96, True)
    assert "short convolutions" in torch_backend.memory_terms.unshardable(dims, recipe())
    assert not torch_backend.is_deterministic(dims, "cuda", "bf16")


def test_no_more_heads_are_computed_at_once_than_fit() -> None:
    assert key_heads_at_once(2**10, 16) == 16
    assert key_heads_at_once(2**18, 16) == 4
    assert key_heads_at_once(2**30, 16) == 1


def test_devices_that_nobody_measured_are_told_from_those_measured() -> None:
    shapes = [MicroBatchShape(1, 10, 10, 5)]
    assert predict(shapes=shapes).measured
    assert not predict(plan=PLAN.model_copy(update={"device": "mps"}), shapes=shapes).measured


def test_what_a_cpu_compiles_for_bf16_grows_with_the_lengths_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend.memory_terms, "cpu_bf16", lambda: "amx_bf16")

    def slack(*lengths: int, precision: str = "bf16") -> int:
        shapes = [MicroBatchShape(1, length, length, 5) for length in lengths]
        return predict(of=recipe(precision=precision), shapes=shapes).parts["slack"]

    assert slack(100, 112) == slack(112) < slack(112, 113) < slack(*range(16, 16 * 24, 16))
    assert slack(*range(16, 16 * 90, 16)) == slack(*range(16, 16 * 60, 16))
    assert slack(112, 113, precision="fp32") == slack(112, precision="fp32")
    monkeypatch.setattr(torch_backend.memory_terms, "cpu_bf16", lambda: "")
    assert slack(112, 113) == slack(112)


def test_which_training_gives_the_same_bits_again() -> None:
    plain, capped = (model_dims(text_config(tiny_config(family, {"head_dim": 16}))) for family in ("llama", "gemma2"))
    assert torch_backend.is_deterministic(plain, "cpu", "fp32")
    assert torch_backend.is_deterministic(plain, "cuda", "bf16")  # FlashAttention's
    assert not torch_backend.is_deterministic(plain, "cuda", "fp32")
    assert not torch_backend.is_deterministic(plain, "mps", "bf16")
    assert not torch_backend.is_deterministic(capped, "cuda", "bf16")
    nets = model_dims(text_config(tiny_config("qwen3_5_text")))
    assert not torch_backend.is_deterministic(nets, "cuda", "bf16")
    for head_dim in (12, 264):
        assert not torch_backend.is_deterministic(replace(plain, head_dim=head_dim), "cuda", "bf16")
    assert mlx_backend.is_deterministic(plain, "cpu", "fp32")
    assert not mlx_backend.is_deterministic(plain, "gpu", "bf16")


def test_with_room_nothing_is_computed_twice() -> None:
    found = chosen("4GB")
    assert not found.plan.gradient_checkpointing
    assert found.plan.micro_batch_tokens >= 2 * 300
    assert found.prediction.peak < 4e9


def test_a_small_budget_is_kept_by_finer_cuts_then_by_checkpointing() -> None:
    most, least = chosen("4GB").prediction.peak, chosen("4GB", micro_batch_tokens=1, gradient_checkpointing=True)
    before = None
    for share in (1.0, 0.9, 0.75, 0.5, 0.25, 0.0):
        budget = round(least.prediction.peak + share * (most - least.prediction.peak))
        found = chosen(str(budget))
        assert found.prediction.peak <= budget
        assert before is None or found.prediction.peak <= before
        before = found.prediction.peak
    assert found.plan.gradient_checkpointing
    with pytest.raises(UserError, match="training needs about") as caught:
        chosen(str(least.prediction.peak - 1))
    assert "--quantization 4bit" in caught.value.fix


def test_what_the_user_typed_stays() -> None:
    found = chosen(micro_batch_tokens=77, gradient_checkpointing=True)
    assert (found.plan.micro_batch_tokens, found.plan.gradient_checkpointing) == (77, True)
    assert not chosen("4GB", gradient_checkpointing=False).plan.gradient_checkpointing


def test_without_a_limit_a_share_of_what_is_free_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "free_memory", lambda device: (10 * 10**9, "the free memory"))
    found = chosen()
    assert (found.budget, found.plan.memory_budget) == (8_500_000_000, 8_500_000_000)
    assert found.why == "85 % of the free memory, 10.00 GB"


def test_too_little_free_memory_is_no_error_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "free_memory", lambda device: (1000, "the free memory"))
    found = chosen()
    assert found.prediction.peak > found.budget
    assert found.plan.gradient_checkpointing
    assert found.plan.micro_batch_tokens < 600  # one row


def test_the_longest_rows_of_all_steps_are_looked_at() -> None:
    shapes = Work.of(rows(*[20] * 30, 900, *[20] * 17), recipe()).cut(10_000)[0]
    assert max(shape.width for shape in shapes) == 900
    many = recipe(steps=5000)
    assert max(s.tokens for s in Work.of(rows(*range(1, 101)), many).cut(10_000)[0]) == sum(range(93, 101))


def test_long_validation_rows_count_without_a_backward_pass() -> None:
    short, long = rows(*[50] * 40), rows(*[50] * 9, 6000)
    options = Options.model_validate({})
    peaks = [choose_plan(options, MEMORY, PLAN, short, valid).prediction.peak for valid in ([], rows(50), long)]
    trained = choose_plan(options, MEMORY, PLAN, [*short, *long]).prediction.peak
    assert peaks[0] == peaks[1] < peaks[2] < trained


def test_the_micro_batch_of_the_longest_validation_rows() -> None:
    work = Work.of(rows(5), recipe(), rows(30, 10, 90, 80, 20))
    assert work.longest_validation(200) == MicroBatchShape(2, 90, 170, 4)
    assert work.longest_validation(1) == MicroBatchShape(1, 90, 90, 2)
    assert Work.of(rows(5), recipe()).longest_validation(200) is None


def test_the_largest_that_fits_is_the_largest() -> None:
    budget = 10**9
    count, length = largest(MEMORY, PLAN, 300, 4096, budget)
    assert 0 < count < 4096

    def fits(rows: int, width: int) -> bool:
        return peak(MicroBatchShape(rows, width, rows * width, rows * width), gradient_checkpointing=True) <= budget

    assert fits(count, 300)
    assert not fits(count + 1, 300)
    assert length == 4096 or (fits(1, length) and not fits(1, length + 1))


DEEP = replace(model_dims(CONFIG), layers=80, linear=10 * model_dims(CONFIG).linear)


def on_ranks(count: int, of=None, **options):
    memory = TrainingMemory(torch_backend, DEEP, of or recipe(), adapter())
    plan = PLAN.model_copy(update={"ranks": count})
    return choose_plan(Options.model_validate(options), memory, plan, rows(*(300,) * 40))


def test_a_model_is_sharded_where_one_device_cannot_hold_it() -> None:
    complete, sharded = on_ranks(8), on_ranks(8, shard=True)
    assert (complete.plan.sharded, sharded.plan.sharded) == (False, True)
    assert sharded.prediction.parts["weights"] < complete.prediction.parts["weights"]
    least = on_ranks(8, gradient_checkpointing=True, micro_batch_tokens=1).prediction.peak
    assert not on_ranks(8, memory_limit=str(least)).plan.sharded
    small = on_ranks(8, memory_limit=str(least - 1))
    assert small.plan.sharded
    assert small.prediction.peak <= least - 1
    assert not on_ranks(8, memory_limit=str(least), shard=False).plan.sharded
    every = TrainingMemory(torch_backend, DEEP, recipe(method="full"), None)
    parts = [every.estimate(PLAN.model_copy(update={"ranks": 8, "sharded": s}), [USUAL]).parts for s in (False, True)]
    assert parts[1]["gradients and moments"] < parts[0]["gradients and moments"] / 2


@pytest.mark.parametrize(
    ("ranks", "changes", "why"),
    [
        (1, {}, "there is one device"),
        (2, {"quantization": "nf4"}, "bitsandbytes' nf4 weights cannot be sharded exactly"),
    ],
)
def test_what_cannot_be_sharded_is_refused(ranks: int, changes: dict, why: str) -> None:
    with pytest.raises(UserError, match=f"^--shard: {why}\\."):
        on_ranks(ranks, recipe(**changes), shard=True)


def test_what_cannot_be_sharded_is_not_chosen_by_itself() -> None:
    quantized = recipe(quantization="nf4")
    with pytest.raises(UserError, match="training needs about"):
        on_ranks(8, quantized, memory_limit="1MB")
    longrope = TrainingMemory(torch_backend, replace(model_dims(CONFIG), splits=True), recipe(), adapter())
    with pytest.raises(UserError, match="long rows of this model are computed apart"):
        choose_plan(Options(shard=True), longrope, PLAN.model_copy(update={"ranks": 2}), rows(30))


def test_dora_is_sharded_only_where_its_weights_stay_as_stored() -> None:
    halved = model_dims(CONFIG | {"dtype": "bfloat16"})
    refuses = torch_backend.memory_terms.unshardable
    assert "DoRA" in refuses(halved, recipe(method="dora"))
    assert refuses(halved, recipe(method="dora", precision="bf16")) == ""
    assert refuses(model_dims(CONFIG), recipe(method="dora")) == ""


def test_what_runs_a_finished_run_holds_the_complete_model() -> None:
    plan = PLAN.model_copy(update={"ranks": 2, "sharded": True})
    assert not runnable(plan, recipe(), lambda name: PACKAGES[name]).sharded


def test_an_update_that_keeps_what_was_before_it_is_counted_where_it_takes_most() -> None:
    small = MicroBatchShape(1, 2, 2, 1)
    plan, of = PLAN.model_copy(update={"backend": "mlx"}), recipe(rank=64)
    count = sum(array.size for weight in adapter(of).weights.values() for array in weight.parts().values())
    assert predict(of, plan, [small]).parts["optimizer update"] == 3 * 4 * count
    assert "optimizer update" not in predict(of, plan, [MicroBatchShape(64, 2000, 128_000, 64_000)]).parts
    assert "optimizer update" not in predict(of, PLAN, [small]).parts  # torch's is in place
    every = recipe(method="full")
    weights = predict(every, plan, [small]).parts["gradients and moments"] // 3
    assert predict(every, plan, [small]).parts["optimizer update"] == round(2.6 * weights)


def test_messages_with_workers_are_counted_where_the_peak_has_them() -> None:
    one, three = (replace(MEMORY, workers=workers).estimate(PLAN, [USUAL]).parts for workers in (1, 3))
    alone = MEMORY.estimate(PLAN, [USUAL]).parts
    copy = alone["adapter"] // 2
    assert (one["messages to workers"], three["messages to workers"]) == (4 * copy, 12 * copy)
    tiny = replace(MEMORY, workers=3).estimate(PLAN, [MicroBatchShape(1, 2, 2, 1)]).parts
    assert tiny["gradients of workers"] == 9 * copy
    cuda = replace(MEMORY, workers=1).estimate(PLAN.model_copy(update={"device": "cuda"}), [USUAL]).parts
    assert cuda["messages to workers"] == 0


GPU = PLAN.model_copy(update={"backend": "mlx", "device": "gpu", "micro_batch_tokens": 2048})


def varied(count: int):
    return rows(*np.random.default_rng(0).integers(20, 600, count).tolist())


def test_on_mlxs_gpu_the_layouts_are_estimated_in_which_the_run_is_computed() -> None:
    memory, work = replace(MEMORY, package=mlx_backend), Work.of(varied(48), recipe(), varied(20))
    expected = work.expected(6, GPU, 2048)
    shapes = work.shapes_of(6, 2048, "gpu")
    assert expected - shapes == Counter([work.any_validation_row])
    layouts = choose_layouts(expected)
    assert len(layouts) < 5
    found = prediction(memory, GPU, work)
    assert found.peak == max(memory.estimate(GPU, [layout]).peak for layout in layouts)
    dense, wide = MicroBatchShape(8, 250, 2000, 900), MicroBatchShape(8, 380, 1000, 400)  # are computed in one layout
    both, *each = (memory.estimate(GPU, some).peak for some in (Counter({dense: 5, wide: 5}), [dense], [wide]))
    assert both > max(each)
    watched = memory.expecting(GPU, lambda: expected)
    for shape in shapes:  # is observed in the layout that holds it
        step = watched.observed(GPU, [shape], None, 10**9).step
        assert step == memory.estimate(GPU, [layout_for(shape, layouts)]).step >= memory.estimate(GPU, [shape]).step
    for device in ("cpu", "cuda"):
        assert memory.expecting(GPU.model_copy(update={"device": device}), lambda: 1 / 0).layouts == ()


def test_a_longer_validation_row_has_a_layout_of_its_own_without_a_backward_pass() -> None:
    memory, short = replace(MEMORY, package=mlx_backend), rows(*[50] * 40)
    alone, longer = (prediction(memory, GPU, Work.of(short, recipe(), rows(length))) for length in (50, 6000))
    trained = prediction(memory, GPU, Work.of([*short, *rows(6000)], recipe()))
    assert alone.peak < longer.peak < trained.peak
