"""The load of a mixture's experts: what share of the tokens its routers send to each, before and after training.

A share is told in even shares: 1 where every expert of a layer is chosen equally often.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from common.data.encode import Encoded
from common.run_fields import ExpertsRecord, SpreadRecord

_FEWEST, _MOST, _SHARE = 256, 8192, 16  # tokens that are looked at: one of 16 that are trained on, within these
_USED, _UNUSED, _LEAST = 0.5, 0.05, 16  # even shares: in use, out of use; how often the former was chosen at least
_CAUSE = "a learning rate that is too high, or rows that are all of one kind"
_REMEDY = "lower --learning-rate to a third, or add rows of other kinds"
Load = Mapping[int, Sequence[int]]  # by layer, how often each expert was chosen


def enough(trained: float) -> int:
    """So many tokens are looked at of a run that trains on that many: little beside its steps."""
    return max(_FEWEST, min(_MOST, int(trained) // _SHARE))


def drawn(rows: Sequence[Encoded], left: int, seed: int) -> list[np.ndarray]:
    """Inputs of rows in a random order, `left` tokens of them at most."""
    found: list[np.ndarray] = []
    for number in np.random.default_rng([seed, 8]).permutation(len(rows)):
        inputs = rows[int(number)].ids[:-1][:left]  # a row's last token is only predicted
        if len(inputs):
            found.append(inputs)
            left -= len(inputs)
        if not left:
            break
    return found


def shares(counts: Sequence[int]) -> list[float]:
    """Of each expert of a layer, in even shares."""
    even = sum(counts) / max(1, len(counts))
    return [count / even if even else 0.0 for count in counts]


def moved(before: Sequence[int], after: Sequence[int]) -> float:
    """The total variation distance between the two loads of a layer: the share of it that went to other experts."""
    one, other = (shares(counts) for counts in (before, after))
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / (2 * max(1, len(one)))


def compared(before: Load, after: Load, tokens: int, rows: str) -> ExpertsRecord:
    """What the run's record holds of both. rows: of which part the tokens are."""
    change = {layer: moved(counts, after[layer]) for layer, counts in before.items()}
    most = max(change, key=lambda layer: change[layer])
    fallen = _fallen(before, after)
    every = sum(len(counts) for counts in before.values())
    return ExpertsRecord(
        experts=max(len(counts) for counts in before.values()),
        chosen=round(max(sum(counts) for counts in before.values()) / tokens),
        layers=len(before),
        tokens=tokens,
        rows=rows,
        before=_spread(before),
        after=_spread(after),
        moved=sum(change.values()) / len(change),
        most_moved=change[most],
        most_moved_layer=most,
        fallen=fallen,
        warning=_warning(fallen, every),
    )


def _spread(load: Load) -> SpreadRecord:
    by_layer = {layer: shares(counts) for layer, counts in load.items()}
    busiest = max(by_layer, key=lambda layer: max(by_layer[layer]))
    least = min(by_layer, key=lambda layer: min(by_layer[layer]))
    return SpreadRecord(
        busiest=max(by_layer[busiest]),
        busiest_layer=busiest,
        least=min(by_layer[least]),
        least_layer=least,
        never=sum(not count for counts in load.values() for count in counts),
    )


def _fallen(before: Load, after: Load) -> list[tuple[int, int]]:
    """`(layer, expert)` of those that training has put out of use."""
    return [
        (layer, expert)
        for layer, counts in before.items()
        for expert, (had, has) in enumerate(zip(shares(counts), shares(after[layer]), strict=True))
        if had >= _USED and has < _UNUSED and counts[expert] >= _LEAST
    ]


def _warning(fallen: Sequence[tuple[int, int]], every: int) -> str:
    if not fallen:
        return ""
    layers = [layer for layer, _ in fallen]
    most = max(layers, key=layers.count)
    seen = f"training has put {len(fallen)} of {every} experts out of use, most of them in layer {most}"
    return f"{seen}. Usual cause: {_CAUSE}. Remedy: {_REMEDY}"


def about(found: ExpertsRecord) -> list[str]:
    """What was measured, and how much of it training has changed."""
    return [
        f"{found.chosen} of {found.experts} experts are chosen for each token, in {found.layers} layers",
        f"training moved {found.moved:.1%} of the load to other experts, most in layer {found.most_moved_layer} "
        f"({found.most_moved:.1%})",
        f"measured on {found.tokens:,} tokens of {found.rows} rows",
    ]


COLUMNS = ("", "before training", "layer", "after training", "layer")  # of `spread_rows`


def spread_rows(found: ExpertsRecord) -> list[list[str]]:
    """The extremes over all layers, and in which layer; none where it was not measured."""
    if found.before is None or found.after is None:
        return []
    both = (found.before, found.after)
    busiest = [text for one in both for text in (f"{one.busiest:.2f}", str(one.busiest_layer))]
    least = [text for one in both for text in (f"{one.least:.2f}", str(one.least_layer))]
    never = [text for one in both for text in (f"{one.never:,}", "")]
    return [
        ["busiest expert, times an even share", *busiest],
        ["least used expert, times an even share", *least],
        ["experts that were never chosen", *never],
    ]


def described(found: ExpertsRecord) -> str:
    """A line for the terminal."""
    if found.before is None or found.after is None:
        return f"load of the experts: not measured ({found.why})"
    one, other = found.before, found.after
    chosen, change, measured = about(found)
    return (
        f"load of the experts: {chosen}; the busiest has {one.busiest:.1f}x an even share (layer {one.busiest_layer}), "
        f"after training {other.busiest:.1f}x (layer {other.busiest_layer}); the least used {one.least:.2f}x (layer "
        f"{one.least_layer}), after training {other.least:.2f}x (layer {other.least_layer}); {one.never} are never "
        f"chosen, after training {other.never}; {change}; {measured}"
    )
