"""What `tune` searches: the values of each hyperparameter, around what `--recipe auto` chooses."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from common.data.encoded_rows import EncodedRows
from common.models.training_base import Base
from common.options import Options
from common.training.auto_recipe import auto_recipe

# Of the automatic value. The rate is drawn on a logarithmic scale; of the others, one of these is taken.
_RATE = (0.25, 4)
_EPOCHS = (0.5, 1, 2)
_BATCH = (0.5, 1, 2)
_RANK = (0.5, 1, 2, 4)
_DROPOUT = (0.0, 0.05, 0.1)

SEARCHED = ("learning_rate", "epochs", "batch_size", "rank", "dropout")
Settings = dict[str, Any]  # values of hyperparameters, by their names in Options


@dataclass(frozen=True)
class Space:
    """The hyperparameters that are searched. automatic: what `--recipe auto` chooses of them.

    options: of all trials, each of which gives them its settings. rates: lowest and highest learning rate, where that
    is searched. choices: the values of the others. written: the settings of the --config file, where it has any.
    """

    options: Options
    automatic: Settings
    written: Settings
    rates: tuple[float, float] | None
    choices: dict[str, list[float]]

    def with_settings(self, settings: Settings) -> Options:
        return self.options.model_copy(update=settings)

    def described(self) -> str:
        """Every range in a line."""
        parts = [f"learning rate {self.rates[0]:.2g} to {self.rates[1]:.2g}"] if self.rates else []
        return ", ".join([*parts, *(f"{label(name)} {_listed(values)}" for name, values in self.choices.items())])

    def record(self) -> dict[str, Any]:
        """What another search of these hyperparameters would have different."""
        return {"automatic": self.automatic, "rates": self.rates and list(self.rates), "choices": self.choices}


def label(name: str) -> str:
    return name.replace("_", " ")


def described(settings: Settings) -> str:
    """The settings in a line."""
    return ", ".join(f"{label(name)} {settings[name]:.3g}" for name in SEARCHED if name in settings)


def _listed(values: list[float]) -> str:
    return f"{', '.join(f'{value:g}' for value in values[:-1])} or {values[-1]:g}" if values[1:] else f"{values[0]:g}"


def search_space(options: Options, given: Collection[str], base: Base, rows: EncodedRows) -> Space:
    """What is searched: all but what was `given` on the command line, or has no effect with this method.

    rows: of training.
    """
    idle = {"rank", "dropout"} if options.method == "full" else {"rank"} if base.given is not None else set()
    idle |= {"epochs"} if options.steps is not None else set()
    names = [name for name in SEARCHED if name not in {*given, *idle}]
    values = options.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)
    written = {name: values.pop(name) for name in names if name in values}
    plain = Options.model_validate(values | {"recipe": "auto"})
    chosen, _ = auto_recipe(plain, base, rows)
    automatic = {name: getattr(chosen, name) for name in names}
    around = {"epochs": _EPOCHS, "batch_size": _BATCH, "rank": _RANK}
    choices: dict[str, list[float]] = {"dropout": list(_DROPOUT)}
    for name, factors in around.items():
        if name in automatic:
            choices[name] = [max(1, round(automatic[name] * factor)) for factor in factors]
    limits = {"batch_size": len(rows), "rank": min(max(shape) for shape in base.shapes.values())}
    found = {}
    for name in names:
        if name != "learning_rate":
            own = [values[name] for values in (automatic, written) if name in values]
            kept = [value for value in choices[name] if value <= limits.get(name, value)]
            found[name] = sorted({*kept, *own})
    rates = None
    if "learning_rate" in automatic:
        rate, own_rate = automatic["learning_rate"], written.get("learning_rate", automatic["learning_rate"])
        rates = min(_RATE[0] * rate, own_rate), max(_RATE[1] * rate, own_rate)
    return Space(plain, automatic, {**automatic, **written} if written else {}, rates, found)
