"""Who may import whom, and that the front door stays light and complete."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from common.aliases import EXPLAINED, SAME
from common.config import ROOT, Options

FOLDERS = ("common", "mlx_backend", "torch_backend")
LIGHT = {"numpy", "ml_dtypes", "safetensors", "pydantic", "yaml", "rich"}  # beside the standard library
FRAMEWORKS = ("torch", "mlx", "mlx_lm", "transformers", "peft", "tokenizers", "datasets", "huggingface_hub", "gguf")
FLAGS = (
    *("config", "model", "data", "output", "backend", "device", "precision"),
    *("steps", "epochs", "batch-size", "learning-rate", "warmup", "schedule", "max-length"),
    *("rank", "alpha", "dropout", "targets", "seed", "eval-every", "save-every"),
    *("resume", "export", "quant", "weight-decay", "quiet", "json", "llama-cpp"),
)


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


def imported(node: ast.AST) -> list[str]:
    """Full names that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is asked for"
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        return [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return []


def everywhere(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imported(node)}


def at_import(path: Path) -> set[str]:
    """What runs when the module is imported: functions' bodies and TYPE_CHECKING blocks left out."""

    def walk(node: ast.AST) -> Iterator[str]:
        yield from imported(node)
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child)

    return set(walk(ast.parse(path.read_text(encoding="utf-8"))))


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", modules("common"), ids=lambda path: path.name)
def test_common_never_imports_a_backend(path: Path) -> None:
    assert not roots(everywhere(path)) & {"mlx_backend", "torch_backend", "cli"}


@pytest.mark.parametrize("path", modules("common"), ids=lambda path: path.name)
def test_common_needs_only_light_packages_at_import(path: Path) -> None:
    own = {"common", "examples"}
    assert roots(at_import(path)) <= set(sys.stdlib_module_names) | LIGHT | own


@pytest.mark.parametrize(
    "path", modules("mlx_backend", "torch_backend"), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_backend_imports_neither_the_other_nor_the_display(path: Path) -> None:
    other = {"mlx_backend": "torch_backend", "torch_backend": "mlx_backend"}[path.parent.name]
    names = everywhere(path)
    assert other not in roots(names)
    assert not any(name.startswith("common.progress") for name in names)
    assert "cli" not in roots(names)


@pytest.mark.parametrize("path", modules("mlx_backend"), ids=lambda path: path.name)
def test_the_mlx_backend_computes_without_torch(path: Path) -> None:
    assert not roots(everywhere(path)) & {"torch", "peft"}


@pytest.mark.parametrize("path", modules("torch_backend"), ids=lambda path: path.name)
def test_the_torch_backend_computes_without_mlx(path: Path) -> None:
    assert not roots(everywhere(path)) & {"mlx", "mlx_lm"}


def test_the_front_door_reaches_backends_only_by_importlib() -> None:
    assert not roots(everywhere(ROOT / "cli.py")) & {"mlx_backend", "torch_backend"}


def test_the_scan_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "import numpy as np\nif TYPE_CHECKING:\n    import peft\ntry:\n    from mlx import core\nexcept E:\n    pass\n"
        "class A:\n    import rich.text\n    def f(self):\n        import torch\n"
    )
    assert roots(at_import(path)) == {"numpy", "mlx", "rich"}
    assert roots(everywhere(path)) == {"numpy", "mlx", "rich", "torch", "peft"}


def test_importing_everything_of_common_loads_no_framework() -> None:
    names = [f"common.{path.stem}" for path in modules("common") if path.stem != "__init__"]
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {['cli', *names]!r}]; "
        f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({FRAMEWORKS!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# --- help


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    monkeypatch.setattr(sys, "argv", ["twintune", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    return capsys.readouterr().out


TALKING = ("chat", "generate", "serve")


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(monkeypatch, capsys, "--help")
    assert all(f"• {name} " in text for name in ("train", "plan", "check-data", "fuse", "compare", "doctor", *TALKING))


def test_trains_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(monkeypatch, capsys, "train", "--help")
    missing = [flag for flag in FLAGS if f"--{flag} " not in text and f"--{flag}," not in text]
    assert missing == []


def test_trains_help_names_no_option_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {(field.alias or name).replace("_", "-") for name, field in Options.model_fields.items()}
    words = {
        word.strip(",")
        for word in shown(monkeypatch, capsys, "train", "--help").split()
        if re.fullmatch("--[a-z].*", word)
    }
    flags = {word[2:] for word in words if not word.startswith("--no-")}
    # words of the descriptions, such as "in place of --epochs", are options too
    assert flags - {"help"} <= known


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("check-data", ["STR", "--model", "--max-length", "--overflow", "--field", "--thinking", "--explain"]),
        ("fuse", ["PATH", "--export", "--quant", "--llama-cpp"]),
        ("compare", ["RUN RUN [RUN ...]"]),
        ("doctor", ["--help"]),
        ("chat", ["--with", "--system-file", "--temperature", "--top-k", "--min-p", "--repeat-penalty", "--seed"]),
        ("generate", ["--prompts", "--out", "--max-tokens", "--slots"]),
        ("serve", ["--port", "--host", "--context"]),
    ],
)
def test_every_commands_help_names_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, options: list[str]
) -> None:
    text = shown(monkeypatch, capsys, command, "--help")
    assert all(option in text for option in options)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_an_option_under_its_own_name(flag: str) -> None:
    name = flag.replace("-", "_")
    assert name in {field.alias or key for key, field in Options.model_fields.items()}
    assert name not in SAME
    assert name not in EXPLAINED


def test_every_option_is_described() -> None:
    assert [name for name, field in Options.model_fields.items() if not field.description] == []
