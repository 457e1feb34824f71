"""Twintune's front door: parses, picks a backend, turns a UserError into text and an exit code. No logic."""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.config import Options, load_options, read_flags
from common.errors import UserError

_ABOUT = "Fine-tune a language model with LoRA on your own machine, and walk away with a Q4 GGUF."

app = tyro.extras.SubcommandApp()
# BaseModel has a method called json, so the field cannot be; common/ does not import tyro, so its flag is named here.
Options.__annotations__["json_output"] = Annotated[bool, tyro.conf.arg(name="json")]


def _make_backend(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"{name}_backend").create()


def _train(argv: list[str]) -> None:
    from common.loop import Interrupted
    from common.progress import Display
    from common.train import run_training

    options, notes = load_options(read_flags(argv))
    display = Display("json" if options.json_output else "quiet" if options.quiet else None)
    for note in notes:
        display.say(note)
    try:
        run_training(options, _make_backend, display)
    except Interrupted as stop:
        display.warn(f"stopped after a finished step, saved. Go on with: python cli.py train --resume {stop}")
        sys.exit(130)


@app.command
def train(options: tyro.conf.OmitArgPrefixes[Options]) -> None:
    """Fine-tune a model on chat rows, all the way to a Q4 GGUF. Without options: the built-in example."""


@app.command
def plan(
    model: tyro.conf.Positional[str | None] = None,
    data: str | None = None,
    probe: bool = True,
) -> None:
    """Foretell memory and time of `train` with the same options, and show the plan it would choose. Trains nothing.

    Every option of train may follow: plan MODEL --data FILE --rank 32 --memory-limit 8GB.

    Args:
        model: what to train; without it and without --data the built-in example.
        data: as in train.
        probe: take two steps to measure the speed; --no-probe only computes.
    """


def _plan(argv: list[str]) -> None:
    from common.foretell import foretell
    from common.progress import Display

    probe = "--no-probe" not in argv
    argv = [word for word in argv if word not in ("--no-probe", "--probe")]
    if argv and not argv[0].startswith("--"):
        argv = ["--model", *argv]
    options, notes = load_options(read_flags(argv))
    display = Display("json" if options.json_output else "quiet" if options.quiet else None)
    for note in notes:
        display.say(note)
    foretell(options, probe, _make_backend, display)


@app.command(name="check-data")
def check_data(
    data: tyro.conf.Positional[str],
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    max_length: int = 1024,
    overflow: Literal["drop", "truncate", "error"] = "drop",
    valid_share: float = 0.0,
    seed: int = 0,
    field: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = (),
    train_on: Literal["assistant", "last", "all"] = "assistant",
    thinking: Literal["off", "keep"] = "off",
    chat_template: str | None = None,
    explain: int | None = None,
) -> None:
    """Count rows, tokens and label tokens, list what is doubtful, show three rows with the labelled tokens coloured.

    Args:
        data: JSONL, JSON, CSV, Parquet or text file, a folder with a train file, or a hub data set.
        model: whose tokenizer and chat template to use.
        max_length: rows with more tokens are listed.
        overflow: what becomes of those, as in train.
        valid_share: look at a hold-out of one file too, as train makes it (train's is 0.1).
        seed: of that hold-out.
        field: what a part of a row is called here, as in train: instruction=question output=answer.
        train_on: where there is loss, as in train.
        thinking: whether thoughts in the rows are kept, as in train.
        chat_template: chatml, gemma, llama3 or a file, as in train.
        explain: show only this training row, counted from 1, token by token, and why each is a label or not.
    """
    from common.check_data import check_data
    from common.progress import Display

    given = locals() | {"field": [pair for group in field for pair in group]}
    names = ("data", "model", "max_length", "overflow", "valid_share", "seed", "field", "train_on", "thinking")
    flags = {name: given[name] for name in (*names, "chat_template")}
    check_data(load_options(flags)[0], explain, Display())


@app.command
def fuse(
    run: tyro.conf.Positional[Path],
    export: Literal["fused", "gguf"] | None = None,
    quant: tuple[str, ...] = (),
    llama_cpp: str | None = None,
    fuse_into: Literal["base", "dequantized"] | None = None,
) -> None:
    """Fuse a finished run's adapter and export it anew.

    Args:
        run: run folder.
        export: how far to go; as the run was started unless given, and to the GGUF where that was none.
        quant: GGUF types; as the run was started unless given.
        llama_cpp: folder of a llama.cpp build to use.
        fuse_into: with a quantised base: the 16-bit base, or the weights trained over; as the run was started.
    """
    from common.finish import fuse_run
    from common.progress import Display

    given = {"export": export, "quant": list(quant), "llama_cpp": llama_cpp, "fuse_into": fuse_into}
    fuse_run(run, {name: value for name, value in given.items() if value}, _make_backend, Display())


@app.command
def compare(runs: tyro.conf.Positional[Annotated[list[Path], tyro.conf.arg(metavar="RUN RUN [RUN ...]")]]) -> None:
    """Runs side by side: whether their recipes agree, speed, memory, losses, ratios to the first.

    Args:
        runs: two or more run folders.
    """
    from common.progress import Display
    from common.record import compare

    if len(runs) < 2:
        raise UserError("compare needs two or more runs.", "python cli.py compare RUN RUN")
    compare(runs, Display())


@app.command
def doctor(parity: str | None = None) -> None:
    """What is here, and what is missing for which step.

    Args:
        parity: train this model a few steps on both backends and compare: a model, or a family such as llama.
    """
    from common.progress import Display

    if parity is None:
        from common.doctor import doctor

        doctor(Display())
        return
    from common.parity_check import parity as check

    if not check(parity, _make_backend, Display()):
        sys.exit(1)


adapter_app = tyro.extras.SubcommandApp()


@adapter_app.command(name="inspect")
def inspect_adapter(path: tyro.conf.Positional[Path], model: str | None = None, llama_cpp: str | None = None) -> None:
    """What an adapter is: method, layers, ranks, scales, and how far it moves each kind of layer.

    Args:
        path: adapter folder of PEFT or mlx-lm, run folder, or LoRA GGUF.
        model: base model to check it against; needed for a GGUF.
        llama_cpp: folder of a llama.cpp build to read a GGUF with.
    """
    from common.adapter_tools import inspect_adapter
    from common.progress import Display

    inspect_adapter(path, model, llama_cpp, Display())


@adapter_app.command(name="convert")
def convert_adapter(
    path: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    to: Literal["peft", "mlx", "gguf"],
    model: str | None = None,
    llama_cpp: str | None = None,
) -> None:
    """Rewrite an adapter for PEFT, mlx-lm or llama.cpp (a LoRA GGUF); scales, ranks and patterns keep their meaning.

    Args:
        path: adapter folder of PEFT or mlx-lm, run folder, or LoRA GGUF.
        out: folder to make, or file for a GGUF.
        to: whose layout to write.
        model: base model to check it against; needed for a GGUF.
        llama_cpp: folder of a llama.cpp build to use for a GGUF.
    """
    from common.adapter_tools import convert_adapter
    from common.progress import Display

    convert_adapter(path, out, to, model, llama_cpp, Display())


@app.command(name="adapter")
def adapter_command() -> None:
    """Inspect or convert an adapter: `adapter inspect PATH`, `adapter convert PATH OUT --to peft|mlx|gguf`."""


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # so that servers and temporary files are cleaned up


def main() -> None:
    argv = sys.argv[1:]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
            _train(argv[1:])
        elif argv[:1] == ["plan"] and not {"-h", "--help"} & set(argv):
            _plan(argv[1:])
        elif argv[:1] == ["adapter"]:
            adapter_app.cli(args=argv[1:], prog="twintune adapter", config=(tyro.conf.FlagCreatePairsOff,))
        else:
            app.cli(args=argv, prog="twintune", description=_ABOUT, config=(tyro.conf.FlagCreatePairsOff,))
    except UserError as error:
        print(f"error: {error.what}\nfix:   {error.fix}", file=sys.stderr)
        if os.environ.get("TWINTUNE_TRACEBACK"):
            raise
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.strerror or error}: {error.filename or ''}\nfix:   Look at that path.", file=sys.stderr)
        if os.environ.get("TWINTUNE_TRACEBACK"):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
