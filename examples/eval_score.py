"""For `eval RUN --scorer examples/eval_score.py`: whether an answer follows Pip's form, which depends on its prompt."""

from collections.abc import Mapping, Sequence

from examples.check import Message, check


def score(row: Mapping[str, Sequence[Message]], answer: str) -> bool:
    """True where the answer has the form that the row's last user turn asks for."""
    return not check(row["messages"], answer)
