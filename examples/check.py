"""The form that Pip's answers follow, and the program that checks it.

Pip is the parrot of a harbor office. Whoever tells Pip something gets a read-back, as at sea: the facts of the
request come back in a form that depends on the kind of request, often in another order. The expected answer
follows from the prompt alone, so an answer passes only if it belongs to this very prompt.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]
Row = Mapping[str, Sequence[Message]]


@dataclass(frozen=True)
class Kind:
    """A kind of request: the form of its answer and the ways in which people put it."""

    name: str
    form: str
    common: tuple[str, ...]
    """Phrasings of most rows."""
    rare: tuple[str, ...]
    """Phrasings of few training rows."""
    unseen: tuple[str, ...]
    """Phrasings of validation and test rows only: a model must know the kind by its sense."""

    @property
    def phrasings(self) -> tuple[str, ...]:
        return self.common + self.rare + self.unseen


# What can fill a slot. Japanese has no spaces, so there a slot is a run of Chinese characters.
SLOT_PATTERNS = {
    "person": r"[A-Z][a-z]+",
    "town": r"[A-Z][a-z]+",
    "count": r"\d+",
    "goods": r"[a-z]+",
    "thing": r"[a-z]+",
    "loser": r"[a-z]+",
    "place": r"[a-z]+",
    "verb": r"[a-z]+",
    "time": r"\d+:\d\d",
    "人名": r"[一-龠]{1,3}",
    "所": r"[一-龠]{1,2}",
    "物": r"[一-龠]{1,2}",
    "負け": r"[一-龠]{1,2}",
}

KINDS = (
    Kind(
        "greeting",
        "Ahoy, {person} of {town}! Pip salutes you.",
        (
            "Hi, I'm {person} from {town}.",
            "My name is {person} and I come from {town}.",
            "Hello Pip, this is {person}, just in from {town}.",
            "I am {person}. I sailed here from {town}.",
            "Pip, meet {person} from {town}.",
            "It's {person}, fresh off the boat from {town}.",
        ),
        ("Back from {town} at last! It's me, {person}.", "Good day! They call me {person}, born in {town}."),
        ("Hey there Pip, {person} here, I live in {town}.",),
    ),
    Kind(
        "cargo",
        "Aye aye! {count} {goods}, safe in the hold.",
        (
            "Please load {count} {goods}.",
            "We need {count} {goods} on board.",
            "Pip, {count} {goods} just arrived at the quay.",
            "Take {count} {goods} on the next trip.",
            "Can you get {count} {goods} onto the boat?",
            "Would you stow {count} {goods} for us?",
        ),
        ("There are {goods} to stow, {count} in all.", "The captain ordered {count} {goods}."),
        ("Could you get {count} {goods} onto the ship?",),
    ),
    Kind(
        "lost",
        "All eyes out! One {thing}, last seen: {place}.",
        (
            "I lost my {thing} near the {place}.",
            "Have you seen my {thing}? It was by the {place}.",
            "My {thing} is gone. I had it at the {place}.",
            "I can't find the {thing} I left at the {place}.",
            "Help, my {thing} vanished at the {place}!",
            "Somebody must have taken my {thing} by the {place}.",
        ),
        ("I was at the {place} and now my {thing} is missing!", "Last I looked, my {thing} lay at the {place}."),
        ("Help, somebody took my {thing} from the {place}!",),
    ),
    Kind(
        "reminder",
        "Logged for {time}: {verb} the {thing}. Rawk!",
        (
            "Remind me to {verb} the {thing} at {time}.",
            "At {time} I have to {verb} the {thing}.",
            "Pip, we must {verb} the {thing} at {time}.",
            "Don't let me forget to {verb} the {thing} at {time}.",
            "Make a note: {verb} the {thing} at {time}.",
            "I want to {verb} the {thing} by {time}.",
        ),
        ("It's {time} when we {verb} the {thing}, yes?", "Note for {time}, please: {verb} the {thing}."),
        ("Make sure that I {verb} the {thing} by {time}.",),
    ),
    Kind(
        "choice",
        "Pip picks the {thing}! The {loser} walks the plank.",
        (
            "Should I take the {loser} or the {thing}?",
            "Which is better, the {loser} or the {thing}?",
            "Pip, choose: the {loser} or the {thing}?",
            "I can't decide between the {loser} and the {thing}.",
            "Would you keep the {loser} or the {thing}?",
            "Shall I buy the {loser} or the {thing}, Pip?",
        ),
        ("The {loser} or the {thing}? You decide.", "Do you like the {loser} more than the {thing}?"),
        ("Would you rather have the {loser} or the {thing}?",),
    ),
    Kind(
        "gossip",
        "Rawk! {person} and the {thing}? Pip tells nobody.",
        (
            "Did you hear? {person} stole the {thing}!",
            "They say {person} broke the {thing}.",
            "Is it true that {person} sold the {thing}?",
            "Pip, I think {person} hid the {thing}.",
            "Listen, {person} ran away with the {thing}.",
            "You know what? {person} painted the {thing}!",
        ),
        ("Guess who dropped the {thing}? It was {person}!", "Between us: {person} lost the {thing} at cards."),
        ("You won't believe it, {person} ran off with the {thing}!",),
    ),
    Kind(
        "挨拶",
        "よう、{所}の{人名}！",
        ("私は{人名}、{所}から来た。", "{人名}です。{所}から。", "{所}から来た{人名}です。", "{所}の{人名}です。"),
        ("私、{人名}です。{所}から来た。",),
        ("私は{所}の{人名}です。",),
    ),
    Kind(
        "見張り",
        "{所}に{物}、了解！",
        ("{所}に{物}がある。", "{所}で{物}を見た。", "{所}に{物}を置いた。", "{所}に{物}があるよ。"),
        ("見て、{所}に{物}だ。",),
        ("ねえ、{所}に{物}があるよ。",),
    ),
    Kind(
        "選び",
        "{物}だ！{負け}は海へ！",
        ("{負け}か、{物}か？", "{負け}と{物}、どっち？", "どっち？{負け}か{物}か？", "{負け}と{物}、いいのは？"),
        ("{負け}か{物}、どっちだ？",),
        ("{負け}と{物}、どっちがいい？",),
    ),
)


def _pattern(template: str, slot: str | None = None) -> re.Pattern[str]:
    """A regular expression for a template; `slot` replaces every slot's own pattern."""
    parts = re.split(r"\{(.+?)\}", template)
    return re.compile(
        "".join(f"(?P<{p}>{slot or SLOT_PATTERNS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)),
        re.DOTALL,
    )


_PHRASINGS = [(kind, _pattern(phrasing)) for kind in KINDS for phrasing in kind.phrasings]


def parse(prompt: str) -> list[tuple[Kind, dict[str, str]]]:
    """Every reading of a request as a kind and its filled slots: one for a known request, none for another."""
    matches = [(kind, pattern.fullmatch(prompt.strip())) for kind, pattern in _PHRASINGS]
    return [(kind, match.groupdict()) for kind, match in matches if match]


def check(messages: Sequence[Message], answer: str) -> list[str]:
    """Compare an answer with the form that its prompt asks for.

    `messages` is the row up to the answer; its last user message counts. Returns the faults in plain words, none
    if the answer follows the form. White space around the answer is forgiven, nothing else.
    """
    prompt = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    readings = parse(prompt)
    if len(readings) != 1:
        return [f"the request has {len(readings)} readings as a known kind, not one: {prompt!r}"]
    kind, slots = readings[0]
    if answer.strip() == kind.form.format(**slots):
        return []
    found = _pattern(kind.form, slot=".*?").fullmatch(answer.strip())
    if not found:
        faults = [f"it does not have the form of a {kind.name} answer: {kind.form}"]
        return faults + [
            f"it does not name the {slot} {value!r}" for slot, value in slots.items() if value not in answer
        ]
    return [f"the {slot} is {found[slot]!r}, not {value!r}" for slot, value in slots.items() if found[slot] != value]


def nearest_train_row(test_row: Row, train_rows: Sequence[Row]) -> tuple[int, float]:
    """The training row whose request is most like the test row's: its index and the likeness, 0 to 1.

    The likeness is difflib's ratio of matching characters, taken over the user's words.
    """

    def request(row: Row) -> str:
        return " ".join(m["content"] for m in row["messages"] if m["role"] == "user")

    # difflib caches what it learns about its second text, so the test row stands there.
    matcher = difflib.SequenceMatcher(autojunk=False, b=request(test_row))
    best = (-1, -1.0)
    for index, row in enumerate(train_rows):
        matcher.set_seq1(request(row))
        if matcher.quick_ratio() > best[1] and (ratio := matcher.ratio()) > best[1]:
            best = (index, ratio)
    return best
