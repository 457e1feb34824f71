"""Options that a recipe or a plan keeps as they are given, and how any option is declared."""

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

HEADINGS = ("Model", "Data", "Training", "Adapter", "Memory and device", "Export", "Output")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")
QUANT_TYPES = (
    *("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "F32", "Q2_K_S", "IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS"),
    *("IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
EXPERTS = "experts"  # a target: the matrices of every expert of a mixture, which no group includes
UNGUIDED = ("BF16", "F16", "F32", "Q8_0")  # types that take no importance matrix
# Types that llama-quantize makes with an importance matrix only: tensor_requires_imatrix in its src/llama-quant.cpp.
NEED_IMATRIX = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")


def option(
    heading: str,
    default: Any,
    description: str,
    *,
    value: str = "",
    path: bool = False,
    choices: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """A pydantic field: a YAML key, a flag, a line of help under `heading`, an entry of the JSON schema.

    value: what help calls the value. path: the value may be a file or folder of this machine. choices: what a shell
    completes, where the type does not say. more: bounds and other arguments of pydantic's Field.
    """
    extra: dict[str, Any] = {"heading": heading, "value": value, "path": path, "choices": list(choices)}
    return Field(default, description=description, json_schema_extra=extra, **more)


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """`heading`, `value`, `path` and `choices`, as declared."""
    return dict(field.json_schema_extra)  # type: ignore[arg-type]


in_model, in_data, in_training, in_adapter, in_memory, in_export, in_output = (
    partial(option, heading) for heading in HEADINGS
)


class RecipeFields(BaseModel):
    """What changes the result and needs nothing of the machine or the data to be known."""

    train_on: Literal["assistant", "last", "all"] = in_data(
        "assistant",
        "which tokens are trained: every assistant turn, the last turn of each row, or every token; "
        "train: false takes out assistant turns only",
    )
    thinking: Literal["off", "keep"] = in_data(
        "off", "train and export a thinking model without its reasoning, or keep the reasoning of the rows"
    )
    weights: list[float] = in_data(
        [],
        "with several sources, the share of each in an epoch's training rows: --weights 2 1; all rows of all unless "
        "given",
        value="X [X ...]",
    )
    max_length: int = in_data(
        1024, "maximum sequence length in tokens; --overflow says what becomes of longer rows", ge=2
    )
    overflow: Literal["drop", "truncate", "split", "error"] = in_data(
        "drop",
        "rows longer than --max-length: leave them out and count them, cut off their ends, cut plain text into blocks "
        "and leave out conversations, or refuse the data",
    )

    on_bad_row: Literal["error", "drop"] = in_data(
        "error", "rows that cannot be read or labeled: refuse the data, or leave them out and count them"
    )
    tools: Literal["error", "drop", "system"] = in_data(
        "error",
        "rows with tools, where the chat template takes none: refuse them, leave the tools' definitions out, or write "
        "tools and calls as text, the tools into the system message",
    )

    eval_rows: int = in_training(
        200,
        "validation rows that are scored, drawn by --seed where there are more; 0: all of them. "
        "Unless given, fewer (40 at least) where that would take much time",
        ge=0,
    )
    patience: int = in_training(4, "stop after N validations without improvement (0: no early stopping)", ge=0)
    min_delta: float = in_training(
        0.002, "minimum relative improvement in validation loss that counts as one", ge=0, lt=1
    )
    batch_size: int = in_training(8, "rows of an optimizer step; unless given, chosen for model and rows", ge=1)
    learning_rate: float = in_training(
        2e-4, "highest learning rate of the schedule; unless given, chosen for model and rows", gt=0
    )
    schedule: Literal["cosine", "linear", "constant"] = in_training("cosine", "learning rate after the warm-up")
    weight_decay: float = in_training(
        0.0, "decoupled weight decay of AdamW; norms, biases, embeddings and DoRA's magnitudes are spared", ge=0
    )
    beta1: float = in_training(0.9, "decay of AdamW's average of gradients", ge=0, lt=1)
    beta2: float = in_training(0.999, "decay of AdamW's average of squared gradients", ge=0, lt=1)
    epsilon: float = in_training(1e-8, "number that AdamW adds to its denominator", gt=0)
    max_grad_norm: float = in_training(
        1.0, "largest global gradient norm, above which it is clipped; 0: no limit", ge=0
    )
    seed: int = in_training(
        0, "seed of the adapter's first weights, the row order, the validation split and dropout", ge=0, lt=2**31
    )

    method: Literal["lora", "dora", "full"] = in_adapter(
        "lora", "LoRA; DoRA, which also learns the length of each weight row; or every weight of a small model"
    )
    rank: int = in_adapter(16, "rank of the LoRA matrices; unless given, chosen for model and rows", ge=1)
    alpha: float = in_adapter(32.0, "LoRA's update is multiplied by alpha / rank", gt=0)
    targets: list[str] = in_adapter(
        ["all-linear"],
        "linear layers to adapt: all-linear, attention, mlp, or names such as q_proj; experts, which no other name "
        "includes, are those of a mixture",
    )
    dropout: float = in_adapter(0.0, "share of the adapter's inputs that is dropped in training", ge=0, lt=1)
    rslora: bool = in_adapter(
        False, "multiply by alpha / sqrt(rank) instead, so that large ranks learn as small ones do"
    )
    layers: str | None = in_adapter(
        None, "layers to adapt, all unless given: last:N, or numbers from 0 such as 8-15 or 0-3,12", value="RANGE"
    )
    rank_pattern: dict[str, int] = in_adapter({}, "ranks by module name: q_proj=8 layers.0.*=4; the first match counts")
    alpha_pattern: dict[str, float] = in_adapter({}, "alphas by module name: q_proj=8; the first match counts")
    lora_plus: float = in_adapter(
        1.0, "LoRA+: learning rate of the B matrices over that of the A matrices; try 16", gt=0
    )


class PlanFields(BaseModel):
    """What changes only speed, memory and what is kept."""

    on_swap: Literal["warn", "replan"] = in_memory(
        "warn", "when swap grows during training: warn, or split into smaller micro-batches at once"
    )
    save_minutes: float = in_output(
        10.0, "minutes after which a checkpoint is written between two due ones; 0: never", ge=0
    )
    keep_checkpoints: int = in_output(2, "newest checkpoints to keep; each holds the best adapter too", ge=1)


class TrackFields(BaseModel):
    """What is sent to trackers of experiments."""

    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]] = in_output(
        [],
        "trackers of experiments that get the figures and the recipe while training; each is an extra to install, such "
        "as twintune[wandb]",
        value="NAME [NAME ...]",
        choices=TRACKERS,
    )
    track_project: str | None = in_output(
        None,
        "project at the trackers; unless given, what a tracker's own variable names (default: twintune)",
        value="NAME",
    )
    track_text: bool = in_output(
        False, "also send the trackers prompts and the model's answers at each validation; otherwise no text of any row"
    )
    track_artifacts: list[Literal["adapter", "report"]] = in_output(
        [],
        "also send the trackers, at the end, the adapter, or report.html, which quotes rows and answers",
        value="NAME [NAME ...]",
        choices=("adapter", "report"),
    )


class ExportFields(BaseModel):
    """What is made of the adapter."""

    export: Literal["none", "fused", "gguf", "lora-gguf", "mlx"] = in_export(
        "gguf",
        "what to make: the fused folder, a GGUF, the adapter alone as a GGUF, or a quantized folder for mlx-lm",
    )
    quant: list[str] = in_export(["Q4_K_M"], "GGUF types to make", value="TYPE [TYPE ...]", choices=QUANT_TYPES)
    imatrix: bool = in_export(
        False, "quantize with an importance matrix of the training rows, which the run keeps and uses again"
    )
    imatrix_file: str | None = in_export(
        None, "quantize with this importance matrix, a file of llama-imatrix", path=True, value="FILE"
    )
    split_size: str | None = in_export(
        None, "split each GGUF into files of at most this size, such as 2GB; llama.cpp reads them as one", value="SIZE"
    )
    mlx_bits: Literal["4", "6", "8", "mixed-4-6", "mixed-3-6", "mixed-3-4", "mixed-2-6"] | None = in_export(
        None,
        "bits of a weight in the folder for mlx-lm; mixed: more for the sensitive layers. Unless given, 8 for a model "
        "below a billion weights, else 4",
    )
    fuse_into: Literal["base", "dequantized"] | None = in_export(
        None, "with a quantized base: fuse into the 16-bit base (default), or into the dequantized weights of training"
    )
    no_verify: bool = in_export(False, "skip the check that the GGUF is what was trained (see the verify command)")
    llama_cpp: str | None = in_export(
        None, "folder of the llama.cpp build to use; unless given, one is found or built once", path=True, value="DIR"
    )
    install: list[str] = in_export(
        [],
        "put the first GGUF into Ollama or LM Studio on this machine",
        value="PROGRAM [PROGRAM ...]",
        choices=("ollama", "lmstudio"),
    )
    push: str | None = in_export(
        None, "hub repository (owner/name) to upload the result to at the end", value="OWNER/NAME"
    )
    push_public: bool = in_export(
        False, "with --push: make a new repository public; an existing one keeps its visibility"
    )
