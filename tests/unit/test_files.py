"""Files and folders that appear complete or not at all."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import files
from common.files import atomic_folder, atomic_write, scratch_folder, sweep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gets_its_name_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".gguf"
    assert (names(tmp_path), path.read_text()) == (["a.gguf"], "new")


@pytest.mark.parametrize(
    ("name", "start", "suffix"),
    [
        ("答" * 83 + ".jsonl", "答" * 40, ".jsonl"),
        ("a" * 255, "a" * 150, ""),
        ("a." + "b" * 253, "a.b", ""),
        (os.fsdecode(b"\xe9" + b"a" * 246 + b".jsonl"), "", ".jsonl"),
    ],
)
def test_a_name_may_be_as_long_as_a_file_system_takes(tmp_path: Path, name: str, start: str, suffix: str) -> None:
    path = tmp_path / name
    for word in ("old", "new"):
        with atomic_write(path) as temporary:
            temporary.write_text(word)
            cut = temporary.name.split("-", 4)[4]
            assert (cut.startswith(start), cut.endswith(suffix)) == (True, True)
            cut.encode()  # no broken letter
        assert (names(tmp_path), path.read_text()) == ([name], word)
    path.unlink()
    replace_folder(path)
    replace_folder(path)
    assert (names(tmp_path), names(path)) == ([name], ["file"])


def test_a_file_stays_as_it_was_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def stopped() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (names(tmp_path), path.read_text()) == (["a"], "old")


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert (names(tmp_path), path.read_text()) == (["a"], "one")


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    for word in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / word).mkdir()
            (temporary / word / "file").write_text(word)
            assert names(path.parent)[1:] == ([] if word == "old" else ["a"])
    assert (names(path.parent), names(path)) == (["a"], ["new"])


def test_a_folder_stays_as_it_was_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "file").write_text("old")

    def stopped() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "file").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        stopped()
    assert (names(tmp_path), (path / "file").read_text()) == (["a"], "old")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_everything_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    synced, path, sync = [], tmp_path / "a", files._sync
    monkeypatch.setattr(files, "_sync", lambda found: (synced.append((found.name, path.exists())), sync(found)))
    with atomic_write(path) if kind == "file" else atomic_folder(path) as temporary:
        (temporary if kind == "file" else temporary / "inside").write_text("x")
    written = [temporary.name] if kind == "file" else ["inside", temporary.name]
    assert synced == [*((name, False) for name in written), (tmp_path.name, True)]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from common.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]) / 'a') as temporary:\n"
        "    (temporary / 'large').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=files.__file__.rsplit("/", 2)[0], check=False)
    kept = [f".twintune-{files._HOST}-{os.getpid()}-1-b", ".twintune-ffffffff-999999999-1-b", ".twintune-mine"]
    for name, of in zip(kept, ("a process that runs", "another host's process", "somebody else"), strict=True):
        (tmp_path / name).write_text(f"of {of}")
    assert len(names(tmp_path)) == 4
    with atomic_write(tmp_path / "c") as temporary:
        temporary.touch()
    assert names(tmp_path) == sorted([*kept, "c"])


def replace_folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("new")


def test_a_folder_gets_its_name_back_where_the_new_one_cannot_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "a", Path.rename
    path.mkdir()
    (path / "file").write_text("old")

    def refused(source: Path, target: Path) -> Path:
        if (source / "file").read_text() == "new":
            raise OSError("no")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no"):
        replace_folder(path)
    assert (names(tmp_path), (path / "file").read_text()) == (["a"], "old")


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_killed_at_the_renames_loses_no_folder(tmp_path: Path, renames: int) -> None:
    code = (
        "import os, sys; from pathlib import Path; from common.files import atomic_folder\n"
        "path, rename, done = Path(sys.argv[1]), Path.rename, []\n"
        "def killed(source, target):\n"
        "    done.append(rename(source, target))\n"
        "    if len(done) == int(sys.argv[2]): os.kill(os.getpid(), 9)\n"
        "Path.rename = killed\n"
        "with atomic_folder(path) as temporary: (temporary / 'file').write_text('new')"
    )
    path, command = tmp_path / "a", [sys.executable, "-c", code]
    path.mkdir()
    (path / "file").write_text("old")
    subprocess.run([*command, str(path), str(renames)], cwd=files.__file__.rsplit("/", 2)[0], check=False)
    assert path.exists() == (renames == 2)
    with atomic_write(tmp_path / "c") as temporary:
        temporary.touch()
    assert (names(tmp_path), (path / "file").read_text()) == (["a", "c"], "old" if renames == 1 else "new")
    replace_folder(path)
    assert (names(tmp_path), (path / "file").read_text()) == (["a", "c"], "new")


def no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_nameless(folder: Path) -> None:
    (folder / "file").write_text("x")
    no_space()  # as a write to an open file, which has no name


def copy_over_a_folder(folder: Path) -> None:
    (folder / "source").write_text("x")
    (folder / "target" / "source").mkdir(parents=True)
    shutil.copyfile(folder / "source", folder / "target" / "source")


def test_two_that_give_a_folder_its_name_back_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, rename = tmp_path / f".twintune-old-{files._HOST}-999999999-1-a", Path.rename
    old.mkdir()

    def second(source: Path, target: Path) -> Path:
        rename(source, target)  # the other process
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", second)
    with atomic_write(tmp_path / "c") as temporary:
        temporary.touch()
    assert names(tmp_path) == ["a", "c"]


@pytest.mark.parametrize(("harm", "named"), [(write_nameless, "a"), (copy_over_a_folder, "a/target/source")])
def test_an_error_names_the_file_by_its_final_name(tmp_path: Path, harm: Callable[[Path], None], named: str) -> None:
    with pytest.raises(OSError, match=r".") as caught, atomic_folder(tmp_path / "a") as temporary:
        harm(temporary)
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / named), None)


def test_a_rename_that_is_refused_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r".") as caught, atomic_write(tmp_path / "a") as temporary:
        temporary.touch()
    assert caught.value.filename == str(tmp_path / "a")


def test_an_error_that_names_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


def test_a_sweep_removes_what_any_killed_process_left(tmp_path: Path) -> None:
    """Of another host, too, and of this process's own number: a container's processes have the same each time."""
    deep = tmp_path / "checkpoints" / "step-000001"
    deep.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002.tmp").mkdir()
    for name in (f".twintune-{files._HOST}-{os.getpid()}-1-b", ".twintune-ffffffff-7-1-b"):
        (deep / name).write_text("half")
    (deep / ".twintune-old-ffffffff-7-1-best").mkdir()
    (deep / ".twintune-mine").write_text("somebody's own")
    sweep(tmp_path, ".lock")
    assert (names(tmp_path / "checkpoints"), names(deep)) == (["step-000001"], [".twintune-mine", "best"])


def test_a_sweep_spares_what_others_are_at_work_on(tmp_path: Path) -> None:
    """A folder with a lock of its own, and a living process of this host."""
    (tmp_path / "inner" / "checkpoints").mkdir(parents=True)
    (tmp_path / "inner" / ".lock").touch()
    nested = tmp_path / "inner" / "checkpoints" / ".twintune-ffffffff-7-1-step-000001"
    nested.mkdir()
    alive = tmp_path / f".twintune-{files._HOST}-{os.getppid()}-1-answers.jsonl"
    alive.touch()
    (tmp_path / f".twintune-{files._HOST}-999999999-1-answers.jsonl").touch()
    sweep(tmp_path, ".lock")
    assert nested.exists()
    assert names(tmp_path) == [alive.name, "inner"]


def test_a_scratch_folder_goes_with_its_block_and_with_its_process(tmp_path: Path) -> None:
    def stopped() -> None:
        with scratch_folder(tmp_path) as folder:
            (folder / "large").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert names(tmp_path) == []
    code = (
        "import os, sys; from pathlib import Path; from common.files import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'large').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=files.__file__.rsplit("/", 2)[0], check=False)
    assert len(names(tmp_path)) == 1
    with scratch_folder(tmp_path) as one, scratch_folder(tmp_path) as other:
        assert names(tmp_path) == sorted([one.name, other.name])
        assert one.stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == []


def test_what_another_user_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that users share, such as the system's for temporary files."""
    left = tmp_path / f".twintune-{files._HOST}-999999999-1-b"
    left.touch()
    monkeypatch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
    with scratch_folder(tmp_path):
        assert left.exists()
    monkeypatch.undo()
    with scratch_folder(tmp_path):
        assert not left.exists()
