"""Who may import whom, and that the front door stays light and complete."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import cli
from common.option_aliases import EXPLAINED, SAME
from common.options import Options
from tests import ROOT

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
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


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
    return {name for node in nodes(path) for name in imported(node)}


def at_import(path: Path) -> set[str]:
    """What runs when the module is imported: functions' bodies and TYPE_CHECKING blocks left out."""

    def walk(node: ast.AST) -> Iterator[str]:
        yield from imported(node)
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child)

    return set(walk(tree(path)))


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def every(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of all the files, which names those that fail: as one each they would be thousands."""

    def made(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            faults = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    faults.append(f"{place(path)}: {error}")
            assert not faults, "\n".join(faults)

        test.__doc__ = check.__doc__
        return test

    return made


@every(modules("common"))
def test_common_never_imports_a_backend(path: Path) -> None:
    assert not roots(everywhere(path)) & {"mlx_backend", "torch_backend", "cli"}


@every(modules("common"))
def test_common_needs_only_light_packages_at_import(path: Path) -> None:
    assert roots(at_import(path)) <= set(sys.stdlib_module_names) | LIGHT | {"common"}


# What of common imports a framework, in a function: the libraries that it calls take or make nothing else.
FRAMEWORK_USERS = {
    "common/models/gguf_import.py": {"torch"},  # transformers dequantizes a GGUF into torch tensors
    "common/export/mlx.py": {"mlx_lm"},  # mlx-lm's own quantizer writes the MLX export
}


@every(modules("common"))
def test_common_asks_no_framework(path: Path) -> None:
    found = roots(everywhere(path)) & {"torch", "peft", "mlx", "mlx_lm", "bitsandbytes"}
    assert found == FRAMEWORK_USERS.get(place(path), set())


def test_a_backend_package_is_imported_without_its_framework() -> None:
    code = (
        "import sys, torch_backend, mlx_backend; torch_backend.fault(); mlx_backend.fault(); "
        f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({FRAMEWORKS!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@every(modules("mlx_backend", "torch_backend"))
def test_a_backend_imports_neither_the_other_nor_the_display(path: Path) -> None:
    other = {"mlx_backend": "torch_backend", "torch_backend": "mlx_backend"}[path.parent.name]
    names = everywhere(path)
    assert other not in roots(names)
    assert not any(name.startswith("common.display") for name in names)
    assert "cli" not in roots(names)


@every(modules("mlx_backend"))
def test_the_mlx_backend_computes_without_torch(path: Path) -> None:
    assert not roots(everywhere(path)) & {"torch", "peft"}


@every(modules("torch_backend"))
def test_the_torch_backend_computes_without_mlx(path: Path) -> None:
    assert not roots(everywhere(path)) & {"mlx", "mlx_lm"}


# Each may import itself and what stands to its left; never what stands to its right, nor a sibling in the same braces.
LAYERS = (
    {"errors", "lazy_arrays", "option_fields", "option_aliases", "strict_json", "files"},
    {"option_families", "config_values", "other_trainings"},
    {
        "recipe",
        "run_lock",
        "option_faults",
        "option_translation",
        "documents",
        "paths",
        "verify_record",
        "other_scripts",
    },
    {"presets", "goals", "other_configs", "other_data"},
    {"migration_tools"},
    {"run_fields"},
    {"sampling", "options", "run_record", "model_files", "memory_terms"},
    {"backend", "option_sources", "migration"},
    {"rank_backend"},
    {"backend_package"},
    {"display", "system"},
    {"context", "questions"},
    {"data", "models"},
    {"training", "llama_cpp"},
    {"inference", "verify", "export"},
    {"evaluation", "report"},
    {"attest"},
    {"commands"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
BACKENDS_MAY = {
    *("errors", "backend", "memory_terms", "recipe", "sampling", "system", "backend_package", "rank_backend"),
    *("lazy_arrays", "data.batching", "data.layouts"),
    # model_folder: config and tensor names of what a backend loads, as everybody else reads them
    *(f"models.{name}" for name in ("families", "model_folder", "mlx_quantized", "shapes", "experts")),
}
SHARED_STEPS = {
    *("arguments", "experts", "header", "prepare", "new_run", "run_folder", "several", "tuned", "watch", "fuse", "plan")
}


def parts_of_common(path: Path) -> set[tuple[str, ...]]:
    """What of common a module imports: `("data", "batching")`."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "common":
            parts = tuple((node.module or "").split(".")[1:])
            inner = (ROOT / "common" / Path(*parts)).is_dir()
            found |= {(*parts, alias.name) for alias in node.names} if inner else {parts}
    return found


@every(modules("common"))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    own = path.relative_to(ROOT / "common").with_suffix("").parts[0]
    for other in parts_of_common(path):
        assert other[0] == own or LAYER[other[0]] < LAYER[own], other
        if own == other[0] == "commands" and path.stem != "__init__":
            assert other[1] in SHARED_STEPS, other


@every(modules("mlx_backend", "torch_backend"))
def test_a_backend_imports_the_contract_and_little_else(path: Path) -> None:
    for other in parts_of_common(path):
        assert other[0] in BACKENDS_MAY or ".".join(other[:2]) in BACKENDS_MAY, other


# Beside model_folder: who copies a folder's files, and who writes a config of its own.
NAME_CONFIG = {
    "common/models/model_folder.py",
    "common/model_files.py",
    "common/export/upload.py",
    *("common/models/gguf_import.py", "common/models/mlx_quantized.py", "common/verify/tiny_models.py"),
    *("common/export/fused_folder.py", "common/export/mlx.py", "common/models/first_layers.py"),
}


@every(modules(*FOLDERS))
def test_only_model_folder_reads_a_models_config(path: Path) -> None:
    named = any(isinstance(node, ast.Constant) and node.value == "config.json" for node in nodes(path))
    assert not named or place(path) in NAME_CONFIG


@every([*modules(*FOLDERS, "examples", "benchmarks"), ROOT / "cli.py"])
def test_a_function_fits_a_screen_and_a_file_one_sitting(path: Path) -> None:
    """Complexity and the number of parameters are ruff's to hold (C901, PLR0913)."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 310
    functions = (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60] == []


# Where any error is caught: the front door calls it a bug; a part that nothing else needs may fail; a model that is
# tried is refused; a tracker's process ends, and says why.
CATCH_ALL = {
    "cli.py": "main",
    "common/display.py": "optional",
    "common/verify/admission.py": "_computed",
    "common/report/tracker.py": "main",
}


def broad_handlers(path: Path) -> Iterator[tuple[str, ast.Try]]:
    """`(function, try statement)` wherever any exception is caught and not raised again as it is."""
    for function in (node for node in nodes(path) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            for handler in node.handlers if isinstance(node, ast.Try) else ():
                kinds = "Exception" if handler.type is None else ast.unparse(handler.type)
                last = handler.body[-1]
                again = isinstance(last, ast.Raise) and last.exc is None
                if re.search(r"\b(Base)?Exception\b", kinds) and not again:
                    yield function.name, node


def our_names(path: Path) -> set[str]:
    """What in the module is ours: its own functions and classes, and what it imports from this repository."""
    found = {"self"}
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOLDERS:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def suppressed(path: Path) -> list[str]:
    """What `suppress` is given, that would hide an error of our own."""
    calls = (node for node in nodes(path) if isinstance(node, ast.Call))
    given = [arg for call in calls if ast.unparse(call.func).endswith("suppress") for arg in call.args]
    hides = r"(Base)?Exception|TypeError|KeyError|AttributeError|IndexError"
    return [ast.unparse(arg) for arg in given if re.fullmatch(hides, ast.unparse(arg))]


@every([*modules(*FOLDERS), ROOT / "cli.py"])
def test_no_error_of_our_own_is_suppressed(path: Path) -> None:
    assert suppressed(path) == []


def is_one_foreign_call(body: list[ast.stmt], ours: set[str]) -> bool:
    calls = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call)]
    names = ast.unparse(calls[0].func).removeprefix("self.").split(".") if calls else []
    return len(body) == len(calls) == 1 and names[0] not in ours


@every([*modules(*FOLDERS), ROOT / "cli.py"])
def test_any_error_is_caught_only_around_one_call_of_a_library(path: Path) -> None:
    """An error of our own must not look like a fault of a file."""
    for function, node in broad_handlers(path):
        if CATCH_ALL.get(place(path)) != function:
            assert is_one_foreign_call(node.body, our_names(path)), f"{place(path)}:{node.lineno} ({function})"


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("x = load(path)", True),
        ("return self.tokenizer.apply(a, b=c)", True),
        ("x = ours(path)", False),
        ("self.render(path)", False),
        ("x = load(str(path))", False),
        ("x = load(path)\ny = x + 1", False),
        ("x = path['a']", False),
    ],
)
def test_one_call_of_a_library_is_told_from_others(body: str, right: bool) -> None:
    assert is_one_foreign_call(ast.parse(body.replace("return ", "")).body, {"ours", "render", "self"}) == right


def test_every_package_says_what_it_is_for() -> None:
    for path in modules(*FOLDERS):
        if path.stem == "__init__":
            assert ast.get_docstring(tree(path)), path


def test_only_the_display_prints() -> None:
    """It shows what strangers wrote, control characters and all; what else is printed is ours."""
    paths = [ROOT / "cli.py", *modules(*FOLDERS)]
    assert [place(path) for path in paths if "rich" in roots(everywhere(path))] == ["common/display.py"]
    ours = {"cli.py", "common/commands/schema.py", "common/commands/completion.py"}
    calls = {
        path: re.search(r"(?<![.\w])print\(|sys\.std(out|err)\.write", path.read_text(encoding="utf-8"))
        for path in paths
    }
    assert {place(path) for path, found in calls.items() if found} == ours


def test_nobody_imports_the_examples() -> None:
    paths = [ROOT / "cli.py", *modules(*FOLDERS)]
    assert [place(path) for path in paths if "examples" in roots(everywhere(path))] == []


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
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("common")]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {['cli', *names]!r}]; "
        f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & set({FRAMEWORKS!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# --- words

# Never right in what is written here: the field has a standard term for each, and spelling is that of the US.
NEVER = re.compile(
    r"\b(foret(?:ell|old|ells)|mend(?:s|ed)?|anew|doubtful|way back|way forth|hold-out|ends with 1"
    r"|(?:take|bring) (?:it|them|that) (?:away|back)|go(?:es|ing)? on (?:with|from)|to go on|the talk"
    r"|(?<!there )is no (?:option|command|target|size|file|key|label|part|GGUF|multiple|number)|no whole \w+"
    r"|licence[sd]?|(?:colour|neighbour|behaviour|favour|honour)\w*"
    r"|(?:quanti|normali|tokeni|optimi|initiali|seriali|recogni|organi|summari|minimi|maximi)s(?:e[sdr]?|ing|ations?))\b",
    re.IGNORECASE,
)
# LICENCE is the name of a file, tokenise a key of old records, mend a word of the example's data.
QUOTED = ('"LICENCE"', '["tokenise"]', "lift mend mail")
PROSE = (
    *("README.md", "README.ja.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "cli.py", "zensical.toml"),
    *("common", "mlx_backend", "torch_backend", "configs", "docs", "examples", "benchmarks", "tests"),
)


def written() -> list[Path]:
    """Every text written here; left out are data files, pictures, and this file, which has to name the words."""
    found = [
        path
        for root in (ROOT / name for name in PROSE)
        for path in (sorted(root.rglob("*")) if root.is_dir() else [root])
    ]
    kinds = (".py", ".md", ".toml", ".yaml", ".jinja", ".cpp", ".cmake")
    return [p for p in found if (p.suffix in kinds or p.name == "Makefile") and p != Path(__file__).resolve()]


@every(written())
def test_the_fields_own_words_are_used(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in QUOTED:
        text = text.replace(name, "")
    lines = text.splitlines()
    assert [f"{number}: {found[0]}" for number, line in enumerate(lines, 1) if (found := NEVER.search(line))] == []


@pytest.mark.parametrize(
    "line", ["--x is no option", "Take it away.", "the licence", "To go on: --resume", "quantised", "its colour"]
)
def test_the_word_test_finds_what_it_should(line: str) -> None:
    assert NEVER.search(line)


# --- help


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    monkeypatch.setattr(sys, "argv", ["twintune", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    return capsys.readouterr().out


TALKING = ("chat", "generate", "serve", "eval")


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(monkeypatch, capsys, "--help")
    assert all(
        f"    {name} " in text for name in ("train", "plan", "check-data", "fuse", "compare", "doctor", *TALKING)
    )


def test_trains_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(monkeypatch, capsys, "train", "--help")
    missing = [flag for flag in FLAGS if f"--{flag} " not in text and f"--{flag}," not in text]
    assert missing == []


def test_trains_help_names_no_option_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {(field.alias or name).replace("_", "-") for name, field in Options.model_fields.items()}
    words = {
        word.strip(",:;.)")
        for word in shown(monkeypatch, capsys, "train", "--help").split()
        if re.fullmatch("--[a-z].*", word)
    }
    flags = {word[2:] for word in words if not word.startswith("--no-")}
    # words of the descriptions, such as "in place of --epochs", are options too
    assert flags - {"help"} <= known


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("check-data", ["DATA", "--model", "--max-length", "--overflow", "--field", "--thinking", "--explain"]),
        ("fuse", ["RUN", "--export", "--quant", "--llama-cpp"]),
        ("compare", ["RUN [RUN ...]"]),
        ("doctor", ["--help"]),
        ("chat", ["--with", "--system-file", "--temperature", "--top-k", "--min-p", "--repeat-penalty", "--seed"]),
        ("generate", ["--prompts", "--out", "--max-tokens", "--slots"]),
        ("serve", ["--port", "--host", "--context"]),
        ("eval", ["RUN|MODEL", "--data", "--with", "--metric", "--regex", "--json-schema", "--scorer"]),
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
