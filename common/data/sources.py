"""The rows of all that --data names: one source, or several mixed by --weights."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.backend import Progress
from common.data.dataset import Counted, Dataset, Example
from common.data.encode import Encoder, load_tokenizer, masking_of
from common.data.facts import data_hash
from common.data.load import load_data
from common.data.mixed_rows import MixedRows
from common.errors import UserError
from common.options import Options
from common.paths import user_path
from common.recipe import Recipe
from common.run_record import Run


def data_of(run: Run, options: Options) -> Dataset:
    """The run's data, read again. Raises UserError where it has changed since, or is gone."""
    without = "or do without it: --no-verify, no --imatrix."
    try:
        data = read_sources(options)
    except UserError as error:
        raise UserError(error.what, f"Restore the data of {run}, {without}") from None
    if data_hash(data, run.recipe.version) != run.recipe.data_hash:
        raise UserError(f"{named(options)} is not the data that {run} was trained on.", f"Restore that data, {without}")
    return data


def encoder_of(base: Path, options: Options, recipe: Recipe) -> Encoder:
    """As in training. `base` is the model's folder: its tokenizer is the one that training used."""
    return Encoder(load_tokenizer(base, options.chat_template), masking_of(recipe))


def named(options: Options) -> str:
    """The sources, as messages name them."""
    return " + ".join(options.data)


def are_folders(options: Options) -> bool:
    """Whether every source is a folder, which has its own validation file or none."""
    return all(user_path(source, "--data").is_dir() for source in options.data)


def read_sources(options: Options, progress: Progress = lambda share, text: None) -> Dataset:
    """The rows of one source as they are; of several, each with a validation split of its own, mixed.

    Raises UserError for sources that are the same, and as load_data does.
    """
    count, prefixes = len(options.data), _prefixes(options.data)
    parts = [
        load_data(
            source,
            options.valid_share,
            options.seed,
            options.field,
            options.on_bad_row,
            lambda share, text, at=at: progress((at + share) / count, text),  # type: ignore[misc]
            prefixes[at],
        )
        for at, source in enumerate(options.data)
    ]
    return parts[0] if count == 1 else _mixed(options, parts)


def _prefixes(sources: Sequence[str]) -> list[str]:
    """What stands before a row's source, so that no two files are named alike; nothing for a single source."""
    paths = [user_path(source, "--data") for source in sources]
    places = [str(path.resolve()) if path.exists() else source for path, source in zip(paths, sources, strict=True)]
    if twice := [source for source, place in zip(sources, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"--data {' '.join(twice)}: the same rows twice.", "To count them more, give a weight.")
    if len(sources) == 1:
        return [""]
    short = [
        f"{path.name}/" if path.is_dir() else "" if path.exists() else f"{source}/"
        for path, source in zip(paths, sources, strict=True)
    ]
    shown = [f"{prefix}{path.name}" for prefix, path in zip(short, paths, strict=True)]
    full = [f"{path}/" if path.is_dir() else f"{path.parent}/" for path in paths]
    return [full[at] if shown.count(shown[at]) > 1 else prefix for at, prefix in enumerate(short)]


def _mixed(options: Options, parts: list[Dataset]) -> Dataset:
    """An epoch has as many rows as the sources have in all, however they are weighted."""
    sizes = [len(part.train) for part in parts]
    counts = sizes
    if options.weights:
        shares = np.array(options.weights) / sum(options.weights)
        counts = [max(1, round(share * sum(sizes))) for share in shares.tolist()]
    drawn = [
        _drawn(size, count, [options.seed, 5, at]) for at, (size, count) in enumerate(zip(sizes, counts, strict=True))
    ]
    left_out: dict[str, Counted[str]] = {}
    bad: Counted[tuple[str, str]] = Counted()
    for part in parts:
        bad.extend(part.bad)
        for kind, rows in part.left_out.items():
            left_out.setdefault(kind, Counted()).extend(rows)
    return Dataset(
        MixedRows.of([part.train for part in parts], drawn),
        _joined([part.valid for part in parts]),
        _joined([part.test for part in parts]),
        dict(sum((Counter(part.formats) for part in parts), Counter[str]())),
        left_out,
        bad,
        {file: columns for part in parts for file, columns in part.unread.items()},
        [
            f"{source}: {size:,} rows x {count / size:.3g}"
            for source, size, count in zip(options.data, sizes, counts, strict=True)
        ],
    )


def _drawn(size: int, count: int, seed: list[int]) -> np.ndarray:
    """`count` of so many rows, in order: each as often as any other or once more, and which once more is drawn."""
    times, more = divmod(count, size)
    chosen = np.random.default_rng(seed).choice(size, more, replace=False)
    return np.sort(np.concatenate([np.repeat(np.arange(size), times), chosen]))


def _joined(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """All rows of all parts; an empty list where there are none."""
    filled = [part for part in parts if len(part)]
    return MixedRows.of(filled, [np.arange(len(part)) for part in filled]) if filled else []
