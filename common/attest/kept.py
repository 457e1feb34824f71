"""Figures that are read or hashed: the recipe, the curve, the files, the memory, the rows that the run keeps."""

from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from common.attest.subject import Figures, Subject, digest
from common.data.encode import Encoded, load_tokenizer
from common.data.summary import labeled_parts
from common.errors import UserError
from common.export.model_card import recipe_rows, shown_value
from common.files import file_digest
from common.model_files import tokenize
from common.report.kept import Point, read_kept
from common.run_record import Run
from common.verify.cases import encoded_again

_ROWS = 8  # of which the label map is stated
_POINTS = 200  # of the training curve; the hash is over all of them
_OWN = "README.md"  # the model card names the attest, and so cannot be in it


def recipe(given: Subject) -> Figures:
    record, kept = given.run.record, given.run.recipe
    settings = {name: shown_value(value) for name, value in recipe_rows(record, kept).items()}
    settings.pop("recipe hash")
    hashes = ("model_hash", "data_hash", "rows_hash", "template_hash", "adapter_hash")
    found = {name.replace("_", " "): getattr(kept, name) for name in hashes}
    return {"hash": kept.hash(), "hash of the record": record.recipe_hash, **found, "settings": settings}


def labels(given: Subject) -> Figures:
    """The first rows that verification takes, read from the data and encoded again."""
    with given.context.display.stage("encode the rows again"):
        cases = encoded_again(given.run, given.base.path)
        tokenizer = load_tokenizer(given.base.path) if given.texts else None
    found: Figures = {"of": "validation rows" if cases.held_out else "training rows"}
    return found | {f"row {n}": _map(row, tokenizer) for n, row in enumerate(cases.rows[:_ROWS], 1)}


def _map(row: Encoded, tokenizer: Any) -> Figures:
    """tokenizer: for the text, where it is asked for."""
    found: Figures = {"tokens": len(row.ids), "labels": row.label_tokens}
    found |= {"ids": digest(row.ids), "mask": digest(row.mask)}
    if tokenizer is not None:
        parts = [[label, text] for label, text in labeled_parts(row, tokenizer)]
        found |= {"token ids": row.ids.tolist(), "label positions": np.flatnonzero(row.mask).tolist(), "text": parts}
    return found


def cases(given: Subject) -> Figures:
    """What verification asks: the ids that training had, and those that the fused folder's tokenizer gives."""
    known, tokenizer = given.cases, load_tokenizer(given.fused.path)
    texts = [tokenize(tokenizer, text, add_special_tokens=False)["input_ids"] for text in known.texts]
    prompts = [tokenize(tokenizer, prompt.text)["input_ids"] for prompt in known.prompts]
    return {
        "rows": len(known.rows),
        "held out": known.held_out,
        "ids of the rows": digest([row.ids.tolist() for row in known.rows]),
        "labels of the rows": digest([np.flatnonzero(row.mask).tolist() for row in known.rows]),
        "prompts": len(known.prompts),
        "ids of the prompts": digest([prompt.text_ids for prompt in known.prompts]),
        "ids of the prompts, encoded again": digest(prompts),
        "texts": len(known.texts),
        "ids of the texts, encoded again": digest(texts),
    }


def stops(given: Subject) -> Figures:
    return {"trained": given.run.record.stop_ids, "of the fused folder": given.fused.end_ids}


def curve(given: Subject) -> Figures:
    kept = read_kept(given.run)
    training, validation = kept.points("loss"), kept.points("valid_loss")
    if not training:
        raise UserError(f"{given.run.metrics} is missing or damaged.", "Give the complete run folder.")
    return {
        "training losses": digest(training),
        "validation losses": digest(validation),
        "steps": training[-1][0],
        "training": _thinned(training),
        "validation": _thinned(validation),
    }


def _thinned(points: list[Point]) -> list[list[float]]:
    """At most 200 of them, evenly spread, the first and the last among them."""
    count = min(len(points), _POINTS)
    return [list(points[int(n)]) for n in np.linspace(0, len(points) - 1, count)]


def held_out(given: Subject) -> Figures:
    """The losses of rows that training has not seen, before it and of the adapter that is exported."""
    record, losses = given.run.record, dict(read_kept(given.run).points("valid_loss"))
    return {
        "validation loss before": losses.get(0),
        "validation loss after": losses.get(record.exported_step or 0),
        "exported step": record.exported_step,
        "test rows": record.test_rows,
        "test loss": record.test_loss,
        "test loss, 95 % interval": record.test_loss_interval,
        "test perplexity": record.test_perplexity,
    }


def files(given: Subject) -> Figures:
    """The SHA-256 of each file: adapter, fused folder, GGUFs."""
    run, export = given.run, given.run.record.export
    folders = (run.adapter, run.path / "adapter-mlx", run.fused, run.mlx)
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if _is_ours(path)]
    named = [*(file for gguf in export.gguf for file in gguf.files), export.mmproj, export.lora_gguf, export.imatrix]
    paths += [run.path / file for file in (*named, "gguf/Modelfile") if file and (run.path / file).is_file()]
    found: Figures = {}
    with given.context.display.stage("hash the files") as progress:
        for number, path in enumerate(paths):
            name = path.relative_to(run.path).as_posix()
            progress(number / len(paths), name)
            found[name] = file_digest(path)
    if not found:
        raise UserError(f"{run} holds neither an adapter nor a model.", "Give the complete run folder.")
    return found


def named_files(run: Run, names: Iterable[str]) -> tuple[Figures, list[str]]:
    """`(the SHA-256 of the files of these names in the run, those that are not there)`. A stranger gave the names."""
    found, absent = {}, []
    for name in names:
        path = run.path / name
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not path.is_file():
            absent.append(name)
        else:
            found[name] = file_digest(path)
    return found, absent


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.name != _OWN and not path.name.startswith(".")


def memory(given: Subject) -> Figures:
    record = given.run.record
    return {
        "estimated peak": record.predicted_peak_bytes,
        "estimated": record.predicted_parts,
        "measured peak": record.peak_memory_bytes,
        "measured by": record.memory_kind,
        "peak RSS": record.peak_rss_bytes,
        "swap growth": record.swap_growth_bytes,
    }


def versions(given: Subject) -> Figures:
    """Of the machine and the packages that trained."""
    found = read_kept(given.run).environment
    if not found:
        raise UserError(
            f"{given.run.path / 'environment.json'} is missing or damaged.", "Give the complete run folder."
        )
    return found
