"""The load of a mixture's experts, measured before the first step and when training is complete.

A step of `train`. What fails here costs no training.
"""

from dataclasses import dataclass, field

import numpy as np

from common.backend import Adapter, Backend
from common.commands.prepare import Job
from common.commands.tuned import restore
from common.display import Display
from common.errors import AtOdds, UserError
from common.models.experts import left_out_by_peft, mixture_tensors
from common.run_fields import ExpertsRecord, LoadFacts
from common.training.expert_load import Load, compared, described, drawn, enough
from common.training.metrics import timed


@dataclass
class ExpertWatch:
    """What is measured of a run, twice on the same rows. loads: what was, in that order. why: it was not."""

    job: Job
    display: Display
    seconds: dict[str, float]
    rows: list[np.ndarray] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    why: str = ""

    def begin(self, backend: Backend) -> None:
        """With the adapter that training starts from."""
        if self._is_mixture():
            recipe, train = self.job.recipe, self.job.train
            tokens = enough(recipe.steps * recipe.batch_size * float(train.lengths.mean()))
            self.rows = drawn(self.job.valid or train, tokens, recipe.seed)
            self._measure(backend)

    def end(self, backend: Backend, adapter: Adapter) -> None:
        """With the adapter that is kept: both loads are compared, shown and put on record."""
        if not self._is_mixture():
            return
        if not self.why:
            self._measure(backend, adapter)
        record = ExpertsRecord(why=self.why)
        if not self.why:
            part = "validation" if self.job.valid else "training"
            record = compared(self.loads[0], self.loads[1], sum(map(len, self.rows)), part)
        self.display.say(described(record))
        if record.warning:
            self.display.warn(record.warning)
        with self.display.optional("the load of the experts is not on record"):
            self.job.run.update(experts=record)
            facts = self.job.run.read_report_facts()
            if not self.why:
                before, after = ({layer: [*counts] for layer, counts in load.items()} for load in self.loads)
                facts = facts.model_copy(update={"experts": LoadFacts(before=before, after=after)})
            self.job.run.write_report_facts(facts)

    def tell_of_peft(self, adapter: Adapter) -> None:
        """Say so, and keep it for the model card, where PEFT does not load all of the adapter that was written."""
        kind = self.job.config["model_type"]
        if self._is_mixture() and left_out_by_peft(kind, adapter.weights):
            self.job.run.update(left_out_by_peft=True)
            self.display.warn(
                "PEFT 0.21.2 does not load all of adapter/: it looks for some of its modules where this mixture of "
                "experts has none. Use the fused model, or adapter-mlx/ in mlx-lm"
            )

    def _is_mixture(self) -> bool:
        """Whether it can be one: every supported family's model is none."""
        base = self.job.base
        shapes = {name: tensor.shape for name, tensor in base.model.tensors.items()}
        return base.verdict is not None and bool(mixture_tensors(shapes))

    def _measure(self, backend: Backend, adapter: Adapter | None = None) -> None:
        """adapter: which it computes with; unless given the one that it has."""
        self.why = "a library's layers could not be read"
        with self.display.optional("the load of the experts is not measured"), timed(self.seconds, "experts"):
            try:
                with self.display.stage("count what each expert is given"):
                    if adapter is not None:
                        restore(self.job, backend, adapter)
                    found = backend.expert_load(self.rows)
            except AtOdds:
                raise
            except UserError as error:
                self.why = error.what
            else:
                self.loads.append({layer: counts.tolist() for layer, counts in found.items()})
                self.why = ""
