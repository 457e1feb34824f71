"""The run folder: its paths, its record, recipe and plan.

Only this module opens run.json, recipe.yaml and plan.yaml.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from common import strict_json
from common.documents import fault_of, read_json, read_yaml
from common.errors import UserError
from common.files import atomic_write
from common.recipe import OPTIONAL, VERSION, Plan, Recipe, lacking
from common.run_fields import GgufRecord, ReportFacts, RunRecord

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Run:
    """A run folder. What it holds is read from disk at every use, so that it is never out of date."""

    path: Path

    def __str__(self) -> str:
        """The path as it may stand in a command that is copied into a shell: a stranger may have named the folder."""
        return shlex.quote(str(self.path))

    @property
    def record_file(self) -> Path:
        return self.path / "run.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def fused(self) -> Path:
        return self.path / "fused"

    @property
    def gguf(self) -> Path:
        return self.path / "gguf"

    @contextmanager
    def bf16_gguf(self) -> Iterator[Path]:
        """The path of the GGUF that the others are made from and compared with; kept only where it is on record."""
        path = self.gguf / "model-BF16.gguf"
        try:
            yield path
        finally:
            if str(path.relative_to(self.path)) not in [gguf.file for gguf in self.record.export.gguf]:
                path.unlink(missing_ok=True)

    def has_gguf(self, gguf: GgufRecord) -> bool:
        """Whether each of its files is there."""
        return all((self.path / file).is_file() for file in gguf.files)

    @property
    def mlx(self) -> Path:
        return self.path / "mlx"

    @property
    def verify_cases(self) -> Path:
        return self.path / "verify-cases.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def attest(self) -> Path:
        return self.path / "attest.json"

    @property
    def report_facts(self) -> Path:
        return self.path / "report.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def template(self) -> Path:
        """The chat template with which the tuned model is served; there is none for plain text."""
        return self.path / "chat_template.jinja"

    def read_template(self) -> str | None:
        """The template's text, None for plain text. Raises UserError where it is not UTF-8."""
        try:
            return self.template.read_text(encoding="utf-8") if self.template.exists() else None
        except UnicodeDecodeError:
            raise UserError(f"{self.template} is not UTF-8 text.", "Give another run.") from None

    @property
    def record(self) -> RunRecord:
        """run.json. Raises UserError where the folder holds no run, or its record cannot be read.

        A run may be a stranger's, so `options` never names a program: `llama_cpp` stands under `named_llama_cpp`.
        """
        content = self._content()
        options = content.get("options")
        if isinstance(options, dict):
            content["named_llama_cpp"] = options.pop("llama_cpp", None)
        try:
            return RunRecord.model_validate(content)
        except ValidationError as error:
            raise UserError(
                f"{self.record_file} is not the record of a run{fault_of(error)}.", "Give a folder that `train` made."
            ) from None

    def require_complete(self) -> RunRecord:
        """The record of a run that is trained to its end. Raises UserError where it is not, and as `record`."""
        record = self.record
        if record.status != "complete":
            raise UserError(
                f"{self} has not finished training.",
                f"Finish it, or add --finish to export what it has: python cli.py train --resume {self}",
            )
        return record

    def update(self, **changes: Any) -> None:
        """Put fields of RunRecord on record, atomically; the others stay as they are."""
        if unknown := changes.keys() - RunRecord.model_fields.keys():
            raise TypeError(f"run.json has no field {', '.join(sorted(unknown))}")
        content = self._content() if self.record_file.exists() else {}
        content |= {name: _plain(value) for name, value in changes.items()}
        _write(self.record_file, strict_json.dumps(content, indent=2) + "\n")

    def update_export(self, **made: Any) -> None:
        """Put fields of ExportRecord on record, each as soon as it is made: whatever fails later, it is known."""
        self.update(export=self.record.export.model_copy(update=made))

    @property
    def recipe(self) -> Recipe:
        """The recipe, without fields that this version does not know. Its hash need not be the run's.

        Raises UserError where it is missing, or lacks what this version needs.
        """
        return self._read("recipe.yaml", Recipe, {"version": 1})

    @property
    def plan(self) -> Plan:
        """The plan, without fields that this version does not know. Raises UserError as `recipe`."""
        return self._read("plan.yaml", Plan)

    def resumable_recipe(self) -> Recipe:
        """The recipe, by which this version trains as its writer did. Raises UserError where it would not."""
        recipe, fields = self.recipe, self._yaml("recipe.yaml").keys()
        known = Recipe.model_fields.keys() - lacking(recipe.version)
        other = sorted((fields ^ known) - OPTIONAL)
        if recipe.version > VERSION:
            other.append("version")
        if recipe.version == 1 and recipe.weight_decay and recipe.method != "lora":
            other.append("weight_decay, which fell on every parameter")
        if other:
            raise UserError(
                f"{self} cannot be resumed: another version of Twintune wrote its recipe, which differs in "
                f"{', '.join(other)}.",
                "Resume it with that version (environment.json names it); or start a new run from its last checkpoint: "
                f"--adapter {self.checkpoints / 'step-...'}",
            )
        return recipe

    def write_recipe(self, recipe: Recipe) -> None:
        _write_yaml(self.path / "recipe.yaml", recipe.content(), f"recipe {recipe.hash()}")

    def read_report_facts(self) -> ReportFacts:
        """report.json; empty where an older version made the run. Raises UserError where it cannot be read."""
        fix = f"Remove {self.report_facts}: no result depends on it."
        try:
            return ReportFacts.model_validate(read_json(self.report_facts, fix))
        except FileNotFoundError:
            return ReportFacts()
        except ValidationError as error:
            raise UserError(f"{self.report_facts} cannot be read{fault_of(error)}.", fix) from None

    def write_report_facts(self, facts: ReportFacts) -> None:
        _write(self.report_facts, strict_json.dumps(facts.model_dump()) + "\n")

    def write_plan(self, plan: Plan) -> None:
        _write_yaml(self.path / "plan.yaml", plan.model_dump(), "what changes only speed and memory")

    def _content(self) -> dict[str, Any]:
        """run.json as it is. Raises UserError where it is missing, damaged, or no object."""
        try:
            return read_json(self.record_file, "Give another run.", allow_nan=True)  # an older version wrote NaN
        except FileNotFoundError:
            raise UserError(f"{self} holds no run (no run.json).", "Give a folder that `train` made.") from None

    def _read(self, name: str, model: type[_Model], defaults: dict[str, Any] | None = None) -> _Model:
        content = (defaults or {}) | self._yaml(name)
        try:
            return model.model_validate({key: value for key, value in content.items() if key in model.model_fields})
        except ValidationError as error:
            raise UserError(
                f"{self.path / name} cannot be read by this version{fault_of(error)}.",
                "Use the version of Twintune that made the run (environment.json names it).",
            ) from None

    def _yaml(self, name: str) -> dict[str, Any]:
        try:
            return read_yaml(self.path / name, "Give another run.")
        except FileNotFoundError:
            raise UserError(f"{self} is incomplete: it has no {name}.", "Give the complete folder.") from None


def _plain(value: Any) -> Any:
    """`value` for JSON; of a record only the fields that were given."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _write_yaml(path: Path, content: dict[str, Any], comment: str) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    _write(path, f"# {comment}\n{text}")


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: it holds the old text or the new one."""
    with atomic_write(path) as temporary:
        # a path whose bytes are no UTF-8 becomes the same escapes in JSON
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
