"""Many rows: read, checked and encoded by Twintune, and tokenized as TRL does it, in one run; prints Markdown.

    python -m benchmarks.rows                        # 10,000 and 100,000 rows of 1 kB
    python -m benchmarks.rows --rows 1000000

Each side is a process of its own, started twice: the second may find what the first one kept, which found nothing.
Seconds are from the first row that is read to the last that can be trained on. Memory is the resident set of the
process and its children together, over what it was before reading. TRL's way is `datasets` with the chat template, for
the prompt and for the whole row, and labels behind the prompt; as many processes as there are cores.
"""

import argparse
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peer_runs import ROOT
from common.data import row_cache
from common.data.batching import step_rows
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.training_rows import encode_data, read_data
from common.display import Display
from common.models.resolve import resolve
from common.options import EXAMPLE, Options
from common.system import cache as system_cache
from common.system.hardware import cores

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WORDS = 160  # of a row: 1 kB
_TWICE = 100_000  # rows up to which TRL's way is started twice too: it begins from nothing again
_LOOK = 0.25  # seconds between two looks at the memory, which take time from the cores
READY, DONE = "ready", "done "


def write_rows(path: Path, count: int) -> None:
    """Conversations of one exchange, of the built-in example's words in random order."""
    draw = random.Random(1)  # noqa: S311  # any order will do
    lines = (EXAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(turn["content"] for line in lines for turn in json.loads(line)["messages"]).split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question, answer = (" ".join(draw.choices(words, k=_WORDS // 2)) for _ in range(2))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def by_twintune(data: Path, cache: Path) -> int:
    """How many rows can be trained on. cache: of what is read and encoded."""
    options = Options(data=str(data), model=MODEL, max_length=4096)
    display = Display("quiet")
    tokenizer = load_tokenizer(resolve(MODEL, display.say).path)
    row_cache.cache_folder = system_cache.cache_folder = lambda: cache
    print(READY, flush=True)
    rows = encode_data(options, read_data(options, display), tokenizer, lambda share, text: None)
    return len(rows.train.rows) + len(rows.valid.rows)


def as_trl_does(data: Path, cache: Path) -> int:
    """The same with `datasets`; labels are kept as a mask of the completion, as in TRL."""
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    import datasets

    tokenizer = load_tokenizer(resolve(MODEL, lambda text: None).path)
    datasets.disable_progress_bars()
    print(READY, flush=True)

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}

    found = datasets.load_dataset("json", data_files=str(data), split="train")
    found = found.map(tokenized, remove_columns=["messages"], num_proc=cores())
    return len(found.with_format("numpy"))


SIDES = {"twintune": by_twintune, "trl": as_trl_does}


def measured(side: str, data: Path, cache: Path) -> dict[str, float]:
    """`{"seconds", "memory"}` of one start; memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.rows", "--side", side, "--data", str(data), "--cache", str(cache)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        _wait_for(process, READY)
        began, before, peaks = time.perf_counter(), _resident(process.pid), [0]
        _wait_for(process, DONE, lambda: peaks.append(_resident(process.pid)))
        return {"seconds": time.perf_counter() - began, "memory": max(peaks) - before}


def _wait_for(process: "subprocess.Popen[str]", word: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Until the process has printed a line that begins with the word."""
    while True:
        if select.select([process.stdout], [], [], _LOOK)[0]:
            line = process.stdout.readline() if process.stdout else ""
            if line.startswith(word):
                return
            if not line:
                raise SystemExit(f"the process ended with status {process.wait()}")
        meanwhile()


def _resident(pid: int) -> int:
    """Bytes of the process and its children, on Linux pages that several share counted once."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += getattr(one.memory_full_info(), "pss", 0) or one.memory_info().rss
    except psutil.NoSuchProcess:  # between two looks
        pass
    return total


def one_row(turns: int) -> float:
    """Seconds to encode a row of so many turns, once the template is known."""
    encoder = Encoder(load_tokenizer(resolve(MODEL, lambda text: None).path), MaskingOptions())
    pairs = ((f"Question {n} of the day", f"Answer {n}, and a little more.") for n in range(turns // 2))
    messages = (m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a}))
    row, seconds = Example(tuple(messages), "row:1"), []
    for _ in range(4):
        began = time.perf_counter()
        encoder(row)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def row_choice(rows: int, steps: int = 2000) -> float:
    """Seconds a step's choice of eight rows takes."""
    step_rows(rows, 8, 1, 1)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        step_rows(rows, 8, 1, step)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        count = SIDES[given.side](given.data, given.cache)
        print(f"{DONE}{count}", flush=True)
        return
    print(
        f"| rows | file | side | first start | second start | memory | first start, trl / twintune |\n|{' --- |' * 7}"
    )
    for count in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            write_rows(data, count)
            size, times = data.stat().st_size, {}
            for side in SIDES:
                again = side == "twintune" or count <= _TWICE
                starts = [measured(side, data, Path(folder) / "cache") for _ in range(1 + again)]
                times[side] = starts[0]["seconds"]
                ratio = f"{times['trl'] / times['twintune']:.2f}" if side == "trl" else ""
                second = f"{starts[1]['seconds']:.1f} s" if again else "not run"
                print(
                    f"| {count:,} | {size / 1e6:.0f} MB | {side} | {times[side]:.1f} s | {second} | "
                    f"{max(start['memory'] for start in starts) / 1e6:.0f} MB | {ratio} |",
                    flush=True,
                )
    print(f"\nA row of 400 turns: {1e3 * one_row(400):.0f} ms; of 800: {1e3 * one_row(800):.0f} ms.")
    print(f"A step's choice of rows among a million: {1e3 * row_choice(1_000_000):.4f} ms.")


if __name__ == "__main__":
    main()
