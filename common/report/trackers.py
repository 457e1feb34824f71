"""The trackers, each by its own library: what a run's figures, recipe, answers and files become there.

Each is used in a process of its own (common.report.tracker), so it may wait, print and fail.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Figures = dict[str, float]
Answers = list[dict[str, Any]]  # number, prompt, reference, answer
COLUMNS = ("prompt", "reference", "answer")
_PROJECT = "twintune"


@dataclass(frozen=True)
class Begin:
    """What a tracker is told first.

    id: of the tracker's run that is continued, after `step`. config: the recipe and the plan. A resumed run's are the
    same, but for its length and its plan.
    """

    name: str
    folder: str
    config: dict[str, Any]
    project: str | None = None
    id: str | None = None
    step: int = 0

    def project_of(self, variable: str) -> str:
        """The project: as given, or as the tracker's own variable says."""
        return self.project or os.environ.get(variable) or _PROJECT


class Tracker(Protocol):
    """id: by which a resumed run finds the tracker's run again; empty where it needs none. place: where to look."""

    id: str
    place: str

    def figures(self, step: int, figures: Figures) -> None: ...

    def answers(self, step: int, answers: Answers) -> None: ...

    def file(self, name: str, path: str) -> None:
        """Keep the file or folder."""

    def end(self, complete: bool) -> None: ...


class Tensorboard:
    """Event files in the run folder, written without torch or TensorFlow. It keeps no other files."""

    def __init__(self, begin: Begin) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.id, folder = "", Path(begin.folder) / "tensorboard"
        self.place = f"tensorboard --logdir {Path(begin.folder).parent}"
        self._writer = EventFileWriter(str(folder))
        # TensorBoard hides what an earlier process wrote of the steps from here on.
        self._add(begin.step + 1, session_log=SessionLog(status=SessionLog.START))
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in begin.config.items()}
        self._add(begin.step, summary=hparams_pb(plain))
        self._text(begin.step, "config", "\n".join(f"    {key}: {value}" for key, value in begin.config.items()))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def _text(self, step: int, name: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(step, summary=text_pb(name, text))

    def figures(self, step: int, figures: Figures) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for name, value in figures.items():
            self._add(step, summary=scalar_pb(name, value))

    def answers(self, step: int, answers: Answers) -> None:
        for line in answers:
            parts = (f"{name}:\n\n" + _indented(str(line[name])) for name in COLUMNS)
            self._text(step, f"samples/{line['number']}", "\n\n".join(parts))

    def file(self, name: str, path: str) -> None:
        """TensorBoard shows no files."""

    def end(self, complete: bool) -> None:
        self._writer.close()


def _indented(text: str) -> str:
    """As Markdown shows it letter by letter."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class Wandb:
    """A run of Weights & Biases: no console, no code, no git state, no command line goes there.

    Its files lie where it puts them: links out of a run folder would make that folder a stranger's.
    """

    def __init__(self, begin: Begin) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True
        )
        self._run = wandb.init(
            project=begin.project_of("WANDB_PROJECT"),
            name=begin.name,
            id=begin.id or secrets.token_hex(8),
            resume="allow",
            config=begin.config,
            settings=settings,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")  # its own step never goes back, as a resumed run's does
        self.id = self._run.id
        self.place = self._run.url or f"wandb sync {self._run.settings.sync_dir}"

    def figures(self, step: int, figures: Figures) -> None:
        self._run.log({"step": step, **figures})

    def answers(self, step: int, answers: Answers) -> None:
        import wandb

        rows = [[line[name] for name in COLUMNS] for line in answers]
        self._run.log({"step": step, "samples": wandb.Table(columns=list(COLUMNS), data=rows)})

    def file(self, name: str, path: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.id}", type="model" if name == "adapter" else name)
        (artifact.add_dir if Path(path).is_dir() else artifact.add_file)(path)
        self._run.log_artifact(artifact)

    def end(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, or in MLflow's own store in the working folder."""

    def __init__(self, begin: Begin) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(begin.project_of("MLFLOW_EXPERIMENT_NAME"))
        tags = {"mlflow.source.name": "twintune"}
        run = mlflow.start_run(run_id=begin.id, run_name=begin.name, log_system_metrics=False, tags=tags)
        if not begin.id:  # parameters can be written only once
            mlflow.log_params({key: str(value) for key, value in begin.config.items()})
        self.id, self.place = run.info.run_id, f"mlflow run {run.info.run_id} at {mlflow.get_tracking_uri()}"

    def figures(self, step: int, figures: Figures) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def answers(self, step: int, answers: Answers) -> None:
        columns = {name: [line[name] for line in answers] for name in COLUMNS}
        self._mlflow.log_table({"step": [step] * len(answers), **columns}, "samples.json")

    def file(self, name: str, path: str) -> None:
        if Path(path).is_dir():
            self._mlflow.log_artifacts(path, name)
        else:
            self._mlflow.log_artifact(path)

    def end(self, complete: bool) -> None:
        self._mlflow.end_run("FINISHED" if complete else "KILLED")


class Trackio:
    """A run of Trackio, in its local store, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says.

    It finds a run again by its name, so that gets an ending of its own. A new Space is private.
    """

    def __init__(self, begin: Begin) -> None:
        import trackio

        self._trackio = trackio
        self.id = begin.id or f"twintune-{secrets.token_hex(6)}"
        project = begin.project_of("TRACKIO_PROJECT")
        self._run = trackio.init(
            project=project, name=self.id, config=begin.config, resume="allow", private=True, embed=False
        )
        self.place = f"trackio show --project {project}"

    def figures(self, step: int, figures: Figures) -> None:
        self._run.log(figures, step=step)

    def answers(self, step: int, answers: Answers) -> None:
        rows = [[line[name] for name in COLUMNS] for line in answers]
        self._run.log({"samples": self._trackio.Table(columns=list(COLUMNS), data=rows)}, step=step)

    def file(self, name: str, path: str) -> None:
        self._run.log_artifact(path, name=f"{name}-{self.id}", type="model" if name == "adapter" else name)

    def end(self, complete: bool) -> None:
        self._run.finish()


class Swanlab:
    """A run of SwanLab: no terminal, no code, no git state, no host goes there. Its files lie where it puts them."""

    def __init__(self, begin: Begin) -> None:
        import swanlab

        self._swanlab = swanlab
        nothing = swanlab.Settings.Probe(runtime=False, requirements=False, conda=False, git=False)
        terminal = swanlab.Settings.Terminal(proxy_type="none")
        self._run = swanlab.init(
            project=begin.project_of("SWANLAB_PROJ_NAME"),
            name=begin.name,
            id=begin.id or secrets.token_hex(11)[:21],  # it takes no other length
            resume="allow",
            config=begin.config,
            settings=swanlab.Settings(interactive=False, probe=nothing, terminal=terminal),
        )
        self.id = self._run.id
        self.place = self._run.url if self._run.mode == "online" else f"swanlab sync {self._run.dir}"

    def figures(self, step: int, figures: Figures) -> None:
        self._run.log(figures, step=step)

    def answers(self, step: int, answers: Answers) -> None:
        texts = [self._swanlab.Text("\n\n".join(f"{name}: {line[name]}" for name in COLUMNS)) for line in answers]
        self._run.log({"samples": texts}, step=step)

    def file(self, name: str, path: str) -> None:
        folder = Path(self._run.dir) / "kept"  # SwanLab links to the files, and these are there only now
        folder.mkdir(exist_ok=True)
        if Path(path).is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy(path, folder)
        self._run.save(f"{folder}/**", base_path=str(folder))

    def end(self, complete: bool) -> None:
        self._run.finish("success" if complete else "aborted")


TRACKERS: dict[str, Callable[[Begin], Tracker]] = {
    "tensorboard": Tensorboard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
    "swanlab": Swanlab,
}
