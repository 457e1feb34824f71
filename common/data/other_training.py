"""Rows of other trainings than this one: preferences, answers marked good or bad, judged steps."""

from common.data.messages import Row

_REJECTED = (
    *("rejected", "rejected_response", "rejected_answer", "rejected_output", "rejected_messages"),
    *("non_preferred_output", "response_rejected"),
)
_CHOSEN = {"non_preferred_output": "preferred_output"}  # else `chosen` in place of `rejected`
_KEPT = ("messages", "conversations", "completion", "output", "response", "answer")
OTHER_TRAINING = (*_REJECTED, "kto_tag", "label")  # columns that make a row one of those
_MARKS = (*OTHER_TRAINING, "completions")
_ANSWERS = ("messages", "conversations", "completion", "text")  # --field says by one of them what is trained


def other_training(row: Row, fields: dict[str, str]) -> str | None:
    """The training that a row belongs to, and how to train on it here; None for a row of supervised training.

    fields: as --field says; where it says what is trained, the row is taken for that.
    """
    if row.keys().isdisjoint(_MARKS) or any(part in fields for part in _ANSWERS):
        return None
    filled = [name for name in _REJECTED if isinstance(row.get(name), str | list | dict) and row[name]]
    if filled:
        return _preference(row, filled[0])
    if mark := _mark(row):
        kept = next((name for name in _KEPT if row.get(name)), "COLUMN")
        part = kept if kept in ("messages", "conversations") else "completion"
        way = f"--field {part}={kept}"
        return f"marks its answer as good or bad (`{mark}`: a row for KTO); to train on every answer alike: {way}"
    if isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list):
        return "judges the steps of an answer (`completions` and `labels`: a row for a process reward model)"
    return None


def _mark(row: Row) -> str | None:
    """The column that calls the row's answer good or bad: LLaMA-Factory's, or TRL's beside an answer."""
    if row.get("kto_tag") not in (None, ""):
        return "kto_tag"
    answered = row.get("messages") or row.get("conversations") or {"prompt", "completion"} <= row.keys()
    label = row.get("label")
    switch = isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false"))
    return "label" if switch and answered else None


def _preference(row: Row, rejected: str) -> str:
    chosen = _CHOSEN.get(rejected, rejected.replace("rejected", "chosen"))
    columns = f"`{chosen}` and `{rejected}`" if row.get(chosen) else f"`{rejected}`"
    kind = f"is a preference row ({columns}: for DPO, ORPO or a reward model)"
    return f"{kind}; {way}" if (way := _way(row, chosen)) else kind


def _way(row: Row, chosen: str) -> str:
    """How the chosen answer can be trained on."""
    answer, chat = row.get(chosen), next((name for name in ("messages", "conversations") if row.get(name)), None)
    first = answer[0] if isinstance(answer, list) and answer else None
    if isinstance(first, dict) and first.get("role", first.get("from")) in ("system", "user", "human"):
        return f"to train on the chosen one: --field messages={chosen}"
    if chat and answer:
        return f"to train on the chosen one, append it to `{chat}`"
    if chat:
        return f"to train on `{chat}` alone: --field {chat}={chat}"
    return f"to train on the chosen one: --field completion={chosen}" if isinstance(answer, str | list) else ""
