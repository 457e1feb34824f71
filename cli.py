"""Twintune's front door: parses, picks a backend, turns a UserError into text and an exit code. No logic."""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.context import Context
from common.display import Display
from common.errors import UserError
from common.options import Options, load_options, read_flags
from common.sampling import Sampling

_ABOUT = "Fine-tune a language model with LoRA on your own machine, and walk away with a Q4 GGUF."

app = tyro.extras.SubcommandApp()
_SAMPLING = Sampling()
# BaseModel has a method called json, so the field cannot be; common/ does not import tyro, so its flag is named here.
Options.__annotations__["json_output"] = Annotated[bool, tyro.conf.arg(name="json")]


def _context(display: Display, llama_cpp: str | None = None) -> Context:
    return Context(lambda name: importlib.import_module(f"{name}_backend"), display, llama_cpp)


def _train(argv: list[str]) -> None:
    from common.commands.train import run_training
    from common.training.loop import Interrupted

    options, notes = load_options(read_flags(argv))
    display = Display("json" if options.json_output else "quiet" if options.quiet else None)
    for note in notes:
        display.say(note)
    try:
        run_training(options, _context(display, options.llama_cpp))
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
    """Estimate memory and time of `train` with the same options, and show the plan it would choose. Trains nothing.

    Every option of train may follow: plan MODEL --data FILE --rank 32 --memory-limit 8GB.

    Args:
        model: what to train; without it and without --data the built-in example.
        data: as in train.
        probe: take two steps to measure the speed; --no-probe only computes.
    """


def _plan(argv: list[str]) -> None:
    from common.commands.plan import estimate_run

    probe = "--no-probe" not in argv
    argv = [word for word in argv if word not in ("--no-probe", "--probe")]
    if argv and not argv[0].startswith("--"):
        argv = ["--model", *argv]
    options, notes = load_options(read_flags(argv))
    display = Display("json" if options.json_output else "quiet" if options.quiet else None)
    for note in notes:
        display.say(note)
    estimate_run(options, probe, _context(display, options.llama_cpp))


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
    """Count rows, tokens and label tokens, list suspicious rows, show three rows with the labeled tokens colored.

    Args:
        data: JSONL, JSON, CSV, Parquet or text file, a folder with a train file, or a hub data set.
        model: whose tokenizer and chat template to use.
        max_length: rows with more tokens are listed.
        overflow: what becomes of those, as in train.
        valid_share: split off validation rows of one file too, as train makes it (train's is 0.1).
        seed: seed of that split.
        field: what a part of a row is called here, as in train: instruction=question output=answer.
        train_on: where there is loss, as in train.
        thinking: whether thoughts in the rows are kept, as in train.
        chat_template: chatml, gemma, llama3 or a file, as in train.
        explain: show only this training row, counted from 1, token by token, and why each is a label or not.
    """
    from common.commands.check_data import check_data

    given = locals() | {"field": [pair for group in field for pair in group]}
    names = ("data", "model", "max_length", "overflow", "valid_share", "seed", "field", "train_on", "thinking")
    flags = {name: given[name] for name in (*names, "chat_template")}
    check_data(load_options(flags)[0], explain, Display())


@app.command
def fuse(
    run: tyro.conf.Positional[Path],
    export: Literal["fused", "gguf", "lora-gguf", "mlx"] | None = None,
    quant: tuple[str, ...] = (),
    imatrix: bool = False,
    no_verify: bool = False,
    llama_cpp: str | None = None,
    fuse_into: Literal["base", "dequantized"] | None = None,
    push: str | None = None,
    push_public: bool = False,
) -> None:
    """Fuse a finished run's adapter and export it again.

    Args:
        run: run folder.
        export: what to make; as the run was started unless given, and a GGUF where that was none.
        quant: GGUF types; as the run was started unless given.
        imatrix: weigh what to keep exact by an importance matrix of the training rows.
        no_verify: do not prove that the GGUF is what was trained.
        llama_cpp: folder of a llama.cpp build to use.
        fuse_into: with a quantized base: the 16-bit base, or the weights trained over; as the run was started.
        push: hub repository (owner/name) to upload the result to.
        push_public: a repository that is made is for everyone to see.
    """
    from common.commands.fuse import fuse_run

    given = {"export": export, "quant": list(quant), "llama_cpp": llama_cpp, "fuse_into": fuse_into, "push": push}
    flags = {"imatrix": imatrix, "no_verify": no_verify}
    options = {name: value for name, value in (given | flags).items() if value} | {"push_public": push_public}
    fuse_run(run, options, _context(Display(), llama_cpp))


@app.command
def push(
    run: tyro.conf.Positional[Path],
    repo: tyro.conf.Positional[str],
    what: tuple[Literal["fused", "adapter", "gguf"], ...] = (),
    public: bool = False,
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Upload a finished run to the hub: the fused model, adapter/, gguf/, the card, the base's licence files.

    Args:
        run: run folder.
        repo: owner/name, or name alone for your own.
        what: which of them; all that there are unless given.
        public: a repository that is made is for everyone to see.
        private: for nobody but you and whom you let in; so it is unless --public is given.
        dry_run: list every file with its size and its place, ask the hub nothing and upload nothing.
    """
    from common.export.upload import push as upload

    if public and private:
        raise UserError("--public and --private are both given.", "Leave one out.")
    upload(run, repo, list(what), not public, dry_run, Display())


@app.command
def verify(run: tyro.conf.Positional[Path], llama_cpp: str | None = None) -> None:
    """Check that what llama.cpp runs is what was trained: tokens, prompts, stops, distributions.

    Exits with status 1 if it is not.

    Args:
        run: run folder with a fused folder and a GGUF.
        llama_cpp: folder of a llama.cpp build to ask; else found or built once.
    """
    from common.verify.verify import verdict, verify_run

    if verdict(verify_run(run, _context(Display(), llama_cpp))) == "broken":
        sys.exit(1)


@app.command
def compare(runs: tyro.conf.Positional[Annotated[list[Path], tyro.conf.arg(metavar="RUN RUN [RUN ...]")]]) -> None:
    """Runs side by side: whether their recipes agree, speed, memory, losses, ratios to the first.

    Args:
        runs: two or more run folders.
    """
    from common.commands.compare import compare

    if len(runs) < 2:
        raise UserError("compare needs two or more runs.", "python cli.py compare RUN RUN")
    compare(runs, Display())


@app.command
def doctor(parity: str | None = None) -> None:
    """What is here, and what is missing for which step.

    Args:
        parity: train this model a few steps on both backends and compare: a model, or a family such as llama.
    """

    if parity is None:
        from common.commands.doctor import doctor

        doctor(Display())
        return
    from common.verify.parity import parity as check

    if not check(parity, _context(Display())):
        sys.exit(1)


_With = Annotated[Literal["gguf", "adapter", "fused", "base"] | None, tyro.conf.arg(name="with")]


@app.command
def chat(
    run: tyro.conf.Positional[Path],
    with_: _With = None,
    quant: str | None = None,
    system: str | None = None,
    system_file: Path | None = None,
    context: int = 4096,
    llama_cpp: str | None = None,
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = _SAMPLING,
) -> None:
    """Chat with a run's model; /help there lists the commands (compare with the base, save as training rows ...).

    Args:
        run: run folder, its fused folder, or a GGUF file.
        with_: the GGUF in llama.cpp, unless another is named; those run in the backend that trained.
        quant: which of the run's GGUFs; the first unless given.
        system: system prompt, or @FILE.
        system_file: the same from a file.
        context: tokens that the talk may have, answers included.
        llama_cpp: folder of a llama.cpp build to use.
    """
    from common.commands.chat import chat

    chat(run, with_, quant, system, system_file, context, sampling, _context(Display(), llama_cpp))


@app.command
def generate(
    run: tyro.conf.Positional[Path],
    prompts: Path,
    out: Path,
    with_: _With = None,
    quant: str | None = None,
    system: str | None = None,
    system_file: Path | None = None,
    context: int = 4096,
    slots: int = 4,
    llama_cpp: str | None = None,
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = _SAMPLING,
) -> None:
    """Answer every prompt of a file, as rows in the training format. A stopped job goes on when asked again.

    Args:
        run: run folder, its fused folder, or a GGUF file.
        prompts: rows in any shape that train reads, with answers or without; or a .txt file with a prompt a line.
        out: JSONL file to make.
        with_: the GGUF in llama.cpp, unless another is named; those run in the backend that trained.
        quant: which of the run's GGUFs; the first unless given.
        system: system prompt for rows without one, or @FILE.
        system_file: the same from a file.
        context: tokens that a prompt and its answer may have.
        slots: answers that llama.cpp writes at once.
        llama_cpp: folder of a llama.cpp build to use.
    """
    from common.commands.generate import generate

    ours = (context, slots, sampling, _context(Display(), llama_cpp))
    generate(run, prompts, out, with_, quant, system, system_file, *ours)


@app.command
def serve(
    run: tyro.conf.Positional[Path],
    quant: str | None = None,
    port: int = 8080,
    host: str = "127.0.0.1",
    context: int = 4096,
    slots: int = 1,
    llama_cpp: str | None = None,
    api_key: str | None = None,
    no_auth: bool = False,
) -> None:
    """Serve a run's GGUF by llama.cpp's own server: an OpenAI-compatible endpoint on this machine.

    Args:
        run: run folder or GGUF file.
        quant: which of the run's GGUFs; the first unless given.
        port: where; 0 takes a free one.
        host: address to listen on. The default is reached from this machine alone; any other needs a key or --no-auth.
        context: tokens that a prompt and its answer may have.
        slots: requests answered at once.
        llama_cpp: folder of a llama.cpp build to use.
        api_key: key that every request must bring; LLAMA_API_KEY in the environment does the same, unseen by `ps`.
        no_auth: serve without a key, on any host.
    """
    from common.commands.serve import serve

    serve(run, quant, host, port, context, slots, api_key, no_auth, _context(Display(), llama_cpp))


adapter_app = tyro.extras.SubcommandApp()


@adapter_app.command(name="inspect")
def inspect_adapter(path: tyro.conf.Positional[Path], model: str | None = None, llama_cpp: str | None = None) -> None:
    """What an adapter is: method, layers, ranks, scales, and how far it moves each kind of layer.

    Args:
        path: adapter folder of PEFT or mlx-lm, run folder, or LoRA GGUF.
        model: base model to check it against; needed for a GGUF.
        llama_cpp: folder of a llama.cpp build to read a GGUF with.
    """
    from common.commands.adapter import inspect_adapter

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
    from common.commands.adapter import convert_adapter

    convert_adapter(path, out, to, model, llama_cpp, Display())


@app.command(name="adapter")
def adapter_command() -> None:
    """Inspect or convert an adapter: `adapter inspect PATH`, `adapter convert PATH OUT --to peft|mlx|gguf`."""


llama_app = tyro.extras.SubcommandApp()


@llama_app.command(name="build")
def build_llama() -> None:
    """Build the pinned llama.cpp now, once: the export would do it by itself. Goes on where it was stopped."""
    from common.commands.llama import build_llama

    build_llama(Display())


@llama_app.command(name="where")
def where_llama(llama_cpp: str | None = None) -> None:
    """Which llama.cpp is used, of which version, and which of its tools are there.

    Args:
        llama_cpp: folder of a llama.cpp build to look at.
    """
    from common.commands.llama import where_llama

    where_llama(llama_cpp, Display())


@llama_app.command(name="clean")
def clean_llama() -> None:
    """Remove what `llama build` made, of every version."""
    from common.commands.llama import clean_llama

    clean_llama(Display())


@app.command(name="llama")
def llama_command() -> None:
    """llama.cpp: `llama build`, `llama where`, `llama clean`."""


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # so that servers and temporary files are cleaned up


def _complain(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # the terminal is gone; the exit status still says what happened


def main() -> None:
    argv = sys.argv[1:]
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup's stays
        signal.signal(signal.SIGHUP, _terminated)
    try:
        if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
            _train(argv[1:])
        elif argv[:1] == ["plan"] and not {"-h", "--help"} & set(argv):
            _plan(argv[1:])
        elif argv[:1] == ["llama"]:
            llama_app.cli(args=argv[1:], prog="twintune llama", config=(tyro.conf.FlagCreatePairsOff,))
        elif argv[:1] == ["adapter"]:
            adapter_app.cli(args=argv[1:], prog="twintune adapter", config=(tyro.conf.FlagCreatePairsOff,))
        else:
            app.cli(args=argv, prog="twintune", description=_ABOUT, config=(tyro.conf.FlagCreatePairsOff,))
    except UserError as error:
        _complain(f"error: {error.what}\nfix:   {error.fix}")
        if os.environ.get("TWINTUNE_TRACEBACK"):
            raise
        sys.exit(1)
    except BrokenPipeError:  # the reader has seen enough: `train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written
        _complain(f"error: {error.strerror or error}: {error.filename or ''}\nfix:   Look at that path.")
        if os.environ.get("TWINTUNE_TRACEBACK"):
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("stopped")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("TWINTUNE_TRACEBACK"):
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        what = f"this is a bug: {type(error).__name__}: {first}"
        _complain(f"error: {what}\nfix:   Report it. TWINTUNE_TRACEBACK=1 shows where.")
        sys.exit(1)


if __name__ == "__main__":
    main()
