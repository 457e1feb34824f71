"""Write the built-in example's data: `python -m examples.make_data`. The same bytes every time.

Every split has words of its own: no name, thing, place, number or time of a test row occurs in a training row, so
a model that passes has learned the form and reads the prompt.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from examples.check import KINDS, Kind

SEED = 20
SYSTEM = "Pip"  # One token. Without a system message the template would add a default one of 15 tokens.
FOLDER = Path(__file__).parent / "data"
SPLITS = {"train": (320, 80), "valid": (32, 8), "test": (48, 12)}
"""Rows in English and in Japanese."""
SHARES = {"train": 0.66, "valid": 0.12, "test": 0.22}
"""Of each pool's words."""

# Words that the tokenizers of small models know as one token: a name in six pieces would test spelling, not form.
WORDS = {
    "person": """Ada Otto Hugo Clara Felix Iris Rosa Simon Vera Oscar Anton Emma Louis Maria Peter Alice
        Frank Grace Henry Julia Karl Laura Martin Nina Paul Ruth Sarah Thomas Victor Walter Anna Bruno
        Carlos Diana Edgar George Helen Isaac James Kate Lucy Noah Olivia Patrick Rachel Sofia Tara Arthur
        Betty Chris David Ella Fred Harry Ivan Jack Leo Mike Nick Oliver Philip Robert Sam Tom Vincent Wendy
        Andrew Ben Charlotte Daniel Edward Eric Jane John Joseph Matthew Michael Rebecca Richard Stephen
        Susan Alex Albert Amy Beth Brian Catherine Charles""",
    "town": """Lisbon Dublin Paris Rome Oslo Boston Berlin Vienna Cairo Delhi Athens Geneva Lima Madrid
        Milan Naples Prague Venice Warsaw Zurich London Chicago Seattle Denver Houston Dallas Miami Toronto
        Sydney Melbourne Tokyo Kyoto Seoul Beijing Shanghai Istanbul Moscow Barcelona Amsterdam Brussels
        Copenhagen Stockholm Helsinki Manchester Liverpool Oxford Cambridge Bristol York Glasgow Edinburgh
        Cork Cardiff Leeds Munich Hamburg Frankfurt Lyon Florence Quebec Vancouver Montreal Havana Santiago
        Nairobi Mumbai Manila Singapore""",
    "goods": """apples barrels ropes lemons candles blankets carrots bottles onions pillows potatoes
        lanterns books chairs cakes cups eggs flags flowers hats jars keys lamps maps mirrors nails nuts
        oranges paintings pears pens pipes plates pots ribbons rings rugs shells shirts shoes socks spoons
        stones stoves tables tents toys trunks bells brushes bricks tiles coins drums dolls grapes peaches
        tomatoes cookies clocks mats buckets forks bowls baskets boards tools wheels blocks beads boots
        coats gloves letters cards bags boxes cans seeds beans""",
    "thing": """hat coat knife spoon kettle compass map key ring lamp book pen boot glove belt bag basket
        bell blanket bottle box brush bucket button camera candle cap card chain clock coin comb cup diary
        drum fan flag flute fork glass guitar hammer jar ladder lens letter mirror needle notebook pan
        pencil phone piano pillow pipe plate pot purse radio rope ruler saw shirt shoe sock shovel stamp
        stick stool stove sword table telescope tent ticket tie towel toy trumpet umbrella vase violin
        wallet wheel whistle mask mat sail net anchor wagon kite puzzle globe rug quilt crown doll necklace
        helmet axe drill""",
    "place": """mast dock bridge gate kitchen garden market church library tower stairs window door river
        beach fountain station school bakery cabin deck barn bench fence well hall lake pier shed stable
        temple tree wall oak bank cave forest hill hotel inn island mill museum office park pond porch road
        roof shop shore square statue street theater tunnel valley yard attic balcony castle chapel clinic
        corner desk factory farm field hospital hut""",
    "verb": """fix wash clean buy pack move hide lift mend mail polish return send sort test wrap measure
        cover carry bring borrow wipe hold paint repair sell find drop sign deliver admire check""",
    "count": " ".join(str(n) for n in range(13, 100) if n % 5),
    "time": " ".join(f"{hour}:{minute:02}" for hour in range(1, 13) for minute in range(5, 60, 5)),
    "物": """猫 犬 魚 鳥 馬 牛 虫 花 草 米 茶 酒 肉 塩 油 紙 本 筆 絵 靴 傘 糸 布 鍋 皿 鍵 針 旗 帆 灯 鐘 箱
        机 地図 石 砂 星 月 貝 笛 手紙 時計 花火 金魚 子犬 子猫 小鳥 牛肉 水筒 木箱 毛布 人形 新聞 切手 電話""",
    "所": """山 川 森 門 橋 道 船 島 町 村 駅 店 庭 畑 池 湖 岸 港 浜 谷 丘 里 都 寺 宮 城 蔵 倉 窓 棚 床 東
        西 南 北 東京 北京 市場 学校 公園 中庭 小屋 駅前 船室 台所 南国 北国 西町 山里 川上""",
    "人名": """小林 大野 中西 上田 木下 金子 五十嵐 三木 二宮 千葉 百田 青木 赤木 白木 黒木 水木 高木 春日
        夏木 秋元 冬木 一色 八木 九条 七海 四条 六車 大友 小友 中原 大原 小原 上原 林 前田 本田 大木 小木
        日下 山田 田中 中村 石田 高田 吉田 松本 山本 木村 清水 山口 井上 佐野""",
}
POOL_OF = {"loser": "thing", "負け": "物"}


def _stem(word: str) -> str:
    """What must not be split between train and test: "box" and "boxes" count as one."""
    return word.lower().rstrip("s").rstrip("e")


def split_words(rng: random.Random) -> dict[str, dict[str, list[str]]]:
    """Deal every pool's words to the three splits: split -> pool -> words. No split shares a word or a stem."""
    taken = {split: set[str]() for split in SPLITS}
    # What stands in the phrasings and forms occurs in training rows whatever is dealt.
    texts = " ".join(text for kind in KINDS for text in (kind.form, *kind.phrasings))
    texts = re.sub(r"\{.+?\}", " ", texts)
    spoken = {_stem(word) for word in re.findall(r"[a-z]+", texts.lower())}
    dealt: dict[str, dict[str, list[str]]] = {split: {pool: [] for pool in WORDS} for split in SPLITS}
    for pool, words in WORDS.items():
        deck = words.split()
        rng.shuffle(deck)
        for word in deck:
            stem = _stem(word)
            home = next((split for split in SPLITS if stem in taken[split]), None)
            if home is None:
                full = {split: len(dealt[split][pool]) / share for split, share in SHARES.items()}
                home = "train" if stem in spoken else min(full, key=lambda split: full[split])
            taken[home].add(stem)
            dealt[home][pool].append(word)
    # Japanese has no word boundaries: a test word must not even be a part of a training row's text.
    for pool in ("物", "所", "人名"):
        for split in ("valid", "test"):
            others = texts + " ".join(w for s in SPLITS if s != split for p in dealt[s] for w in dealt[s][p])
            dealt[split][pool] = [word for word in dealt[split][pool] if word not in others]
    return dealt


def _deal(rng: random.Random, items: list[str]) -> Iterator[str]:
    """Go through the items in random order, again and again: all are used about equally often."""
    while True:
        deck = list(items)
        rng.shuffle(deck)
        yield from deck


def make_split(rng: random.Random, split: str, words: dict[str, list[str]]) -> list[dict[str, object]]:
    """The rows of a split, its kinds and phrasings in turn, shuffled."""
    decks = {pool: _deal(rng, items) for pool, items in words.items()}
    rows: list[dict[str, object]] = []
    answers: set[str] = set()
    for kinds, count in zip((KINDS[:6], KINDS[6:]), SPLITS[split], strict=True):
        phrasings = {kind.name: _deal(rng, _weighted(kind, split)) for kind in kinds}
        for number in range(count):
            kind = kinds[number % len(kinds)]
            template = next(phrasings[kind.name])
            while True:
                slots: dict[str, str] = {}
                for slot in re.findall(r"\{(.+?)\}", template):
                    slots[slot] = next(word for word in decks[POOL_OF.get(slot, slot)] if word not in slots.values())
                answer = kind.form.format(**slots)
                if answer not in answers:  # The check could not tell two requests with one answer apart.
                    break
            answers.add(answer)
            rows.append(
                {
                    "messages": [
                        {"role": "system", "content": SYSTEM},
                        {"role": "user", "content": template.format(**slots)},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
    rng.shuffle(rows)
    return rows


def _weighted(kind: Kind, split: str) -> list[str]:
    """A kind's phrasings, the common ones four times; two in eight of a held-out split's are never trained on."""
    if split == "train":
        return [*kind.common * 4, *kind.rare]
    return [*kind.common, *kind.rare, *kind.unseen * 2]


def make_files() -> dict[str, bytes]:
    """The three files by their names, as bytes."""
    rng = random.Random(SEED)  # noqa: S311 (no secrets here)
    words = split_words(rng)
    return {
        f"{split}.jsonl": "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in make_split(rng, split, words[split])
        ).encode()
        for split in SPLITS
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in make_files().items():
        (FOLDER / name).write_bytes(content)
