"""The other side of `train --with`: computes gradients of a step's rows, whenever it is asked to."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.backend import Adapter, Batch, OutOfMemory
from common.backend_package import RankPackage
from common.data.batching import single_rows
from common.errors import UserError, first_line
from common.models.model_folder import ModelFolder
from common.rank_backend import RankBackend
from common.recipe import Plan, Recipe
from common.training.dealing import regrouped
from common.training.messages import Message, adapter_of, batches_of, decoded, encoded

_SHARE = 0.85  # of the free memory, that a worker may take
_FORGOTTEN = 60.0  # seconds without a step, after which another training may have the worker


@dataclass
class Worker:
    """What is kept from one message to the next. base: the folder of a recipe's model; may raise UserError."""

    package: RankPackage
    backend: str
    device: str
    base: Callable[[Recipe], Path]
    say: Callable[[str], None]
    _model: RankBackend | None = field(default=None, init=False)
    _session: str = field(default="", init=False)  # of the training that has it
    _asked: float = field(default=0.0, init=False)  # when it last asked

    def answer(self, data: bytes) -> bytes:
        """To a message of `SharedBackend`; what the user can fix goes back as a fault."""
        try:
            message = decoded(data)
            if message.kind == "load":
                return self._load(message)
            if self._model is None or message.values["session"] != self._session:
                raise UserError("it helps another training now", "Start another worker.")
            self._asked = time.monotonic()
            if message.kind == "gradients":
                found = self._gradients(message, self._model)
                self._asked = time.monotonic()  # a share may have taken longer than it takes to be forgotten
                return found
            self.say("that training has ended; waiting for the next")
            self.close()
            return encoded("closed", {}, {})
        except OutOfMemory:
            self.say("memory does not suffice to help that training; waiting for the next")
            self.close()
            told = {"what": "its memory does not suffice, even for one row at a time", "memory": True}
            return encoded("fault", told | {"fix": "Train with a lower --max-length, or without this worker."}, {})
        except UserError as error:
            return encoded("fault", {"what": error.what, "fix": error.fix}, {})
        except (ValueError, LookupError, TypeError, RuntimeError) as error:  # of another version of this program
            what = f"{type(error).__name__}: {first_line(error)}"
            self.say(f"a message could not be answered: {what}")
            return encoded("fault", {"what": what, "fix": "Give both sides the same version."}, {})

    def _load(self, message: Message) -> bytes:
        another = self._model is not None and message.values["session"] != self._session
        if another and time.monotonic() - self._asked < _FORGOTTEN:
            raise UserError("it helps another training", "Start another worker.")
        self.close()
        recipe = Recipe.model_validate(message.values["recipe"])
        if recipe.quantization != "none" and message.values["backend"] != self.backend:
            by = message.values["backend"]
            raise UserError(
                f"the base is quantized by {by} ({recipe.quantization}), and this is {self.backend}",
                "Train without --quantization, or give the worker the same --backend.",
            )
        adapter = adapter_of(message.values["adapter"], message.arrays)
        folder = self.base(recipe)
        self.say(f"loading {recipe.model}, to help with recipe {recipe.hash()[:12]}")
        vocabulary = ModelFolder(folder).config["vocab_size"]
        self._plan = Plan(
            backend=self.backend,  # type: ignore[arg-type]  # pydantic checks it
            device="cpu",  # `on` replaces it
            micro_batch_tokens=message.values["micro_batch_tokens"],
            loss_chunk=self.package.memory_terms.loss_chunk(vocabulary, self.device.partition(":")[0]),
            memory_budget=round(_SHARE * self.package.free_memory(self.device)[0]),
            save_every=1,
        ).on(self.device)
        model = self.package.create()
        model.load(recipe, self._plan, folder, adapter)
        self._model, self._adapter, self._vocabulary = model, adapter, vocabulary
        self._session, self._asked = message.values["session"], time.monotonic()
        return encoded("ready", {"what": f"{self.backend} on {self.device}"}, {})

    def _gradients(self, message: Message, model: RankBackend) -> bytes:
        values, arrays = message.values, message.arrays
        began = time.perf_counter()
        model.set_adapter(self._fitting({name[2:]: array for name, array in arrays.items() if name.startswith("a:")}))
        batches = batches_of({n[2:]: a for n, a in arrays.items() if n.startswith("b:")}, values["ranks"])
        if any(int(batch.input_ids.max()) >= self._vocabulary or int(batch.input_ids.min()) < 0 for batch in batches):
            raise UserError("A row has a token that the model has not.", "Give both sides the same model.")
        positions = self._accumulated(model, batches, values["weight"], values["step"])
        told = {"loss": model.accumulated_loss(), "positions": positions, "seconds": time.perf_counter() - began}
        return encoded("gradients", told, model.gradients())

    def _fitting(self, arrays: dict) -> Adapter:
        known = {name: array.shape for name, array in self._adapter.arrays().items()}
        if {name: array.shape for name, array in arrays.items()} != known:
            raise UserError("The adapter has other tensors than at the beginning.", "Start train again.")
        return self._adapter.with_arrays(arrays)

    def _accumulated(self, model: RankBackend, batches: list[Batch], weight: float, step: int) -> int:
        """Positions computed; in smaller micro-batches, then with gradient checkpointing, where memory is short."""
        while True:
            try:
                return model.accumulate(self._cut(batches), weight, step)
            except OutOfMemory:
                sizes = [batch.input_ids.size for batch in self._cut(batches) if len(batch.lengths) > 1]
                if sizes:
                    self._plan = self._plan.model_copy(update={"micro_batch_tokens": max(sizes) // 2})
                elif not self._plan.gradient_checkpointing:
                    self._plan = self._plan.model_copy(update={"gradient_checkpointing": True})
                    model.apply_plan(self._plan)
                else:
                    raise
                self.say(f"memory ran out: now {self._plan.micro_batch_tokens} tokens at once")

    def _cut(self, batches: list[Batch]) -> list[Batch]:
        limit = self._plan.micro_batch_tokens
        if all(batch.input_ids.size <= limit or len(batch.lengths) == 1 for batch in batches):
            return batches
        rows = sorted((row for batch in batches for row in single_rows(batch)), key=lambda row: row.tokens)
        return regrouped(rows, limit, batches[0].rank, self._plan.device)

    def close(self) -> None:
        """Free the model."""
        if self._model is not None:
            self._model.close()
            self._model = None
