"""Options out of flags over a YAML file over defaults; every fault of both is named at once."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common import documents
from common.errors import UserError, nearest
from common.option_aliases import FAMILIES, SAME
from common.option_faults import SHAPE, TAKEN_FROM_ADAPTER
from common.option_translation import translate
from common.options import PATHS, QUICKSTART, RESUME_OPTIONS, Options, by_flag
from common.paths import path_fault, user_path
from common.presets import preset_file


@dataclass
class _Merged:
    """What was given so far: values by option, where each comes from, notes on translations, and faults."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)  # options that were given as flags
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, given: dict[str, Any], file: str | None) -> None:
        """Let `given` win over what was there; `file` is None for flags."""
        translated, notes, faults = translate(given)
        names = {SAME[key]: key for key in given if key in SAME}
        self.notes += [f"{file or 'flags'}: {line}" for line in notes]
        self.faults += [f"{file}: {line}" if file else line for line in faults]
        if {"steps", "epochs"} & translated.keys():  # one takes the place of the other
            self.values.pop("steps", None)
            self.values.pop("epochs", None)
        self.values.update(translated)
        self.flags |= translated.keys() if file is None else set()
        for key in translated:
            name = names.get(key, key)
            self.sources[key] = f"{file}: {name}" if file else f"--{name.replace('_', '-')}"

    def checked(self, command: str, allowed: Collection[str] | None) -> Options:
        """The options. Raises UserError with all faults. allowed: the flags that `command` takes; None: all."""
        options = _validated(self, allowed)
        if options is not None and not options.resume:  # a resumed run's own options come first
            self.faults += idle_faults(self.flags, options)
        if options is None or self.faults:
            fix = f"`python cli.py {command} --help` lists every option and its values."
            raise UserError("\n".join(self.faults), fix)
        return options


def load_options(
    flags: dict[str, Any], command: str = "train", allowed: Collection[str] | None = None
) -> tuple[Options, list[str]]:
    """`(options, a line for every spelling that was translated)`. flags: values by name, as `read_flags` gives them.

    Without --config and --data the built-in example's preset stands in for the YAML file. Raises one UserError with all
    faults. allowed: the flags that `command` takes; None: all.
    """
    config = flags.get("config")
    if config is None and "data" not in flags and "resume" not in flags:
        config = str(QUICKSTART)
    merged = _Merged()
    if isinstance(config, str):
        file = _config_file(config)
        written = read_config_file(file)
        _anchor(written, file)
        if written.pop("llama_cpp", None) is not None:  # the file may be a stranger's
            merged.faults.append(
                f"{config}: llama_cpp names programs: give it by --llama-cpp or LLAMA_CPP_DIR, not in a file"
            )
        for name, flag in FLAGS_ONLY.items():
            if written.pop(name, None):
                merged.faults.append(f"{config}: {name} {flag}, not in a file")
        if written.pop("config", None) is not None:
            merged.faults.append(f"{config}: config: a file cannot name another one")
        flags = _joined(flags, written)
        merged.add(written, config)
    merged.add(flags, None)
    options = merged.checked(command, allowed)
    if options.finish and not options.resume:
        raise UserError("--finish is for a run that was begun.", "Name it: --resume RUN --finish")
    if options.resume and (extra := sorted(key for key in flags if SAME.get(key, key) not in RESUME_OPTIONS)):
        raise UserError(
            f"--resume continues with the run's own recipe and plan; it does not combine with --{', --'.join(extra)}.",
            "Leave those out, or start a new run without --resume.",
        )
    return options, merged.notes


# What sends rows or a model elsewhere is the user's own to say, as the file may be a stranger's; and what a file of a
# new run cannot mean.
FLAGS_ONLY = {
    "with": "sends the rows to other computers: give it by --with",
    "finish": "is for --resume RUN: give it by --finish",
    "push_public": "publishes the model: give it by --push-public",
    "track_text": "sends rows and answers to trackers: give it by --track-text",
    "track_artifacts": "sends the adapter or the report to trackers: give it by --track-artifacts",
}


def options_over(
    kept: dict[str, Any], flags: dict[str, Any], command: str = "train", allowed: Collection[str] | None = None
) -> Options:
    """The options that a run was started with, and flags over them. Raises one UserError with all faults.

    kept: of the run's record. Options that this version does not know are left out. allowed: as in load_options.
    """
    known = {name: value for name, value in kept.items() if name in by_flag()}
    merged = _Merged(known, {name: f"the run's {name}" for name in known})
    merged.add({name: value for name, value in flags.items() if name != "resume"}, None)
    return merged.checked(command, allowed)


def _config_file(config: str) -> Path:
    """The file at this path, else the preset of this name. Raises UserError where neither is there."""
    path = user_path(config, "--config")
    is_name = config == path.name and path.suffix != ".yaml"
    return preset_file(config) if is_name and not path.is_file() else path


def read_config_file(path: Path) -> dict[str, Any]:
    """The YAML file's options. Raises UserError naming the file and, where YAML knows it, the line."""
    try:
        content = documents.read_yaml(path, "Write one `name: value` a line, as in configs/quickstart.yaml.")
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file.", "`python cli.py init --list` lists the presets.") from None
    names = [str(key).replace("-", "_") for key in content]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: {twice[0]} is given twice, with - and with _.", "Give it once.")
    return dict(zip(names, content.values(), strict=True))


def _joined(flags: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The flags with their partners out of `written`: some options of other programs mean something only together."""
    for family in FAMILIES:
        if any(key in flags for key in family if key != "batch_size"):
            flags = {key: written.pop(key) for key in family if key in written} | flags
    if isinstance(nested := written.get("lora_parameters"), dict) and "rank" in flags:
        written["lora_parameters"] = nested | {"rank": flags["rank"]}  # mlx_lm's scale holds for any rank
    return flags


def _anchor(written: dict[str, Any], config: Path) -> None:
    """A relative path in YAML that is not found from here may be meant from the YAML's own folder."""
    folder, ours = config.parent, config == QUICKSTART  # whatever lies where it is run: ours means our example
    for key in [*PATHS, *(other for other, name in SAME.items() if name in PATHS)]:
        value = written.get(key)
        if isinstance(value, list):
            written[key] = [_anchored(one, folder, ours) for one in value]
        elif value is not None:
            written[key] = _anchored(value, folder, ours)


def _anchored(value: Any, folder: Path, ours: bool) -> Any:
    if not isinstance(value, str) or path_fault(value):  # reported with all other faults
        return value
    if (ours or not Path(value).exists()) and (folder / value).exists():
        found, here = (folder / value).resolve(), Path.cwd()
        return str(found.relative_to(here) if found.is_relative_to(here) else found)
    return value


def absolute_paths(options: dict[str, Any]) -> dict[str, Any]:
    """The options with paths that exist made absolute, so that they hold in another working folder too."""

    def absolute(name: str, value: str) -> str:
        path = user_path(value, f"--{name.replace('_', '-')}")
        return str(path.resolve()) if path.exists() else value

    given = {name: options[name] for name in PATHS if options.get(name)}
    return options | {
        name: absolute(name, value) if isinstance(value, str) else [absolute(name, one) for one in value]
        for name, value in given.items()
    }


def _validated(merged: _Merged, allowed: Collection[str] | None) -> Options | None:
    """The options, or None where there are faults, which are added to `merged`."""
    known, values, sources, faults = by_flag(), merged.values, merged.sources, merged.faults
    taken = known if allowed is None else allowed
    for key in [key for key in values if key not in known or (key in merged.flags and key not in taken)]:
        faults.append(f"{sources[key]} is not an option; {nearest(key, list(taken))}".rstrip("; "))
        del values[key]
    switches = (bool, bool | None)
    for key in [key for key, value in values.items() if value is True and known[key].annotation not in switches]:
        faults.append(f"{sources[key]} needs a value")
        del values[key]
    if values.get("steps") is not None and values.get("epochs") is not None:
        faults.append("steps and epochs are both given: leave one out")
        del values["epochs"]
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            where = sources.get(key, key)
            got = f" (got {item['input']!r})" if key else ""
            faults.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}".removeprefix(": "))
        return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def idle_faults(flags: Collection[str], options: Options) -> list[str]:
    """Faults of flags that can do nothing in this run; a YAML file may be used with several sets of flags."""
    return [*_idle_in_training(flags, options), *_idle_in_export(flags, options)]


def _idle_in_training(flags: Collection[str], options: Options) -> list[str]:
    def given(names: Collection[str]) -> list[str]:
        return [_flag(name) for name in names if name in flags]

    faults = []
    if options.adapter is not None:
        faults += [f"{flag} is taken from --adapter: leave it out" for flag in given(TAKEN_FROM_ADAPTER)]
    if options.method == "full":
        faults += [f"{flag} has no effect with --method full: there is no adapter" for flag in given(SHAPE)]
    if "valid_share" in flags and options.valid_share == 0:
        idle = given(("eval_every", "eval_rows", "patience", "min_delta", "sample_prompt"))
        faults += [f"{flag} is for validation, and --valid-share 0 keeps no rows for it" for flag in idle]
    folders = options.data and all(user_path(source, "--data").is_dir() for source in options.data)
    if "valid_share" in flags and options.valid_share > 0 and folders:
        shown = f"--data {options.data[0]} is a folder" if len(options.data) == 1 else "all sources are folders"
        faults.append(f"--valid-share is for one file, and {shown}: put a valid file into it")
    return faults


def _idle_in_export(flags: Collection[str], options: Options) -> list[str]:
    exported, faults = options.export, []
    if exported != "gguf":
        idle = [_flag(name) for name in ("quant", "split_size", "no_verify") if name in flags]
        faults += [f"{flag} is for a GGUF, and --export is {exported}" for flag in idle]
    if exported != "mlx" and "mlx_bits" in flags:
        faults.append(f"--mlx-bits is for --export mlx, and --export is {exported}")
    if exported not in ("gguf", "lora-gguf") and "llama_cpp" in flags:
        faults.append(f"--llama-cpp is for a GGUF, and --export is {exported}")
    if exported in ("none", "lora-gguf") and "fuse_into" in flags:
        faults.append(f"--fuse-into is for an export that fuses, and --export is {exported}")
    if "push_public" in flags and options.push_public and options.push is None:
        faults.append("--push-public needs --push")
    return faults
