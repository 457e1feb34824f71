"""The data sets of `benchmarks.regret`: at most 120 short rows each, and validation rows that none of them repeats.

Also the rows that speed is measured with, `SPEED_SETS`: many, and of the lengths that are wanted.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.options import EXAMPLE

Row = dict[str, Any]
PUBLIC = ("identity", "wikisql")  # made of a folder that --from names
NAME = "Marlo"
_PLACEHOLDERS = {"{{name}}": NAME, "{{author}}": "Northlight Works"}
_SEED = 5

_HOUSES = (
    ("Heron House", "鷺の宿", "the reed lake", "葦の湖"),
    ("Pine Lodge", "松の宿", "the north ridge", "北の尾根"),
    ("Lantern Inn", "灯の宿", "the old harbor", "古い港"),
    ("Willow Rest", "柳の宿", "the mill stream", "水車の川"),
)
_WISHES = (
    ("a quiet room", "静かな部屋", "the attic room faces the garden", "屋根裏の部屋は庭に面しています"),
    ("a late breakfast", "遅い朝食", "the kitchen serves until eleven", "台所は十一時まで開いています"),
    ("a bicycle", "自転車", "two stand ready behind the shed", "小屋の裏に二台あります"),
    ("a warm bath", "温かいお風呂", "the bath is heated from five", "お風呂は五時から温まります"),
    ("a place to write", "書き物の場所", "the reading room has a desk by the window", "読書室の窓辺に机があります"),
    ("dinner for two", "二人分の夕食", "the cook likes to know by noon", "料理人は昼までに知りたいそうです"),
    ("an umbrella", "傘", "they hang beside the front door", "玄関の横に掛けてあります"),
    ("a morning call", "目覚ましの声", "we knock softly and wait", "そっと戸をたたいて待ちます"),
)
_TIMES = (("tonight", "今夜"), ("tomorrow", "明日"), ("on Sunday", "日曜日"), ("next week", "来週"), ("at six", "六時"))
_WALKS = (
    ("along the shore", "岸に沿って", "forty minutes", "四十分"),
    ("through the orchard", "果樹園を抜けて", "half an hour", "三十分"),
    ("up the stone steps", "石段を上って", "an hour", "一時間"),
    ("past the sawmill", "製材所の先へ", "twenty minutes", "二十分"),
)


# A guest's card, and what it is: three kinds, so that right answers are often alike.
_CARDS = (
    ("praise", "We loved {}.", "{}がとても気に入りました。"),
    ("complaint", "I was not happy with {}.", "{}には満足できませんでした。"),
    ("question", "Could you tell me about {}?", "{}について教えてください。"),
)
_SUBJECTS = (
    *(("the breakfast", "朝食"), ("the bed", "ベッド"), ("the garden", "庭"), ("the bath", "お風呂")),
    *(("the view", "眺め"), ("the bicycle", "自転車"), ("the dinner", "夕食"), ("the walk", "散歩道")),
    *(("the attic room", "屋根裏の部屋"), ("the reading room", "読書室"), ("the tea", "お茶"), ("the lake", "湖")),
    ("the key", "鍵"),
)

_TOKENS_OF_A_WORD, _TEMPLATE = 1.2, 15  # of SmolLM2's tokenizer; in words, what its chat template adds to a row
SPEED_SETS: dict[str, Callable[[random.Random], float]] = {  # the tokens of a row
    "chat-like": lambda draw: min(600, draw.lognormvariate(5.1, 0.6)),  # some 195 on average
    "mixed": lambda draw: math.exp(draw.uniform(math.log(20), math.log(1000))),  # some 250
}


def data_set(name: str, public: Path | None) -> dict[str, list[Row]]:
    """The rows of `train` and `valid`. public: folder of the public sets, as identity/identity.json lies in it."""
    if name in PUBLIC and public is None:
        raise SystemExit(f"{name} is not part of this project: name its folder by --from")
    return _SETS[name](public)


def write_set(rows: dict[str, list[Row]], folder: Path) -> None:
    for part, some in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def speed_rows(name: str, count: int = 1640) -> list[Row]:
    """Rows of one exchange, whose answer has a third of the tokens; `name` is one of SPEED_SETS."""
    draw = random.Random(_SEED)  # noqa: S311  # any order will do
    rows = []
    for _ in range(count):
        words = SPEED_SETS[name](draw) / _TOKENS_OF_A_WORD
        turns = {
            "system": "Be brief.",
            "user": _prose(draw, words * 2 / 3 - _TEMPLATE),
            "assistant": _prose(draw, words / 3),
        }
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns.items()]})
    return rows


def speed_file(data: str, folder: Path) -> Path:
    """The file `data`; where it is one of SPEED_SETS, its rows in a file that is written into `folder`."""
    if data not in SPEED_SETS:
        return Path(data)
    write_set({data: speed_rows(data)}, folder)
    return folder / f"{data}.jsonl"


def _prose(draw: random.Random, words: float) -> str:
    """As many words, at least one."""
    found: list[str] = []
    while len(found) < words:
        house, wish, time, walk = (draw.choice(kind) for kind in (_HOUSES, _WISHES, _TIMES, _WALKS))
        sentence = f"{time[0]} at {house[0]}: {wish[0]}; {wish[2]}. Go {walk[0]} to {house[2]}; it takes {walk[2]}."
        found += sentence.split()
    return " ".join(found[: max(1, round(words))])


def _example(train: int, valid: int) -> dict[str, list[Row]]:
    """Of the built-in example, each kind of row in its share: the files are shuffled."""
    counts = {"train": train, "valid": valid}
    return {part: _read(EXAMPLE / f"{part}.jsonl")[:count] for part, count in counts.items()}


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def identity_rows(public: Path) -> list[Row]:
    """The 91 rows, with a name and an author for their placeholders."""
    text = (public / "identity" / "identity.json").read_text(encoding="utf-8")
    for placeholder, value in _PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    found: list[Row] = json.loads(text)
    return found


def _identity(public: Path | None) -> dict[str, list[Row]]:
    rows = identity_rows(public or Path())
    random.Random(_SEED).shuffle(rows)  # noqa: S311  # any order will do
    return {"train": rows[15:], "valid": rows[:15]}


def _wikisql(public: Path | None) -> dict[str, list[Row]]:
    folder = (public or Path()) / "wikisql"
    return {part: _read(folder / f"{part}.jsonl")[:count] for part, count in (("train", 50), ("valid", 30))}


def _chat(public: Path | None) -> dict[str, list[Row]]:
    """Two exchanges with the keeper of an inn, who answers in one form; a third of the rows is Japanese.

    Validation rows combine wish, time and walk as no training row does.
    """
    draw = random.Random(_SEED)  # noqa: S311  # any order will do
    stays = [(h, w, t, k) for h in _HOUSES for w in _WISHES for t in _TIMES for k in _WALKS]
    draw.shuffle(stays)
    kept = {(wish, time, walk) for _, wish, time, walk in stays[:15]}
    others = [stay for stay in stays[15:] if stay[1:] not in kept]
    return {"train": [*_talks(others[:40])], "valid": [*_talks(stays[:15])]}


def _kinds(public: Path | None) -> dict[str, list[Row]]:
    """Cards of guests, each answered by its kind in a word. Half of them are Japanese."""
    draw = random.Random(_SEED)  # noqa: S311  # any order will do
    cards = [
        (kind, text.format(subject))
        for kind, *texts in _CARDS
        for subjects in _SUBJECTS
        for text, subject in zip(texts, subjects, strict=True)
    ]
    draw.shuffle(cards)
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": kind}]}
        for kind, text in cards
    ]
    return {"train": rows[18:], "valid": rows[:18]}


def _talks(stays: list[tuple[tuple[str, ...], ...]]) -> Iterator[Row]:
    for number, (house, wish, time, walk) in enumerate(stays):
        if number % 3 == 2:
            turns = [
                f"{house[1]}ですか。{time[1]}、{wish[1]}をお願いできますか。",
                f"ようこそ{house[1]}へ。{time[1]}の{wish[1]}、承りました。{wish[3]}。ほかに御用はございますか。",
                "近くに散歩道はありますか。",
                f"{house[3]}まで{walk[1]}、{walk[3]}ほどです。戻られたらお茶をどうぞ。",
            ]
        else:
            turns = [
                f"Is this {house[0]}? I would like to ask for {wish[0]} {time[0]}.",
                f"Welcome to {house[0]}. Noted: {wish[0]}, {time[0]}. Good to know: {wish[2]}. What else may I do?",
                "Is there a walk nearby that you would recommend?",
                f"Go {walk[0]} to {house[2]}; it takes {walk[2]}. There will be tea when you come back.",
            ]
        roles = ("user", "assistant") * 2
        yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


_SETS = {
    "identity": _identity,
    "wikisql": _wikisql,
    "example": lambda public: _example(120, 40),
    "example-60": lambda public: _example(60, 40),
    "chat": _chat,
}
SETS = tuple(_SETS)  # of `benchmarks.regret`
_SETS["kinds"] = _kinds
