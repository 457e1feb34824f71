"""A new run's folder: made and held, then its first files. A step of `train`."""

from contextlib import ExitStack
from dataclasses import replace

from common.commands.prepare import Job
from common.commands.run_folder import FIRST_FILES, check_unused, free_name
from common.files import atomic_write
from common.option_sources import absolute_paths
from common.run_fields import DataRecord, TriedRecord
from common.run_lock import held
from common.run_record import Run
from common.system.environment import write_environment
from common.system.launch import launched
from common.training.metrics import deterministic
from common.verify.cases import write_cases


def claimed(job: Job, lock: ExitStack) -> Job:
    """The job with its run folder made and held, before anything is written there: another process may want the same.

    Raises UserError where that one was quicker and the folder was named by hand; else another name is taken.
    """
    while True:
        try:
            job.run.path.mkdir(parents=True, exist_ok=bool(job.options.output))
            break
        except FileExistsError:
            job = replace(job, run=Run(free_name(job.run.path)))
    lock.enter_context(held(job.run.path))
    check_unused(job.run.path)
    for name in FIRST_FILES:
        (job.run.path / name).unlink(missing_ok=True)
    return job


def write_template(job: Job) -> None:
    """The chat template that the model is served with; where an older version began the run it may have had another."""
    if job.served.template is not None:
        with atomic_write(job.run.template) as temporary:
            temporary.write_text(job.served.template, encoding="utf-8")


def begin(job: Job) -> None:
    """Write a new run's files, its record last, in its folder that is held."""
    run = job.run
    verdict = job.base.verdict
    run.write_recipe(job.recipe)
    run.write_plan(job.plan)
    write_template(job)
    write_environment(run.path)
    write_cases(run.verify_cases, job.cases)
    run.write_report_facts(job.facts)
    run.update(
        status="training",
        recipe_hash=job.recipe.hash(),
        model_hash=job.recipe.model_hash,
        plans=[{"from_step": 1} | job.plan.model_dump()],
        deterministic=deterministic(job.recipe, job.chosen.deterministic),
        stop_ids=job.served.stops,
        sample_prompt=job.prompts[0].messages if job.prompts else [],
        sample_tokens=job.prompts[0].tokens if job.prompts else 0,
        sample_tools=list(job.prompts[0].tools) if job.prompts else [],
        data=DataRecord(
            train_rows=len(job.train),
            valid_rows=len(job.valid),
            tokens=int(job.train.lengths.sum()),
            label_tokens=int(job.train.label_tokens.sum()),
        ),
        tried=TriedRecord(**verdict.model_dump(exclude={"admitted", "why"})) if verdict else None,
        launch=launch.name if (launch := launched()) else "",
        options=absolute_paths(job.options.model_dump(by_alias=True, exclude={"resume", "config"})),
    )
