"""Which architectures --try-model admits: a tiny random model of each that transformers and mlx-lm both have.

    python -m benchmarks.architectures                   # all that are not done yet with these libraries
    python -m benchmarks.architectures --only mamba olmo2   # these, done or not
    python -m benchmarks.architectures --table           # what was found, as Markdown

Every verdict is written to benchmarks/results/architectures.json as soon as it is there.
"""

import argparse
import json
import re
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import mlx_backend.backend  # noqa: F401  # before numpy and torch, or MLX gets another BLAS
from benchmarks import commit
from benchmarks.architecture_configs import BY_TYPE, MULTIMODAL, ON_THE_HUB, SIZES
from benchmarks.regret import backend_named
from benchmarks.regret_results import RESULTS
from common.context import Context
from common.display import Display
from common.models.admitted import versions
from common.models.families import is_known
from common.models.model_folder import ModelFolder
from common.verify.admission import admit

_FILE = RESULTS / "architectures.json"


def write_model(kind: str, folder: Path) -> ModelFolder:
    """A random model of this model type, of one or two layers of each kind, as transformers saves it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    made = AutoModelForImageTextToText if kind in MULTIMODAL else AutoModelForCausalLM
    model = made.from_config(_config(kind), dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # larger than a usual start, so that differences show
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
            elif "norm" in name.lower():
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    path, more = folder / "config.json", ON_THE_HUB.get(kind, {})
    config = {**json.loads(path.read_text(encoding="utf-8")), **more}
    config = {key: value for key, value in config.items() if value is not None or key not in more}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return ModelFolder(folder)


def _config(kind: str) -> Any:
    from transformers import AutoConfig

    if kind in MULTIMODAL:
        text, vision = MULTIMODAL[kind]
        return AutoConfig.for_model(kind, text_config=_config(text).to_dict(), vision_config=vision)
    fields = AutoConfig.for_model(kind).to_dict()
    given = {name: value for name, value in (SIZES | BY_TYPE[kind]).items() if name in fields}
    for name in ("sliding_window", "layer_types"):  # mlx-lm has no window for several
        if name in fields:
            given.setdefault(name, None)
    return AutoConfig.for_model(kind, **given)


def verdict_on(kind: str, when: dict[str, str]) -> dict[str, Any]:
    folder, began = Path(tempfile.mkdtemp()), time.perf_counter()
    try:
        model = write_model(kind, folder)
        verdict = admit(model, Context(backend_named, Display("quiet"))).model_dump()
    except Exception as error:  # a config class that wants other sizes
        verdict = {"architecture": kind, "admitted": False, "why": f"no tiny model was made: {error}".split("\n")[0]}
    finally:
        shutil.rmtree(folder)
    verdict["why"] = re.sub(r"\S*/\S+", "the model", verdict["why"])  # no path of this machine
    return verdict | when | {"seconds": round(time.perf_counter() - began, 1)}


def converted(source: Path) -> set[str]:
    """Names of the architectures that llama.cpp's converter registers. source: its folder."""
    files = [source / "convert_hf_to_gguf.py", *source.glob("conversion/*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    registered = [name for text in texts for name in re.findall(r"\.register\(([^)]*)\)", text)]
    return {name for names in registered for name in re.findall(r'"(\w+)"', names)}


def table(found: dict[str, Any]) -> str:
    lines = ["| model type | architecture | verdict | LoRA on | found |", f"|{' --- |' * 5}"]
    for kind, one in sorted(found.items()):
        state = "admitted" if one["admitted"] else "refused"
        checks = one.get("checks", {})
        shown = f"logits {checks['logits']}" if one["admitted"] and "logits" in checks else one["why"]
        lines.append(f"| {kind} | {one['architecture']} | {state} | {', '.join(one.get('targets', []))} | {shown} |")
    admitted = [one for one in found.values() if one["admitted"]]
    unknown = sum(not of_family(one) for one in admitted)
    said = f"{len(admitted)} of {len(found)} admitted, {unknown} of them of no supported family."
    return "\n".join([*lines, "", said])


def of_family(one: dict[str, Any]) -> bool:
    """Whether --try-model leaves this architecture to the layers of ours. one: a verdict."""
    return is_known({"architectures": [one["architecture"]]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures")
    parser.add_argument(
        "--only", nargs="+", choices=[*BY_TYPE, *MULTIMODAL], metavar="TYPE", help="these alone, done or not"
    )
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="its source, to say what it converts")
    parser.add_argument("--table", action="store_true", help="print what was found")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8")) if _FILE.exists() else {}
    when = commit.now()
    for kind in (given.only or [*BY_TYPE, *MULTIMODAL]) if not given.table else []:
        if given.only or found.get(kind, {}).get("versions") != versions():
            found[kind] = verdict_on(kind, when)
            _FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            one = found[kind]
            print(f"{kind}: {'admitted' if one['admitted'] else one['why']}; {one['seconds']} s", flush=True)
    print(table(found))
    if given.llama_cpp:
        known = converted(given.llama_cpp)
        admitted = {one["architecture"] for one in found.values() if one["admitted"] and not of_family(one)}
        print(
            f"llama.cpp's converter knows {len(admitted & known)} of {len(admitted)} that are of no supported family."
        )


if __name__ == "__main__":
    main()
