"""The Dockerfile as far as it is known without Docker: linter, versions, what it copies, and as whom it runs."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests import ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def copied() -> list[str]:
    return [name for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.MULTILINE) for name in line.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="hadolint is installed on Linux alone")
def test_the_linter_has_nothing_to_say() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_versions_are_those_of_the_project() -> None:
    (python,) = re.findall(r"^FROM python:([\d.]+)-", TEXT, re.MULTILINE)
    assert f"{python}.99" in SpecifierSet(PROJECT["project"]["requires-python"])
    pinned = set(re.findall(r"torch==([\d.]+)", TEXT))
    assert len(pinned) == 1
    for other in ("README.md", "Makefile"):
        assert set(re.findall(r"torch==([\d.]+)", (ROOT / other).read_text(encoding="utf-8"))) == pinned
    (torch,) = (one for one in map(Requirement, PROJECT["project"]["dependencies"]) if one.name == "torch")
    assert pinned.pop() in torch.specifier
    assert "download.pytorch.org/whl/cpu" in STAGES["cpu"]
    assert "download.pytorch.org" not in STAGES["cuda"]
    extra = re.search(r"/source\[(\w+)\]", STAGES["cuda"])
    assert extra
    assert extra[1] in PROJECT["project"]["optional-dependencies"]


def test_no_target_runs_as_root() -> None:
    for target in ("cpu", "cuda"):
        assert re.findall(r"^USER (\S+)$", STAGES[target], re.MULTILINE)[-1:] == ["1000"]
        assert STAGES[target].strip().endswith("USER 1000")


def test_only_what_is_installed_reaches_the_build() -> None:
    """No run, no environment, no key that lies in the folder."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert [rule[1:] for rule in rules if rule.startswith("!")] == copied()
    packages = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    modules = {f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]}
    assert packages | modules <= set(copied())
    assert not re.search("TOKEN|SECRET|PASSWORD|API_KEY", TEXT)


def test_what_is_copied_can_be_installed(tmp_path: Path) -> None:
    """Without its dependencies: the command answers from the copy, and its data files are there."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in copied():
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, timeout=120)
    code = "import cli, sys; sys.argv = ['twintune', 'init', '--list']; cli.main(); print(cli.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip().endswith(str(target / "cli.py")), done.stderr
    assert "gemma-3-1b-persona" in done.stdout
    assert (target / "common" / "report" / "templates" / "ja.sentences.yaml").exists()
