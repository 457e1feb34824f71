"""What run.json holds."""

import re
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from common.recipe import Parent
from common.verify_record import VerifyRecord


class _Record(BaseModel):
    """A part of run.json. Fields that only other versions know are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)


def _inside(name: str) -> str:
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError("a file outside the run folder")
    return name


def is_tracker_id(name: str) -> bool:
    """Whether the record of a run may hold it as the id of a tracker's run."""
    return re.fullmatch(r"[\w.@+=-]{1,200}", name) is not None


def _simple(name: str) -> str:
    if not is_tracker_id(name):
        raise ValueError("not the id of a tracker's run")
    return name


# A stranger may have written the record.
InRun = Annotated[str, AfterValidator(_inside)]  # a path relative to the run folder, and in it


TrackerId = Annotated[str, AfterValidator(_simple)]


class GgufRecord(_Record):
    """A GGUF file of the run."""

    file: InRun  # of several, the first
    parts: list[InRun] = []  # all files of one that is split
    name: str = ""  # what --quant calls it, such as Q4_K_M or Q4_K_M-imatrix
    quant: str = ""
    bytes: int = 0
    bits_per_weight: float = 0.0
    tensors: dict[str, int] = {}  # how many by type
    fallbacks: int = 0  # tensors in a larger type than `quant`

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        if isinstance(content, dict) and "name" not in content and "quant" in content:  # an older version's
            return content | {"name": content["quant"]}
        return content

    @property
    def files(self) -> list[str]:
        return self.parts or [self.file]


class ExportRecord(_Record):
    """What was made from the adapter."""

    fused: InRun | None = None
    fuse_into: str | None = None
    gguf: list[GgufRecord] = []
    imatrix: InRun | None = None  # of the fused weights and the training rows
    mmproj: InRun | None = None
    lora_gguf: InRun | None = None
    mlx: dict[str, Any] | None = None
    sample: dict[str, Any] | None = None  # a prompt and the tuned model's answer
    stages: dict[str, dict[str, int]] = {}  # bytes of memory and disk, by stage


class BaseRecord(_Record):
    """The base model's license, and the form in which its weights came."""

    terms: dict[str, str]
    form: str = ""


class TriedRecord(_Record):
    """The verdict on a model of an unknown architecture: what was compared (common.models.admitted)."""

    architecture: str = ""
    targets: list[str] = []
    checks: dict[str, str] = {}
    versions: dict[str, str] = {}


class DataRecord(_Record):
    """How much there was to train on."""

    train_rows: int = 0
    valid_rows: int = 0
    tokens: int = 0  # in the training rows
    label_tokens: int = 0


class RowRecord(_Record):
    """A training row as it is trained. parts: `(whether its tokens are labels, text)`."""

    source: str
    tokens: int
    label_tokens: int
    parts: list[tuple[bool, str]]


class PartRecord(_Record):
    """The rows of one part of the data: how many, and how long in tokens."""

    rows: int
    tokens: int
    label_tokens: int
    left_out: int  # longer than --max-length, without a label, or not readable
    median: int
    longest: int


class DataFacts(_Record):
    """What the training data is like. edges: of the bars of `counts`, in tokens a training row."""

    parts: dict[str, PartRecord] = {}
    edges: list[int] = []
    counts: list[int] = []
    scripts: dict[str, int] = {}  # of the answers that were looked at
    warnings: list[str] = []
    rows: list[RowRecord] = []  # none with --no-text


class LoadFacts(_Record):
    """How often each expert of a mixture was chosen, by layer; nothing where it was not measured."""

    before: dict[int, list[int]] = {}
    after: dict[int, list[int]] = {}


class ReportFacts(_Record):
    """What report.json keeps for the page about the run: nothing else does. reasons: by what was chosen."""

    data: DataFacts = DataFacts()
    reasons: dict[str, str] = {}
    experts: LoadFacts = LoadFacts()


class AlarmRecord(_Record):
    """A sign of collapse that training showed."""

    name: str
    seen: str = ""
    cause: str = ""
    remedy: str = ""
    since: int = 0  # the step from which on it was seen
    step: int = 0  # at which the alarm was raised
    quote: str = ""  # from an answer


class RollbackRecord(_Record):
    """A return to an earlier step, 0 the start, at half the learning rate.

    alarms: why; none where the loss was not finite.
    """

    from_step: int
    to_step: int
    learning_rate: float
    alarms: list[AlarmRecord] = []


class SpreadRecord(_Record):
    """How a mixture's routers spread tokens. busiest, least: shares of experts. never: how many were never chosen."""

    busiest: float = 0.0
    busiest_layer: int = 0
    least: float = 0.0
    least_layer: int = 0
    never: int = 0


class ExpertsRecord(_Record):
    """The load of a mixture's experts before training, and after it with the adapter that is exported.

    experts: of a layer. chosen: of them for each token. moved: the total variation distance, over all layers the mean.
    """

    experts: int = 0
    chosen: int = 0
    layers: int = 0
    tokens: int = 0  # that were looked at
    rows: str = ""  # of which part: validation or training
    before: SpreadRecord | None = None
    after: SpreadRecord | None = None
    moved: float = 0.0
    most_moved: float = 0.0
    most_moved_layer: int = 0
    fallen: list[tuple[int, int]] = []  # layer and number of each expert that training has put out of use
    warning: str = ""
    why: str = ""  # it was not measured


class AttestRecord(_Record):
    """What `attest` wrote. sha256: of the content of attest.json. with_text: whether rows stand in it as text.

    files: the SHA-256 of each file by its name.
    """

    sha256: str
    date: str = ""
    with_text: bool = False
    files: dict[str, str] = {}


class RunRecord(_Record):
    """run.json. A figure is None where the run has none, or an older version did not keep it."""

    status: str  # training, interrupted, complete
    recipe_hash: str
    model_hash: str
    options: dict[str, Any]  # without `llama_cpp`
    stop_ids: list[int]
    named_llama_cpp: str | None = None  # --llama-cpp when the run was made; a program is never taken from a record

    shares: list[dict[str, Any]] = []  # of the tokens, what each computer of --with has computed
    launch: str = ""  # of several ranks that began it, by the name that torchrun's restarts keep
    parent: Parent | None = None  # of the recipe
    hub_model: str = ""  # the model's name on the hub, where the options name a folder in its place
    saved_recipe: str = ""  # its hash, where it has a checkpoint as far as is known
    finished_step: int | None = None  # at which --finish ended training
    plans: list[dict[str, Any]] = []
    deterministic: dict[str, str] = {}
    sample_prompt: list[dict[str, Any]] = []
    sample_tokens: int | None = None
    sample_tools: list[dict[str, Any]] = []
    data: DataRecord = DataRecord()
    tried: TriedRecord | None = None  # --try-model
    base: BaseRecord | None = None
    export: ExportRecord = ExportRecord()
    verify: VerifyRecord | None = None
    experts: ExpertsRecord | None = None  # of a mixture
    left_out_by_peft: bool = False  # PEFT loads only a part of adapter/, or nothing
    alarms: list[AlarmRecord] = []  # since the last rollback
    rollbacks: list[RollbackRecord] = []
    pushed: dict[str, Any] | None = None
    trackers: dict[str, TrackerId] = {}  # the run's id at each, by which a resumed run continues there
    attest: AttestRecord | None = None  # of the files that the run holds now
    stage_seconds: dict[str, float] = {}

    backend: str | None = None
    device: str | None = None
    steps: int | None = None
    tokens: int | None = None
    label_tokens: int | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    label_tokens_per_second: float | None = None
    padding_fraction: float | None = None
    final_train_loss: float | None = None
    start_valid_loss: float | None = None  # before the first step
    best_valid_loss: float | None = None
    best_step: int | None = None
    test_loss: float | None = None  # of the exported adapter
    test_loss_interval: list[float] = []  # 95 %; none of a single row
    test_perplexity: float | None = None
    test_perplexity_interval: list[float] = []
    test_rows: int | None = None
    test_hash: str | None = None  # of these rows as encoded
    exported_adapter: str | None = None  # best or last
    exported_step: int | None = None
    predicted_peak_bytes: int | None = None
    predicted_parts: dict[str, int] = {}
    memory_kind: str | None = None
    peak_memory_bytes: int | None = None
    peak_rss_bytes: int | None = None
    swap_growth_bytes: int | None = None

    @property
    def model(self) -> str:
        """The base by its name on the hub, or by its absolute path where it never had one there."""
        return self.hub_model or str(self.options.get("model") or "")
