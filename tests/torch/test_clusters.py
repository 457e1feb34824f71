"""The files of clusters/: linted, and their commands understood by torchrun and by train."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from cli import build_parser
from common.commands.arguments import joined
from common.option_sources import load_options
from tests import ROOT

CLUSTERS = ROOT / "clusters"
GIVEN = ["--model", "m", "--data", "rows.jsonl"]


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    run = tmp_path / "skypilot.sh"
    run.write_text("#!/bin/bash\n" + yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())["run"])
    for script in (CLUSTERS / "slurm.sh", run):
        program = Path(sys.executable).with_name("shellcheck")
        done = subprocess.run([program, script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_kubernetes_knows_every_field() -> None:
    from kubernetes_validate import latest_version, validate

    for resource in yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text()):
        validate(resource, latest_version(), strict=True)


def in_shell(script: str) -> list[str]:
    """The words of its torchrun command, each variable as 2 and the user's own words as GIVEN."""
    command = script.replace("\\\n", " ").partition("torchrun --")[2].partition("\n")[0]
    return shlex.split(re.sub(r"\$\w+", "2", "--" + command.replace('"$@"', shlex.join(GIVEN))))


def commands() -> dict[str, list[str]]:
    _, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    return {
        "slurm": in_shell((CLUSTERS / "slurm.sh").read_text()),
        "skypilot": in_shell(yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())["run"]),
        "kubernetes": job["spec"]["template"]["spec"]["containers"][0]["args"],
    }


@pytest.mark.parametrize("words", commands().values(), ids=commands())
def test_torchrun_and_train_understand_the_command(words: list[str]) -> None:
    given = parse_args(words)
    assert (given.nnodes, given.rdzv_backend, given.max_restarts) == ("2", "c10d", 3)
    assert given.rdzv_endpoint.endswith(":29500")
    assert given.rdzv_id != "none"  # by which a run is found again after a restart
    assert given.training_script == "cli.py"
    args = build_parser("train").parse_args(joined(given.training_script_args))
    options, _ = load_options(args.flags)
    assert options.model


@pytest.mark.parametrize(("words", "more"), [(GIVEN, ["--output", "runs/slurm-7"]), (["--resume", "runs/a"], [])])
def test_slurm_names_the_run_folder_unless_one_is_resumed(words: list[str], more: list[str], tmp_path: Path) -> None:
    for name, line in (("scontrol", "echo host"), ("srun", 'printf "%s\\n" "$@"')):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    names = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **dict.fromkeys(names, "7")}
    done = subprocess.run(
        ["bash", CLUSTERS / "slurm.sh", *words],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    train = done.stdout.splitlines()
    assert train[train.index("cli.py") + 1 :] == ["train", *more, *words]
