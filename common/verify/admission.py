"""Whether a model of an unknown architecture can be trained: both libraries compute the same of it (--try-model).

transformers defines what the model is. What is compared is the first layer of each kind with its real weights, between
embeddings and head, so that the check of a large model fits a small machine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.backend import Adapter, OutOfMemory, Progress
from common.backend_package import Backends
from common.context import Context
from common.data.batching import make_batch
from common.data.encode import Encoded
from common.errors import Unable, UserError, first_line
from common.files import scratch_folder
from common.llama_cpp.install import own_build
from common.models.admitted import Verdict, folder, remember, remembered, versions
from common.models.experts import stack_of, target_of
from common.models.families import is_known
from common.models.first_layers import enough_layers, layer_kinds, write_first_layers
from common.models.fuse import fuse
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes, target_names
from common.option_fields import EXPERTS
from common.system.launch import launched
from common.verify import parity
from common.verify.divergence import apart
from common.verify.gguf_peer import NOT_BUILT, PEER, gguf_logits

_T = TypeVar("_T")
_STEPS, _ROWS, _LONGEST = 10, 16, 56  # of training; rows, the shortest of 20 ids, and ids of the longest
_LOGITS, _LOSSES, _ADAPTERS = 2e-4, 5e-4, 5e-2  # relative to the largest logit, to the loss and to the adapter
# Of the quarter of the positions that agree best, each as a root mean square over its logits. Rounding moves single
# logits as far as another function does: in Gemma 4 by 1e-4, where GELU by tanh in place of the exact one moves a
# Gemma's by 7e-5. But such a function moves every position. 54 tiny models that compute the same lie from 3e-8 to 9e-7
# here, three with the other GELU from 1.3e-5 to 5.1e-5. Gemma 3 270M with its weights: 2e-7, and 4e-5 with the other.
_EVERYWHERE = 4e-6
_GGUF, _GGUF_EVERYWHERE = 1e-2, 1e-3  # llama.cpp's cache has 16 bits: 1.4e-3 and 1.4e-4 of five tiny models
# Of a derivative along a direction, from its finite difference; where a router chooses experts the loss jumps.
_DERIVATIVE, _WITH_EXPERTS = 0.03, 0.15
_FUSED = 0.1  # of what the adapter changes of a logit
_CHANGES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # of the loss, for finite differences


class Refused(Exception):
    """What was found, and where."""


def try_model(name: str, context: Context, experts: bool = False) -> Verdict | None:
    """The verdict on the model that --model names, reported; None where its architecture is supported anyway.

    experts: with LoRA on the experts of a mixture. Raises UserError where it is refused.
    """
    model = resolve(name, context.display.say, tried=True)
    if is_known(model.written_config):
        return None
    if launched():
        raise UserError("--try-model tries a model on one device.", "Try it once without the launcher.")
    verdict = admit(model, context, experts)
    if not verdict.admitted:
        raise UserError(
            f"--try-model: {name} ({verdict.architecture}) is refused: {verdict.why}.",
            "Train a model of a supported architecture, or try again with other versions of the libraries.",
        )
    compared = "; ".join(f"{what} {found}" for what, found in verdict.checks.items())
    context.display.say(f"{verdict.architecture} is admitted, with LoRA on {', '.join(verdict.targets)}. {compared}")
    if verdict.checks.get(PEER, "").startswith("none"):
        context.display.warn(
            "--try-model: one library alone has computed this model; its logits were compared with none"
        )
    return verdict


def admit(model: ModelFolder, context: Context, experts: bool = False) -> Verdict:
    """The verdict on the model, from memory where it was tried with the same libraries; else it is tried now."""
    known = remembered(model, experts)
    if known is not None and (known.checks.get(PEER) != NOT_BUILT or own_build() is None):
        return known
    architecture, why = (model.written_config.get("architectures") or ["none named"])[0], ""
    with context.display.stage(f"try {architecture}") as progress, scratch_folder(folder()) as scratch:
        trial = _Trial(model, context.backends, scratch, progress, experts)
        try:
            trial.run()
        except (OutOfMemory, Unable):  # says nothing of the model
            raise
        except Refused as error:
            why = str(error)
        except UserError as error:
            why = error.what
    verdict = Verdict(
        architecture=architecture,
        admitted=not why,
        why=why,
        targets=trial.targets,
        checks=trial.checks,
        versions=versions(),
    )
    remember(model, verdict, experts)
    return verdict


@dataclass
class _Trial:
    """A check of one model, and what it has found so far. targets: last names of the layers that can be adapted."""

    model: ModelFolder
    backends: Backends
    scratch: Path
    progress: Progress
    experts: bool
    targets: list[str] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Raises Refused for the first comparison that fails, or UserError."""
        here, kinds, count = self._here(), layer_kinds(self.model), enough_layers(self.model)
        self.targets = self._targets(self.model, self.experts)
        small = write_first_layers(self.model, count, self.scratch / "layers")
        rows = _rows(self.model.vocabulary_size)
        self.checks["layers"] = f"{count} of {len(kinds)}, {len({*kinds[:count]})} kinds"
        results = self._train(small, rows, here)
        if idle := {name for result in results for name in _idle(result)}:
            if EXPERTS in idle:
                raise Refused("the adapters of a layer's experts have not moved: a library computes without them")
            self.targets = [name for name in self.targets if name not in idle]
            self.checks["left out"] = f"{', '.join(sorted(idle))}, whose weight a library reads without the layer"
            results = self._train(small, rows, here)
        if len(here) == 2:
            self._compare(results[0], results[1], count, rows[0])
        else:
            self._compare_gguf(small, results[0].logits, rows[0].ids)
        for number, (name, result) in enumerate(zip(here, results, strict=True)):
            self.progress((len(here) + number) / (2 * len(here)), f"gradient and fusion, {name}")
            _computed(name, partial(self._check_alone, name, small, rows, result))

    def _here(self) -> list[str]:
        """The backends that are installed. Raises Refused without torch, whose transformers defines the model."""
        here = [name for name in ("torch", "mlx") if self.backends(name).fault() is None]
        if "torch" not in here:
            raise Refused("PyTorch and transformers, which define the model, are not installed: it cannot be compared")
        return here

    def _targets(self, model: ModelFolder, experts: bool) -> list[str]:
        """Last names of the linear layers that the file and every library here have in the same shape.

        Raises Refused where there are none, or the experts are not among them that are asked for.
        """
        shapes = linear_shapes(model, ["all-linear", *([EXPERTS] if experts else [])])
        differing: dict[str, str] = {}
        for name in self._here():
            layers = self.backends(name).plain_layers(model.path)
            parts = (module for module, shape in shapes.items() if layers.get(module.split("layers.", 1)[1]) != shape)
            differing |= {target_of(module): name for module in parts}
        if EXPERTS in differing:
            raise Refused(f"{differing[EXPERTS]} has its experts in a form to which no adapter can be added here")
        if left := [name for name in target_names(shapes) if name not in differing]:
            return left
        raise Refused("no linear layer has the same name and shape in its files and in both libraries")

    def _train(self, small: ModelFolder, rows: list[Encoded], here: list[str]) -> list[parity.Result]:
        results = []
        for number, name in enumerate(here):
            self.progress(number / (2 * len(here)), f"{_STEPS} steps, {name}")
            results.append(_result(name, self.backends, small, rows, _STEPS, self.targets))
        return results

    def _compare(self, one: parity.Result, other: parity.Result, count: int, row: Encoded) -> None:
        logits = "{:.1e} of the largest, {:.1e} everywhere".format(*apart(one.logits, other.logits))
        if not _agree(one.logits, other.logits):
            parting = self._parting(count, row)
            raise Refused(f"transformers and mlx-lm compute other logits: {logits}; {parting}")
        losses = float((np.abs(one.losses - other.losses) / one.losses).max())
        if not losses < _LOSSES:
            raise Refused(f"the losses of {_STEPS} steps differ by {losses:.1e}")
        far = {name: _distance(one.adapter[name], matrix) for name, matrix in other.adapter.items()}
        worst = max(far, key=lambda name: np.nan_to_num(far[name], nan=np.inf))
        if not far[worst] < _ADAPTERS:
            raise Refused(f"after {_STEPS} steps {worst} differs by {far[worst]:.1e}")
        self.checks |= {"logits": logits, "step losses": f"{losses:.1e}", "adapters": f"{far[worst]:.1e}"}

    def _compare_gguf(self, small: ModelFolder, logits: np.ndarray, ids: np.ndarray) -> None:
        theirs = gguf_logits(small, ids, self.scratch)
        if isinstance(theirs, str):
            self.checks[PEER] = theirs
            return
        size = min(logits.shape[1], theirs.shape[1])  # a vocabulary may be padded
        largest, everywhere = apart(logits[:, :size], theirs[:, :size])
        found = f"llama.cpp, logits {largest:.1e} of the largest, {everywhere:.1e} everywhere"
        if not (largest < _GGUF and everywhere < _GGUF_EVERYWHERE):
            raise Refused(f"transformers computes other logits than {found}")
        self.checks[PEER] = found

    def _parting(self, count: int, row: Encoded) -> str:
        """The first layer after which the two differ."""
        for layers in range(1, count + 1):
            small = write_first_layers(self.model, layers, self.scratch / f"first-{layers}")
            try:
                targets = self._targets(small, experts=False)
                one, other = (_result(name, self.backends, small, [row], 0, targets) for name in ("torch", "mlx"))
            except (UserError, Refused):  # so few layers are no model
                continue
            if not _agree(one.logits, other.logits):
                return f"they part in layer {layers - 1}{', or in embeddings or head' * (layers == 1)}"
        return "with fewer layers they agree, or cannot compute"

    def _check_alone(self, name: str, small: ModelFolder, rows: list[Encoded], result: parity.Result) -> None:
        """Of one backend: its gradient against finite differences, and the fused model against the adapter."""
        with parity.loaded(name, self.backends, small.path, self.targets) as (backend, _, start):
            adapter = start.with_arrays(result.adapter)
            backend.set_adapter(adapter)
            bound = _WITH_EXPERTS if any(".experts." in tensor for tensor in small.tensors) else _DERIVATIVE
            for part in ["gradient", *(["gradient of experts"] if EXPERTS in self.targets else [])]:
                found = _derivative_error(backend, adapter, rows, part == "gradient of experts")
                if not found < bound:
                    raise Refused(f"{name}: the {part} differs from finite differences by {found:.1%}")
                self.checks[f"{part}, {name}"] = f"{found:.1%} from finite differences"
            wanted, untuned = backend.logits(rows[0].ids), backend.logits(rows[0].ids, adapter=False)
        out = self.scratch / f"fused-{name}"
        out.mkdir()
        fuse(small, adapter, out, lambda share, text: None)
        for path in small.path.iterdir():
            if path.suffix != ".safetensors":
                (out / path.name).write_bytes(path.read_bytes())
        with parity.loaded(name, self.backends, out, self.targets) as (backend, _, _):  # the adapter changes nothing
            fused = float(np.abs(backend.logits(rows[0].ids) - wanted).max() / np.abs(wanted - untuned).max())
        if not fused < _FUSED:
            raise Refused(f"{name}: the fused model differs from the adapter by {fused:.1%} of what that changes")
        self.checks[f"fused, {name}"] = f"{fused:.2%} of the adapter's effect"


def _result(
    name: str, backends: Backends, model: ModelFolder, rows: list[Encoded], steps: int, targets: list[str]
) -> parity.Result:
    return _computed(name, lambda: parity.run(name, backends, model.path, rows, steps, targets))


def _computed(name: str, compute: Callable[[], _T]) -> _T:
    """What `compute` returns. Raises Refused where it fails: a library's layers make of such a model what they will."""
    try:
        return compute()
    except (UserError, Refused, OSError, MemoryError):
        raise
    except Exception as error:
        raise Refused(f"{name} cannot compute it: {first_line(error)}") from error


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    largest, everywhere = apart(one, other)
    return largest < _LOGITS and everywhere < _EVERYWHERE


def _idle(result: parity.Result) -> set[str]:
    """Last names of layers whose adapter has not moved; of experts, where none of a layer's has."""
    matrices = {n.removesuffix(".lora_B"): array for n, array in result.adapter.items() if n.endswith(".lora_B")}
    moved = {stack_of(name) for name, array in matrices.items() if array.any()}
    return {target_of(name) for name in matrices if stack_of(name) not in moved}


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Relative; 0 of two that are zeros, as of an expert that no token came to."""
    length = float(max(np.linalg.norm(one), np.linalg.norm(other)))
    return float(np.linalg.norm(one - other)) / length if length else 0.0


def _rows(vocabulary: int) -> list[Encoded]:
    """Rows of ids from all of the vocabulary, the longest first; the second half of each is labels."""
    random, rows = np.random.default_rng(3), []
    for i in range(_ROWS):
        ids = random.integers(3, vocabulary, _LONGEST - i * (_LONGEST - 20) // (_ROWS - 1)).astype(np.int32)
        rows.append(Encoded(ids, np.arange(len(ids)) >= len(ids) // 2, f"row {i}"))
    return rows


def _derivative_error(backend: Any, adapter: Adapter, rows: list[Encoded], experts: bool) -> float:
    """How far the gradient along a direction is from what the loss does there, relative; with the best of five steps.

    The direction is the gradient itself with each value stretched at random, so that the loss changes above rounding.
    experts: along the gradients of these alone.
    """
    random, batch = np.random.default_rng(5), make_batch(rows[:2])
    weight = float(batch.loss_weights.sum())
    arrays = {name: np.array(array) for name, array in adapter.arrays().items()}
    backend.accumulate([batch], weight, 1)
    gradients = backend.gradients()
    if experts:
        gradients = {n: g for n, g in gradients.items() if target_of(n.rpartition(".")[0]) == EXPERTS}
    direction = {name: random.uniform(0, 2, g.shape).astype(np.float32) * g for name, g in gradients.items()}
    along = sum(float((gradients[name] * direction[name]).sum(dtype=np.float64)) for name in direction)

    def loss(epsilon: float) -> float:
        moved = {name: arrays[name] + np.float32(epsilon) * step for name, step in direction.items()}
        backend.set_adapter(adapter.with_arrays(arrays | moved))
        return float(backend.eval_step(batch).loss_sum) / weight

    if not along > 0:
        return math.inf
    # so far that the loss changes by about these
    steps = [change / along for change in _CHANGES]
    differences = [(loss(step) - loss(-step)) / (2 * step) for step in steps]
    backend.set_adapter(adapter)
    return float(np.nanmin([abs(difference - along) / along for difference in differences]))
