"""What an export needs, checked before training begins."""

from collections.abc import Sequence
from typing import Any

from common.backend import Adapter
from common.display import Display
from common.errors import UserError
from common.export.budget import EXPORT_STEPS, Stage, estimate_stages, needs_llama
from common.export.fused_folder import trained_bytes
from common.export.mlx import check_installed, check_model, most_bits, scheme_of
from common.llama_cpp.build import ensure, missing_build_tools, own
from common.llama_cpp.convert import check_vocabulary
from common.llama_cpp.convertible import check_convertible, lost_window
from common.llama_cpp.imatrix import check_imatrix_base, check_imatrix_file, imatrix_tool
from common.llama_cpp.install import LlamaCpp, find
from common.llama_cpp.lora import check_lora, check_lora_base, check_lora_model, lora_script
from common.llama_cpp.mmproj import vision_fault
from common.llama_cpp.split import check_split, split_tool
from common.models.families import is_known
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder
from common.options import Options, read_size
from common.paths import user_path
from common.training.memory_estimate import TrainingMemory


def export_stages(options: Options, base: ModelFolder, adapter: Adapter | None, memory: TrainingMemory) -> list[Stage]:
    """The estimate of every stage of the export that the options ask for. adapter: None with method full."""
    trained, held = trained_bytes(adapter, base), _loaded_again(options, memory, base)
    asked = {"imatrix": options.imatrix, "split": options.split_size, "verify": not options.no_verify}
    also, bits = [name for name in asked if asked[name]], most_bits(scheme_of(options.mlx_bits, base))
    return estimate_stages(options.export, options.quant, base, trained, held, also, bits)


def _loaded_again(options: Options, memory: TrainingMemory, base: ModelFolder) -> int:
    """Bytes of the quantized base that --fuse-into dequantized loads again."""
    if options.fuse_into != "dequantized" or memory.recipe.quantization == "none":
        return 0
    if quantized_source(base.path) is not None:
        return 0
    return memory.package.memory_terms.weight_bytes(memory.dims, memory.recipe)


def tools_for(
    options: Options,
    method: str,
    base: ModelFolder,
    display: Display,
    tokenizer: Any | None = None,
    texts: Sequence[str] = (),
) -> LlamaCpp | None:
    """The llama.cpp that the export needs, found or built; None where it needs none.

    Every other need of the export is checked too, now and not after hours of training. Raises UserError. tokenizer,
    texts: as check_convertible takes them.
    """
    _check_form(options, method, base, display)
    if "convert" in EXPORT_STEPS[options.export]:
        with display.stage("check the tokenizer"):
            check_convertible(base.path, tokenizer, texts)
    if not needs_llama(options.export):
        return None
    llama = find(options.llama_cpp)
    if llama is None:
        if missing := missing_build_tools():
            raise UserError(
                "llama.cpp makes the GGUF; none was found, and it cannot be built here:\n" + "\n".join(missing),
                "Install that, name a build with --llama-cpp DIR, or stop earlier with --export fused.",
            )
        with display.stage("build llama.cpp, once") as progress:
            llama = ensure(options.llama_cpp, progress)
    _check_tools(options, base, llama, display)
    display.say(f"llama.cpp: {llama.where}")
    return llama


def _check_form(options: Options, method: str, base: ModelFolder, display: Display) -> None:
    """What needs no llama.cpp to be known."""
    through = EXPORT_STEPS[options.export]
    if "mlx" in through:
        check_installed()
        check_model(base, display)
    if "lora" in through:
        check_lora(method)
        check_lora_base(base)
        check_lora_model(base)
    if "convert" not in through:
        return
    if base.has_vision and (fault := vision_fault(base.path)):
        display.warn(
            f"{base.path} has a vision tower, but {fault}: the GGUF will take text only. For images, copy that "
            "file from the base model into the folder"
        )
    if is_known(base.config):
        check_imatrix_base(options.quant, base)
        if window := lost_window(base.config):
            display.warn(
                f"llama.cpp has no sliding window for {base.config['model_type']}: beyond {window} tokens, prompt and "
                "answer together, the GGUF's results differ from training"
            )
    if options.imatrix_file:
        check_imatrix_file(user_path(options.imatrix_file, "--imatrix-file"), base)
    if options.split_size:
        check_split(read_size(options.split_size), options.quant, base)


def _check_tools(options: Options, base: ModelFolder, llama: LlamaCpp, display: Display) -> None:
    """The programs beside the converter, built where they are missing."""
    through = EXPORT_STEPS[options.export]
    if "lora" in through:
        lora_script(llama)
    if "convert" not in through:
        return
    with display.stage("ask llama.cpp's converter about the tokenizer"):
        check_vocabulary(base.path, llama)
    if options.imatrix:
        imatrix_tool(llama)
    if options.split_size:
        with display.stage("find or build llama-gguf-split") as progress:
            split_tool(llama, progress)
    if not options.no_verify and llama.logits is None:
        with display.stage("build llama.cpp, once, to verify with") as progress:
            own(progress)
