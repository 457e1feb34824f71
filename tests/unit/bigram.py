"""The smallest real backend: a softmax regression from token to next token, in numpy, trained with AdamW.

Its only weights are the first adapted layer's: logits of token t are `scale * B @ A[:, t]`, ids taken modulo the
layer's size. Pairs are counted before anything is computed, so its results cannot depend on how a step is cut.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from common.backend import Adapter, Batch, Memory, ModelInfo, OptimizerState, OutOfMemory, StepResult
from common.data.encode import Encoded
from common.errors import UserError
from common.memory_terms import MicroBatchShape
from common.recipe import Plan, Recipe
from common.sampling import Sampler, generate_tokens

RECIPE = Recipe(
    model="some/model",
    data="some.jsonl",
    model_hash="m",
    data_hash="d",
    template_hash="t",
    precision="fp32",
    rank=2,
    alpha=4.0,
    dropout=0.0,
    targets=["q_proj"],
    batch_size=4,
    max_length=64,
    learning_rate=0.05,
    weight_decay=0.01,
    beta1=0.9,
    beta2=0.999,
    epsilon=1e-8,
    max_grad_norm=1.0,
    schedule="cosine",
    steps=8,
    warmup_steps=2,
    eval_every=4,
    seed=3,
)
PLAN = Plan(backend="torch", device="cpu", micro_batch_tokens=64, save_every=4)
_VOCABULARY = 300  # at least as many as the tiny models have
LAYER = "model.layers.0.self_attn.q_proj"


def recipe(**changes: object) -> Recipe:
    return RECIPE.model_copy(update=changes)


def plan(**changes: object) -> Plan:
    return PLAN.model_copy(update=changes)


def row(ids: Sequence[int], labeled: int, source: str = "train.jsonl:1") -> Encoded:
    """A row whose last `labeled` tokens carry loss."""
    mask = np.arange(len(ids)) >= len(ids) - labeled
    return Encoded(np.array(ids, np.int32), mask, source)


def rows(count: int, seed: int, vocabulary: int = 6) -> list[Encoded]:
    """Rows of 3 to 12 tokens in which token t is mostly followed by t + 1."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(1, count + 1):
        ids = [int(random.integers(vocabulary))]
        for _ in range(int(random.integers(2, 12))):
            step = 1 if random.random() < 0.8 else int(random.integers(vocabulary))
            ids.append((ids[-1] + step) % vocabulary)
        made.append(row(ids, max(1, len(ids) // 2), f"train.jsonl:{number}"))
    return made


class Bigram:
    """`memory_limit`: padded tokens of the largest micro-batch that fits; `nan_step`: whose loss is NaN."""

    def __init__(self, memory_limit: int | None = None, nan_step: int | None = None) -> None:
        self.memory_limit, self.nan_step = memory_limit, nan_step
        self.calls: list[list[Batch]] = []
        self.closed = False
        self.recipe = RECIPE

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        self.recipe, self.plan = recipe, plan
        if adapter is not None:
            self.set_adapter(adapter)
        return ModelInfo(1, 10, 100, "Bigram")

    def exchange(self, recipe: Recipe, plan: Plan, adapter: Adapter) -> None:
        self.recipe, self.plan, self.calls = recipe, plan, []
        self.set_adapter(adapter)

    def set_adapter(self, adapter: Adapter) -> None:
        self.layer = next(iter(adapter.weights))
        self.adapter = adapter
        self.parameters = {name: array.copy() for name, array in adapter.arrays().items()}
        zeros = {name: np.zeros_like(array) for name, array in self.parameters.items()}
        self.optimizer = OptimizerState(0, zeros, {name: array.copy() for name, array in zeros.items()})

    def get_adapter(self) -> Adapter:
        return self.adapter.with_arrays(self.parameters)

    def apply_plan(self, plan: Plan) -> None:
        self.plan = plan

    def dequantized(self) -> dict[str, Callable[[], np.ndarray]]:
        return {}

    def get_optimizer(self) -> OptimizerState:
        return self.optimizer

    def set_optimizer(self, state: OptimizerState) -> None:
        self.optimizer = OptimizerState(state.step, dict(state.exp_avg), dict(state.exp_avg_sq))

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        self.expected = shapes()

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        self._remember(micro_batches)
        loss, grads = self._loss(micro_batches)
        norm = self._update(grads, learning_rate, step)
        if step == self.nan_step:
            loss = float("nan")
        return StepResult.of(micro_batches, loss, norm, sum(batch.input_ids.size for batch in micro_batches))

    def _update(self, grads: dict[str, np.ndarray], learning_rate: float, step: int) -> float:
        """Returns the gradients' norm."""
        norm = float(np.sqrt(sum(float(np.square(grad).sum()) for grad in grads.values())))
        limit = self.recipe.max_grad_norm
        shrink = min(1.0, limit / norm) if limit and norm else 1.0
        old, r = self.optimizer, self.recipe
        first, second = dict(old.exp_avg), dict(old.exp_avg_sq)
        for name, grad in grads.items():
            grad = (grad * shrink).astype(np.float32)
            first[name] = np.float32(r.beta1) * first[name] + np.float32(1 - r.beta1) * grad
            second[name] = np.float32(r.beta2) * second[name] + np.float32(1 - r.beta2) * grad**2
            m, v = first[name] / (1 - r.beta1**step), second[name] / (1 - r.beta2**step)
            kept = self.parameters[name] * (1 - learning_rate * r.weight_decay)
            self.parameters[name] = (kept - learning_rate * m / (np.sqrt(v) + r.epsilon)).astype(np.float32)
        self.optimizer = OptimizerState(step, first, second)
        return norm

    def eval_step(self, batch: Batch) -> StepResult:
        self._remember([batch])
        return StepResult.of([batch], self._loss([batch])[0], 0.0, batch.input_ids.size)

    def logits(self, token_ids: np.ndarray, adapter: bool = True, positions: np.ndarray | None = None) -> np.ndarray:
        A, B = self.parameters[f"{self.layer}.lora_A"], self.parameters[f"{self.layer}.lora_B"]
        scale = self.adapter.weights[self.layer].scale if adapter else 0.0
        chosen = token_ids if positions is None else token_ids[positions]
        of_the_layer = (scale * B @ A[:, chosen % A.shape[1]]).T
        return np.tile(of_the_layer, (1, -(-_VOCABULARY // B.shape[0])))

    def generate(
        self,
        token_ids: np.ndarray,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: Sampler,
        adapter: bool = True,
    ) -> Iterator[int]:
        def forward(ids: list[int], restart: bool) -> np.ndarray:
            return self.logits(np.array(ids), adapter)[-1]

        return generate_tokens(forward, token_ids, max_new_tokens, stop_ids, sampler, None)

    def expert_load(self, rows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        raise UserError("there are none", "Leave it.")

    def memory(self) -> Memory:
        return Memory(1, 2, 3, "rss", 0)

    def cpu_threads(self) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        self.closed = True

    def _remember(self, micro_batches: Sequence[Batch]) -> None:
        self.calls.append(list(micro_batches))
        assert len(self.calls) < 500, "the loop tries for ever"
        if self.memory_limit and any(batch.input_ids.size > self.memory_limit for batch in micro_batches):
            raise OutOfMemory

    def _loss(self, micro_batches: Sequence[Batch]) -> tuple[float, dict[str, np.ndarray]]:
        """Summed loss, and the gradients of its mean."""
        A, B = self.parameters[f"{self.layer}.lora_A"], self.parameters[f"{self.layer}.lora_B"]
        scale = self.adapter.weights[self.layer].scale
        counts = np.zeros((A.shape[1], B.shape[0]))
        for batch in micro_batches:
            there = batch.loss_weights > 0
            pairs = batch.input_ids[there] % A.shape[1], batch.targets[there] % B.shape[0]
            np.add.at(counts, pairs, batch.loss_weights[there])
        logits = scale * (A.T.astype(np.float64) @ B.T.astype(np.float64))  # [in, out]
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = counts.sum(1, keepdims=True) * np.exp(log_p) - counts
        total = counts.sum()
        grads = {
            f"{self.layer}.lora_A": scale * (B.T @ error.T) / total,
            f"{self.layer}.lora_B": scale * (error.T @ A.T) / total,
        }
        return float(-(counts * log_p).sum()), grads


class PartBigram(Bigram):
    """The same as one of several that compute a step together. computed: rows of each part."""

    def __init__(self, memory_limit: int | None = None) -> None:
        super().__init__(memory_limit)
        self.computed: list[int] = []

    def accumulate(self, some: Sequence[Batch], weight: float, step: int) -> int:
        self._remember(some)
        self.computed.append(sum(len(batch.lengths) for batch in some))
        self.step, self.loss, self.grads = step, 0.0, {n: np.zeros(a.shape) for n, a in self.parameters.items()}
        if some:
            self.loss, grads = self._loss(some)
            share = sum(float(batch.loss_weights.sum()) for batch in some) / weight
            self.grads = {name: share * grad for name, grad in grads.items()}
        return sum(batch.input_ids.size for batch in some)

    def accumulated_loss(self) -> float:
        return self.loss

    def gradients(self) -> dict[str, np.ndarray]:
        return self.grads

    def add_gradients(self, loss: float, gradients: dict[str, np.ndarray]) -> None:
        self.loss += loss
        self.grads = {name: grad + gradients[name] for name, grad in self.grads.items()}

    def apply_gradients(self, learning_rate: float) -> tuple[float, float]:
        return self.loss, self._update(self.grads, learning_rate, self.step)
