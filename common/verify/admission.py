"""Whether a model of an unknown architecture can be trained: both libraries compute the same of it (--try-model).

transformers defines what the model is. What is compared is the first layer of each kind with its real weights, between
embeddings and head, so that the check of a large model fits a small machine.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.backend import Adapter
from common.backend_package import Backends
from common.context import Context
from common.data.batching import make_batch
from common.data.encode import Encoded
from common.errors import UserError, first_line
from common.files import scratch_folder
from common.models.admitted import Verdict, remember, remembered, versions
from common.models.families import is_known
from common.models.first_layers import enough_layers, layer_kinds, write_first_layers
from common.models.fuse import fuse
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes, target_names
from common.rank_backend import RankBackend
from common.verify import parity

_STEPS = 10
_MOST = 256  # of a row's ids that are compared
_LOGITS, _LOSSES, _ADAPTERS = 2e-4, 5e-4, 5e-2  # relative to the largest logit, to the loss and to the adapter
# Of a derivative along a direction, from its finite difference; where a router chooses experts the loss jumps.
_DERIVATIVE, _WITH_EXPERTS = 0.03, 0.15
_FUSED = 0.1  # of what the adapter changes of a logit
_CHANGES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # of the loss, for finite differences


class Refused(Exception):
    """What was found, and where."""


def admit(model: ModelFolder, context: Context) -> Verdict:
    """The verdict on the model, from memory where it was tried with the same libraries; else it is tried now."""
    if (known := remembered(model)) is not None:
        return known
    display = context.display
    architecture = (model.written_config.get("architectures") or ["none named"])[0]
    with display.stage(f"try {architecture}"), scratch_folder() as scratch:
        checks: dict[str, str] = {}
        targets: list[str] = []
        why = ""
        try:
            targets = _targets(model, context.backends)
            _check(model, context.backends, Path(scratch), targets, checks)
        except Refused as error:
            why = str(error)
        except UserError as error:
            why = error.what
    verdict = Verdict(
        architecture=architecture, admitted=not why, why=why, targets=targets, checks=checks, versions=versions()
    )
    remember(model, verdict)
    return verdict


def try_model(name: str, context: Context) -> Verdict | None:
    """The verdict on the model that --model names, reported; None where its architecture is supported anyway.

    Raises UserError where it is refused.
    """
    model = resolve(name, context.display.say, tried=True)
    if is_known(model.written_config):
        return None
    verdict = admit(model, context)
    if not verdict.admitted:
        raise UserError(
            f"--try-model: {name} ({verdict.architecture}) is refused: {verdict.why}.",
            "Train a model of a supported architecture, or try again with other versions of the libraries.",
        )
    compared = "; ".join(f"{what} {found}" for what, found in verdict.checks.items())
    context.display.say(f"{verdict.architecture} is admitted, with LoRA on {', '.join(verdict.targets)}. {compared}")
    return verdict


def _here(backends: Backends) -> list[str]:
    """The backends that are installed. Raises Refused without torch, whose transformers defines the model."""
    here = [name for name in ("torch", "mlx") if backends(name).fault() is None]
    if "torch" not in here:
        raise Refused("PyTorch and transformers, which define the model, are not installed: it cannot be compared")
    return here


def _targets(model: ModelFolder, backends: Backends) -> list[str]:
    """Last names of the linear layers that the file and every library here have in the same shape."""
    shapes = linear_shapes(model, ["all-linear"])
    found = [backends(name).plain_layers(model.path) for name in _here(backends)]
    differing = {
        module.rsplit(".", 1)[-1]
        for module, shape in shapes.items()
        if any(layers.get(module.split("layers.", 1)[1]) != shape for layers in found)
    }
    if left := [name for name in target_names(shapes) if name not in differing]:
        return left
    raise Refused("no linear layer has the same name and shape in its files and in both libraries")


def _check(model: ModelFolder, backends: Backends, scratch: Path, targets: list[str], checks: dict[str, str]) -> None:
    """Fill `checks` in. Raises Refused for the first that fails."""
    here, count = _here(backends), enough_layers(model)
    small = write_first_layers(model, count, scratch / "layers")
    rows = _rows(model.vocabulary_size)
    checks["layers"] = f"{count} of {len(layer_kinds(model))}, {len({*layer_kinds(model)[:count]})} kinds"
    results = [_result(name, backends, small, rows, _STEPS, targets) for name in here]
    if idle := {name for result in results for name in _idle(result)}:
        targets[:] = [name for name in targets if name not in idle]
        checks["left out"] = f"{', '.join(sorted(idle))}, whose weights a library reads without calling the layer"
        results = [_result(name, backends, small, rows, _STEPS, targets) for name in here]
    if len(here) == 2:
        _compare(results[0], results[1], checks, lambda: _parting(model, backends, scratch, count, rows[0]))
    for name, result in zip(here, results, strict=True):
        _check_alone(name, backends, small, rows, targets, result, scratch / f"fused-{name}", checks)


def _result(
    name: str, backends: Backends, model: ModelFolder, rows: list[Encoded], steps: int, targets: list[str]
) -> parity.Result:
    try:
        return parity.run(name, backends, model.path, rows, steps, targets)
    except UserError:
        raise
    except Exception as error:  # the library's layers make of such a model what they will
        raise Refused(f"{name} cannot compute it: {first_line(error)}") from error


def _idle(result: parity.Result) -> set[str]:
    """Last names of layers whose adapter has not moved."""
    matrices = [(name, array) for name, array in result.adapter.items() if name.endswith(".lora_B")]
    return {name.split(".")[-2] for name, array in matrices if not array.any()}


def _rows(vocabulary: int) -> list[Encoded]:
    """24 rows of 20 to 110 ids from all of the vocabulary: half of them labels."""
    random, rows = np.random.default_rng(3), []
    for i in range(24):
        ids = random.integers(3, vocabulary, 20 + i * 90 // 23).astype(np.int32)
        rows.append(Encoded(ids[:_MOST], np.arange(len(ids)) >= len(ids) // 2, f"row {i}"))
    return rows[::-1]


def _compare(one: parity.Result, other: parity.Result, checks: dict[str, str], parting: Callable[[], str]) -> None:
    scale = np.abs(one.logits).max()
    logits = float(np.abs(one.logits - other.logits).max() / scale)
    if not logits < _LOGITS:
        raise Refused(f"transformers and mlx-lm compute other logits: {logits:.1e} of the largest; {parting()}")
    losses = float((np.abs(one.losses - other.losses) / one.losses).max())
    if not losses < _LOSSES:
        raise Refused(f"the losses of {_STEPS} steps differ by {losses:.1e}")
    norms = [np.linalg.norm(one.adapter[n] - m) / np.linalg.norm(m) for n, m in other.adapter.items()]
    if not max(norms) < _ADAPTERS:
        raise Refused(f"after {_STEPS} steps {[*other.adapter][int(np.argmax(norms))]} differs by {max(norms):.1e}")
    checks |= {
        "logits": f"{logits:.1e} of the largest",
        "step losses": f"{losses:.1e}",
        "adapters": f"{float(max(norms)):.1e}",
    }


def _parting(model: ModelFolder, backends: Backends, scratch: Path, count: int, row: Encoded) -> str:
    """The first layer after which the two differ."""
    for layers in range(1, count + 1):
        small = write_first_layers(model, layers, scratch / f"first-{layers}")
        try:
            targets = _targets(small, backends)
            one, other = (_result(name, backends, small, [row], 0, targets).logits for name in ("torch", "mlx"))
        except (UserError, Refused):  # so few layers are no model
            continue
        if not np.abs(one - other).max() < _LOGITS * np.abs(one).max():
            return f"they part in layer {layers - 1}{', or in embeddings or head' * (layers == 1)}"
    return "with fewer layers they agree, or cannot compute"


def _check_alone(  # noqa: PLR0913
    name: str,
    backends: Backends,
    small: ModelFolder,
    rows: list[Encoded],
    targets: list[str],
    result: parity.Result,
    out: Path,
    checks: dict[str, str],
) -> None:
    """Of one backend: its gradient against finite differences, and the fused model against the adapter."""
    with parity.loaded(name, backends, small.path, targets) as (backend, _, start):
        adapter = start.with_arrays(result.adapter)
        backend.set_adapter(adapter)
        found = _derivative_error(backend, adapter, rows)
        bound = _WITH_EXPERTS if any(".experts." in tensor for tensor in small.tensors) else _DERIVATIVE
        if not found < bound:
            raise Refused(f"{name}: the gradient differs from finite differences by {found:.1%}")
        checks[f"gradient, {name}"] = f"{found:.1%} from finite differences"
        wanted, untuned = backend.logits(rows[0].ids), backend.logits(rows[0].ids, adapter=False)
    out.mkdir()
    fuse(small, adapter, out, lambda share, text: None)
    for path in small.path.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    with parity.loaded(name, backends, out, targets) as (backend, _, _):  # whose adapter changes nothing yet
        fused = float(np.abs(backend.logits(rows[0].ids) - wanted).max() / np.abs(wanted - untuned).max())
    if not fused < _FUSED:
        raise Refused(f"{name}: the fused model differs from the adapter by {fused:.1%} of what that changes")
    checks[f"fused, {name}"] = f"{fused:.2%} of the adapter's effect"


def _derivative_error(backend: RankBackend, adapter: Adapter, rows: list[Encoded]) -> float:
    """How far the gradient along a direction is from what the loss does there, relative; with the best of three steps.

    The direction is the gradient itself with each value stretched at random, so that the loss changes above rounding.
    """
    random, batch = np.random.default_rng(5), make_batch(rows[:4])
    weight = float(batch.loss_weights.sum())
    arrays = {name: np.array(array) for name, array in adapter.arrays().items()}
    backend.accumulate([batch], weight, 1)
    gradients = backend.gradients()
    direction = {name: random.uniform(0, 2, g.shape).astype(np.float32) * g for name, g in gradients.items()}
    along = sum(float((gradients[name] * direction[name]).sum(dtype=np.float64)) for name in arrays)

    def loss(epsilon: float) -> float:
        backend.set_adapter(adapter.with_arrays({n: a + np.float32(epsilon) * direction[n] for n, a in arrays.items()}))
        return float(backend.eval_step(batch).loss_sum) / weight

    # so far that the loss changes by about these
    steps = [change / along for change in _CHANGES]
    differences = [(loss(step) - loss(-step)) / (2 * step) for step in steps]
    backend.set_adapter(adapter)
    return min(abs(difference - along) / along for difference in differences)
