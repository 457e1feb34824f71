"""Chat rows: what is read, what is refused and in which words, what is held out."""

import json
from pathlib import Path

import pytest

from common.data.dataset import Dataset, Example, content_key, prompt_key
from common.data.facts import data_hash
from common.data.load import load_data, read_rows
from common.data.message_forms import after_reasoning, reasoning_is_open, split_thinking
from common.errors import UserError
from tests.tiny import chat

GOOD = json.dumps(chat("Hi", "Yo"))


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def fault(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load_data(str(path), 0.1, 0)
    return caught.value


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


# --- what is read


def test_a_row_keeps_its_turns_and_says_where_it_stands(tmp_path: Path) -> None:
    text = turns(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Ho"), ("assistant", "Hm"))
    (row,) = read_rows(lines(tmp_path / "train.jsonl", "", text))
    assert row.source == "train.jsonl:2"
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages[4] == {"role": "assistant", "content": "Hm"}


def test_other_keys_of_a_row_and_a_turn_are_left_out(tmp_path: Path) -> None:
    row = {"id": 7, "messages": [{"role": "assistant", "content": "Yo", "mood": "good"}]}
    assert read_rows(lines(tmp_path / "a.jsonl", json.dumps(row)))[0].messages == (
        {"role": "assistant", "content": "Yo"},
    )


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert [row.source for row in read_rows(path)] == ["a.jsonl:1", "a.jsonl:2"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    text = json.dumps(chat("Hi", "one\u2028two"), ensure_ascii=False)
    assert read_rows(lines(tmp_path / "a.jsonl", text))[0].messages[1]["content"] == "one\u2028two"


# --- what is refused


def test_line_37_is_not_json(tmp_path: Path) -> None:
    path = lines(tmp_path / "train.jsonl", *[GOOD] * 36, '{"messages": [', *[GOOD] * 3)
    error = fault(path)
    assert error.what == (f"{path} has 1 bad line(s):\ntrain.jsonl line 37: is not JSON at column 15: Expecting value")
    assert error.fix.startswith("Correct them, or leave such rows out: --on-bad-row drop; each line: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "Hi", "answers": "Yo"}', "has none of messages, ShareGPT's conversations, "),
        ('"Hi"', "is not an object with named fields"),
        ('{"messages": "Hi"}', "`messages` is not a list"),
        ('{"messages": []}', "`messages` is empty"),
        (turns(("user", "Hi"), ("robot", "Yo")), "turn 2 has the role 'robot'; known: system, developer, user"),
        ('{"messages": [{"content": "Hi"}]}', "turn 1 has the role None; known: system, developer, user"),
        (turns(("user", "Hi"), ("assistant", None)), "turn 2 has no text in `content`"),
        ('{"messages": ["Hi"]}', "turn 1 is not an object"),
        (turns(("user", "Hi"), ("system", "Be brief.")), "turn 2 is a system turn; it can only be the first"),
        (turns(("user", "Hi")), "has no assistant turn, so there is nothing to learn"),
        ("[" * 100_000, "is not JSON"),
        ('{"messages": ' + "9" * 5000 + "}", "is not JSON"),
    ],
    ids=lambda text: text[:40],
)
def test_a_row_that_cannot_be_learnt_from(tmp_path: Path, text: str, said: str) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, text)
    assert fault(path).what.startswith(f"{path} has 1 bad line(s):\na.jsonl line 2: {said}")


def test_half_an_emoji_is_no_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, turns(("user", "Hi"), ("assistant", "Yo \ud83d")))
    assert "a.jsonl line 2: turn 2" in fault(path).what


def test_two_bad_lines_are_both_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", "{", GOOD, '{"texts": "Hi"}')
    assert fault(path).what.split("\n") == [
        f"{path} has 2 bad line(s):",
        "a.jsonl line 1: is not JSON at column 2: Expecting property name enclosed in double quotes",
        "a.jsonl line 3: has none of messages, ShareGPT's conversations, Alpaca's instruction and output, "
        "prompt and completion, or text (its keys: texts)",
    ]


def test_of_many_bad_lines_ten_are_shown(tmp_path: Path) -> None:
    said = fault(lines(tmp_path / "a.jsonl", *["{"] * 12)).what.split("\n")
    assert len(said) == 12
    assert said[-1] == "... and 2 more"


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    assert fault(path).what == f"{path} is empty: it holds no rows."


def test_a_missing_file(tmp_path: Path) -> None:
    assert fault(tmp_path / "no.jsonl").what == f"--data {tmp_path / 'no.jsonl'}: no such file or folder."


def test_a_folder_without_train(tmp_path: Path) -> None:
    error = fault(tmp_path)
    assert error.what == (
        f"--data {tmp_path}: there is no train file in this folder "
        "(train.jsonl, train.ndjson, train.json, train.csv, train.tsv, train.parquet, train.txt)."
    )
    assert error.fix.startswith("Name the training file train.jsonl")


@pytest.mark.parametrize(
    ("codec", "name"),
    [("shift_jis", "CP932"), ("euc_jp", "EUC-JP"), ("utf-16", "UTF-16")],
)
def test_a_file_of_another_encoding(tmp_path: Path, codec: str, name: str) -> None:
    (tmp_path / "my rows").mkdir()
    path = tmp_path / "my rows" / "a.jsonl"
    japanese = json.dumps(chat("こんにちは、港です。", "はい、ピップです。"), ensure_ascii=False)
    path.write_bytes(f"{GOOD}\n{japanese}\n".encode(codec))
    error = fault(path)
    assert error.what.startswith(f"{path} is not UTF-8 text (line {1 if codec == 'utf-16' else 2}, byte ")
    assert error.what.endswith(f"it looks like {name}.")
    assert error.fix == f"Convert it: iconv -f {name} -t UTF-8 '{path}' > utf8.jsonl"


@pytest.mark.parametrize("answer", ["Là-haut, élève.", "au deuxième étage"])
def test_western_text_is_not_taken_for_japanese(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(chat("How high?", answer), ensure_ascii=False).encode("latin-1"))
    said = fault(path).what
    assert "is not UTF-8 text (line 1, byte " in said
    assert "JIS" not in said
    assert "EUC" not in said


def test_rows_without_an_answer_are_left_out_and_listed(tmp_path: Path) -> None:
    empty = [turns(("user", "Hi"), ("assistant", text)) for text in ("", " \n")]
    path = lines(tmp_path / "a.jsonl", empty[0], GOOD, empty[1])
    data = load_data(str(path), 0, 0)
    assert [row.source for row in data.train] == ["a.jsonl:2"]
    assert {kind: rows.first for kind, rows in data.left_out.items()} == {
        "rows without an answer": ["a.jsonl:1", "a.jsonl:3"]
    }
    assert data.formats == {"messages": 1}
    assert fault(lines(path, *empty)).what == f"{path} holds nothing to train on: 2 rows without an answer."


def test_answers_that_are_only_reasoning_are_left_out_and_listed(tmp_path: Path) -> None:
    answers = ("<think>2 + 2 is 4</think>", "\n<think>\n3 + 3 is", "<think>5</think>\n\nFive", "What is <think>?")
    path = lines(tmp_path / "a.jsonl", *(turns(("user", "Hi"), ("assistant", answer)) for answer in answers))
    data = load_data(str(path), 0, 0)
    assert [row.messages[1]["content"] for row in data.train] == list(answers[2:])
    assert {kind: rows.first for kind, rows in data.left_out.items()} == {
        "rows without an answer": ["a.jsonl:1", "a.jsonl:2"]
    }


def test_reasoning_whose_first_tag_stood_in_the_prompt(tmp_path: Path) -> None:
    answers = ("2 + 2 is\n</think>\n\nFour", "2 + 2 is\n</think>", "Write </think> behind\nit", "It ends\n</think>!")
    path = lines(tmp_path / "a.jsonl", *(turns(("user", "Hi"), ("assistant", answer)) for answer in answers))
    data = load_data(str(path), 0, 0)
    assert {kind: rows.first for kind, rows in data.left_out.items()} == {"rows without an answer": ["a.jsonl:2"]}
    split = [split_thinking([dict(message) for message in row.messages], True)[1] for row in data.train]
    assert split[0] == {"role": "assistant", "content": "Four", "reasoning_content": "2 + 2 is"}
    assert [message["content"] for message in split[1:]] == list(answers[2:])


@pytest.mark.parametrize(
    ("answer", "reasoning", "rest"),
    [
        ("<think>\nr\n</think>\n\nTwo.", "r", "Two."),
        ("<|channel>thought\nr\n<channel|>Two.", "r", "Two."),
        ("<seed:think>r</seed:think>Two.", "r", "Two."),
        ("<|START_THINKING|>\n</think>\n<|END_THINKING|>Two.", "</think>", "Two."),
    ],
)
def test_reasoning_is_known_by_the_tags_of_every_family(answer: str, reasoning: str, rest: str) -> None:
    message = {"role": "assistant", "content": answer}
    assert split_thinking([message], True) == [message | {"content": rest, "reasoning_content": reasoning}]
    assert after_reasoning(answer) == rest
    assert not reasoning_is_open(answer)
    assert reasoning_is_open(answer.partition("r")[0].partition("</")[0])


def test_rows_that_are_not_to_be_trained_are_left_out_and_listed(tmp_path: Path) -> None:
    row = chat("Hi", "Yo")
    rows = [row | given for given in ({"weight": 0}, {"train": False}, {"weight": 1, "train": True}, {"weight": None})]
    untrained = {"messages": [message | {"weight": 0} for message in row["messages"]]}
    data = load_data(str(lines(tmp_path / "a.jsonl", *map(json.dumps, [*rows, untrained]))), 0, 0)
    assert [row.source for row in data.train] == ["a.jsonl:3", "a.jsonl:4"]
    assert {kind: rows.first for kind, rows in data.left_out.items()} == {
        "rows with train: false or weight: 0": ["a.jsonl:1", "a.jsonl:2", "a.jsonl:5"]
    }
    path = lines(tmp_path / "b.jsonl", json.dumps(row | {"train": 0.5}))
    assert fault(path).what.endswith("b.jsonl line 1: `train` can be true or false")


@pytest.mark.parametrize("weight", ["-1", "NaN", "Infinity", "1e-7", "1e7", "1e400", '"heavy"', "[1]"])
@pytest.mark.parametrize("place", ["row", "turn 2"])
def test_a_weight_that_is_no_sound_number_is_refused(tmp_path: Path, weight: str, place: str) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": "HERE"}]
    whole = chat("Hi", "Yo") | {"weight": "HERE"}
    row = json.dumps({"messages": turns} if place == "turn 2" else whole)
    path = lines(tmp_path / "a.jsonl", row.replace('"HERE"', "1"), row.replace('"HERE"', weight))
    where = "turn 2: " if place == "turn 2" else ""
    assert fault(path).what == (
        f"{path} has 1 bad line(s):\na.jsonl line 2: {where}`weight` can be 0, or a number between 0.000001 and 1000000"
    )


def test_weights_of_rows_and_turns_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A", "weight": 0.25},
        {"role": "assistant", "content": "B", "weight": 0},
        {"role": "assistant", "content": "C", "weight": 1.0},
    ]
    rows = [{"messages": turns}, {"messages": turns, "weight": 2}, {"messages": turns, "weight": 0.5}]
    read = read_rows(lines(tmp_path / "a.jsonl", *map(json.dumps, rows)))
    assert [row.weight for row in read] == [1, 2, 0.5]
    assert read[0].messages == read[1].messages
    assert [{key: m[key] for key in ("weight", "train") if key in m} for m in read[0].messages] == [
        *({}, {"weight": 0.25}, {"train": False}, {}),
    ]


# --- what is held out


def numbered(path: Path, count: int) -> Path:
    return lines(path, *(json.dumps(chat(f"Q{i}", f"A{i}")) for i in range(count)))


def sources(rows: list[Example]) -> list[int]:
    return [int(row.source.split(":")[1]) for row in rows]


def test_the_hold_out_is_disjoint_and_complete(tmp_path: Path) -> None:
    data = load_data(str(numbered(tmp_path / "a.jsonl", 20)), 0.25, 0)
    assert (len(data.train), len(data.valid), data.test) == (15, 5, [])
    assert sorted(sources(data.train) + sources(data.valid)) == list(range(1, 21))
    assert sources(data.train) == sorted(sources(data.train))


def test_the_hold_out_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 40)
    first = sources(load_data(str(path), 0.25, 0).valid)
    assert sources(load_data(str(path), 0.25, 0).valid) == first
    assert sources(load_data(str(path), 0.25, 1).valid) != first


@pytest.mark.parametrize(("count", "share", "held"), [(20, 0.0, 0), (3, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0)])
def test_how_many_are_held_out(tmp_path: Path, count: int, share: float, held: int) -> None:
    data = load_data(str(numbered(tmp_path / "a.jsonl", count)), share, 0)
    assert (len(data.train), len(data.valid)) == (count - held, held)


def test_a_folder_is_taken_as_it_is_split(tmp_path: Path) -> None:
    numbered(tmp_path / "train.jsonl", 3)
    numbered(tmp_path / "test.jsonl", 2)
    data = load_data(str(tmp_path), 0.5, 0)
    assert (len(data.train), len(data.valid), len(data.test)) == (3, 0, 2)


# --- the hash


def test_the_data_hash_does_not_see_formatting_and_names(tmp_path: Path) -> None:
    row = chat("Ça va ?", "Oui")
    plain = lines(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))
    spaced = {"id": 1, "messages": [{"content": m["content"], "role": m["role"]} for m in row["messages"]]}
    other = lines(tmp_path / "b.jsonl", "", json.dumps(spaced, separators=(" , ", " : ")))
    assert data_hash(load_data(str(plain), 0, 0)) == data_hash(load_data(str(other), 0, 0))


def test_the_data_hash_sees_content_order_and_split() -> None:
    one, two = (Example(({"role": "assistant", "content": text},), "a.jsonl:1") for text in ("one", "two"))
    hashes = [
        data_hash(Dataset(train, valid, []))
        for train, valid in (([one, two], []), ([two, one], []), ([one], [two]), ([one], []), ([], [one]))
    ]
    assert len(set(hashes)) == 5


def test_the_hash_of_version_2_is_what_it_was() -> None:
    asked, said = {"role": "user", "content": "Ça va ?"}, {"role": "assistant", "content": "Oui"}
    train = [Example((asked, said), "a:1"), Example((asked, said | {"weight": 0.5}), "a:2")]
    data = Dataset(train, [Example((), "b:1", text="Yo")], [])
    assert data_hash(data, 2) == "ef9da9d11bb59ff3d16a83f8cd148459e0f7dbb21a5d05808c1a1fcf1c9060ed"
    assert data_hash(data, 3) != data_hash(data, 2)


def test_weights_are_in_the_hash_and_not_in_the_keys() -> None:
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    plain = Example(messages, "")
    rows = [plain, Example(messages, "", weight=0.5), Example((messages[0], messages[1] | {"weight": 0.5}), "")]
    assert len({data_hash(Dataset([row], [], [])) for row in rows}) == 3
    assert len({content_key(row) for row in rows}) == len({prompt_key(row) for row in rows}) == 1


def test_the_data_hash_sees_tools_thoughts_loss_and_text() -> None:
    plain = {"role": "assistant", "content": "Yo"}
    rows = [
        Example((plain,), "a:1"),
        Example((plain | {"train": False},), "a:1"),
        Example((plain | {"reasoning_content": "Hm"},), "a:1"),
        Example((plain,), "a:1", tools=({"type": "function"},)),
        Example((), "a:1", text="Yo"),
    ]
    assert len({data_hash(Dataset([row], [], [])) for row in rows}) == 5
