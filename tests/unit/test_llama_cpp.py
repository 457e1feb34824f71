"""Finding, building and steering llama.cpp, with folders and programs made up for the test."""

import io
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import platformdirs
import psutil
import pytest

from common import files
from common.errors import Unable, UserError
from common.llama_cpp import build as build_module
from common.llama_cpp import install
from common.llama_cpp.build import extract, missing_build_tools
from common.llama_cpp.convert import check_vocabulary
from common.llama_cpp.gguf_file import read_tensors
from common.llama_cpp.imatrix import check_imatrix_base, check_imatrix_file, check_imatrix_rows
from common.llama_cpp.install import CONVERTER, LlamaCpp, find
from common.llama_cpp.server import Server, ServerOptions
from common.llama_cpp.split import check_split, split
from common.llama_cpp.tool import ToolRun, write_file
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.system.process import fraction, run_logged, running
from tests.full_disk import full_disk
from tests.llama_server import llama_server
from tests.tiny import write_family

PREFIX = f"llama_cpp_python-{install.VERSION}/vendor/llama.cpp"


def quiet(done: float, text: str) -> None:
    assert 0.0 <= done <= 1.0, text


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


def fake(folder: Path, bins: str, converter: str = "") -> Path:
    """A llama.cpp of tiny programs."""
    script(folder / bins / "llama-quantize", "")
    script(folder / bins / "llama-server", "print('version: 9.9 (fake)')")
    for name in install.OURS if folder == install.cache_root() else ():
        script(folder / bins / name, "")
    script(folder / converter / CONVERTER, "")
    return folder


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No llama.cpp anywhere: an empty cache, an empty PATH."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    return tmp_path


# --- find


@pytest.mark.parametrize(("bins", "converter"), [("build/bin", ""), ("bin", "bin"), ("", ""), ("bin", "")])
def test_a_folder_in_each_layout(tmp_path: Path, bins: str, converter: str) -> None:
    folder = fake(tmp_path / "llama", bins, converter)
    found = find(str(folder))
    assert found is not None
    assert (found.quantize, found.server) == (folder / bins / "llama-quantize", folder / bins / "llama-server")
    assert found.converter == folder / converter / CONVERTER
    assert found.where == f"--llama-cpp {folder}"
    assert found.version == "9.9 (fake)"


def test_a_server_that_does_not_start_is_found_at_once(tmp_path: Path) -> None:
    folder = fake(tmp_path / "llama", "bin")
    lost = "error while loading shared libraries: libllama.so: cannot open shared object file"
    script(folder / "bin" / "llama-server", f"import sys; print({lost!r}); sys.exit(127)")
    with pytest.raises(UserError, match="llama-server does not start:\nerror while loading") as caught:
        find(str(folder))
    assert caught.value.fix.startswith("Build it again in that folder")
    (folder / "bin" / "llama-server").chmod(0o644)
    with pytest.raises(UserError, match=r"llama-server does not start:\n.*Permission denied"):
        find(str(folder))


@pytest.mark.parametrize(("machine", "flags"), [("x86_64", "-U__AMX_INT8__"), ("aarch64", ""), ("arm64", "")])
def test_amx_is_left_out_of_every_build_for_x86(machine: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert install.compiler_flags() == flags
    assert install.complete_marker().endswith(f"; {flags}\n") == bool(flags)


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(None) is None
    root = fake(install.cache_root(), "build/bin", "source")
    assert find(None) is None, "a build without its marker is not complete"
    (root / "complete").write_text("llama-quantize and llama-server")
    assert find(None) is None, "an older Twintune's build lacks tools"
    (root / "complete").write_text(install.complete_marker())
    found = find(None)
    assert found is not None
    assert (found.where, found.logits) == (f"built by Twintune, in {root}", root / "build/bin/twintune-logits")
    fake(tmp_path / "path", "", "")
    assert "on PATH" in str(find(None))
    monkeypatch.setenv("LLAMA_CPP_DIR", str(fake(tmp_path / "env", "bin")))
    assert "LLAMA_CPP_DIR" in str(find(None))
    assert "--llama-cpp" in str(find(str(fake(tmp_path / "option", "bin"))))


def test_binaries_on_path_without_a_working_converter_are_passed_over(tmp_path: Path) -> None:
    fake(tmp_path / "path", "")
    script(tmp_path / "path" / CONVERTER, "import no_such_module_of_llama_cpp")
    assert find(None) is None
    (tmp_path / "path" / CONVERTER).unlink()
    assert find(None) is None


def test_a_named_folder_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake(tmp_path / "llama", "bin") / "bin" / "llama-server").unlink()
    with pytest.raises(UserError) as caught:
        find(str(tmp_path / "llama"))
    assert caught.value.what == f"--llama-cpp {tmp_path / 'llama'}: llama-server not found there."
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=f"LLAMA_CPP_DIR .*nowhere: {CONVERTER}, llama-quantize, llama-server not"):
        find(None)


def test_a_named_folder_whose_converter_is_broken_is_refused(tmp_path: Path) -> None:
    folder = fake(tmp_path / "llama", "bin")
    script(folder / CONVERTER, "import no_such_module_of_llama_cpp")
    with pytest.raises(UserError, match=r"does not run:(?s:.*)No module named 'no_such_module_of_llama_cpp'"):
        find(str(folder))


# --- build


PYTHON = shlex.quote(sys.executable)  # another environment's pip would not be found
PIP = [f"{PYTHON} -m ensurepip", f"uv pip install --python {PYTHON} pip", "uv tool install --with pip ."]


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "which", lambda name: None)
    monkeypatch.setattr(build_module, "capture", lambda command, seconds: (1, "not there"))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("no_tools")
@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("darwin", ["CMake", "brew install cmake", "-m pip install cmake", "xcode-select --install"]),
        ("linux", ["CMake", "apt install cmake", "-m pip install cmake", "apt install g++", "apt install make"]),
    ],
)
def test_missing_tools_are_named_with_their_remedy(
    platform: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    text = "; ".join(missing_build_tools())
    assert [word for word in [*words, *PIP] if word not in text] == []


def test_an_old_cmake_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(build_module, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(build_module, "capture", lambda command, seconds: (0, "cmake version 3.9.1"))
    assert missing_build_tools() == [
        f"CMake 3.14 or newer, this one is 3.9 (apt install cmake, or: {PYTHON} -m pip install cmake)"
    ]


@pytest.mark.usefixtures("no_tools")
def test_build_stops_before_it_downloads_where_tools_are_missing() -> None:
    with pytest.raises(UserError, match=r"has to be built once, and this is missing: CMake") as caught:
        build_module.build(quiet)
    assert "--llama-cpp DIR" in caught.value.fix


def test_a_failed_compilation_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cmake = script(tmp_path / "cmake", "print('CMake Error: no compiler for you'); raise SystemExit(1)")
    monkeypatch.setattr(build_module, "which", lambda name: str(cmake) if name == "cmake" else None)
    monkeypatch.setattr(build_module, "missing_build_tools", list)
    root = install.cache_root()
    (root / "source").mkdir(parents=True)
    with pytest.raises(UserError, match=r"build\.log, ends with:\nCMake Error: no compiler for you"):
        build_module.build(quiet)
    assert not (root / "complete").exists()
    assert "-DLLAMA_OPENSSL=OFF" in (root / "build.log").read_text()


def test_a_build_runs_as_many_compilers_as_it_may_use_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cmake = script(tmp_path / "cmake", f"import sys; print(*sys.argv, file=open({str(tmp_path / 'calls')!r}, 'a'))")
    monkeypatch.setattr(build_module, "which", lambda name: str(cmake) if name == "cmake" else None)
    monkeypatch.setattr(build_module, "cores", lambda: 3)
    root = install.cache_root()
    root.mkdir(parents=True)
    build_module._compile(root, 0, quiet)
    assert "--parallel 3 " in (tmp_path / "calls").read_text()


def test_two_builds_at_once_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "missing_build_tools", list)
    root, started, waiting, builds = install.cache_root(), threading.Event(), threading.Event(), []

    def compile_(folder: Path, lock: int, progress: object) -> None:
        builds.append(folder)
        started.set()
        assert waiting.wait(30)
        fake(folder, "build/bin", "source")

    (root / "source").mkdir(parents=True)
    monkeypatch.setattr(build_module, "_compile", compile_)
    results: list[LlamaCpp] = []
    first = threading.Thread(target=lambda: results.append(build_module.build(quiet)))
    first.start()
    assert started.wait(30)
    second = build_module.build(lambda done, text: waiting.set())  # its only call says that it waits
    first.join(30)
    assert (builds, results) == ([root], [second])


def test_the_mark_of_a_complete_build_appears_complete_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    root = install.cache_root()
    (root / "source").mkdir(parents=True)
    monkeypatch.setattr(build_module, "missing_build_tools", list)
    monkeypatch.setattr(build_module, "_compile", lambda folder, lock, progress: fake(folder, "build/bin", "source"))
    monkeypatch.setattr(files, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build_module.build(quiet)
    assert not (root / "complete").exists()


def archive(path: Path, members: dict[str, str | None], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.mode = (kind, 0o755) if text is not None else (tarfile.DIRTYPE, 0o755)
            info.linkname = "/etc/hosts" if info.issym() or info.islnk() else ""
            info.size = len(text or "") if info.isreg() else 0
            tar.addfile(info, io.BytesIO((text or "").encode()))
    return path


def test_extract_takes_the_folder_and_nothing_else(tmp_path: Path) -> None:
    members = {PREFIX: None, f"{PREFIX}/src": None, f"{PREFIX}/src/a.cpp": "a", f"{PREFIX}/.git": "gitdir: ../../x"}
    path = archive(tmp_path / "a.tar.gz", {**members, "llama_cpp_python/setup.py": "x", "../../evil": "x"})
    extract(path, PREFIX, tmp_path / "out")
    assert [str(p.relative_to(tmp_path)) for p in sorted((tmp_path / "out").rglob("*"))] == ["out/src", "out/src/a.cpp"]
    assert os.access(tmp_path / "out/src/a.cpp", os.X_OK)


@pytest.mark.parametrize("name", ["../../../evil", "a/../../evil"])
def test_extract_refuses_a_member_that_leads_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unsafe path"):
        extract(archive(tmp_path / "a.tar.gz", {f"{PREFIX}/{name}": "x"}), PREFIX, tmp_path / "deep" / "down" / "out")
    assert [path.name for path in tmp_path.rglob("*evil*")] == []


@pytest.mark.parametrize("name", ["/evil", "C:evil", "..\\evil"])
def test_extract_writes_nothing_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    out = tmp_path / "deep" / "down" / "out"
    extract(archive(tmp_path / "a.tar.gz", {f"{PREFIX}/{name}": "x"}), PREFIX, out)
    assert [path.parent for path in tmp_path.rglob("*evil*")] == [out]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_extract_refuses_links(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(UserError, match="is a link"):
        extract(archive(tmp_path / "a.tar.gz", {f"{PREFIX}/a": "x"}, kind), PREFIX, tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


# --- subprocesses


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[12/48] Building CXX object a.cpp.o", 0.25),
        ("[ 12%] Building CXX object a.cpp.o", 0.12),
        ("[100%] Built target llama-server", 1.0),
        ("[  68/ 272] blk.7.attn_k.weight - [ 576, 192, 1, 1], type = bf16", 0.25),
        ("Writing:  94%|█████████▍| 253M/269M [00:03<00:00, 71.3Mbyte/s]", 0.94),
        ("-- Configuring done", None),
        ("[0/0] nothing", None),
    ],
)
def test_fraction(line: str, expected: float | None) -> None:
    assert fraction(line) == expected


def test_run_logged_reads_progress_bars_and_keeps_the_end(tmp_path: Path) -> None:
    lines: list[str] = []
    program = r"import sys; sys.stderr.write('a  1%|\ra  2%|\n'); [print(i) for i in range(20)]; raise SystemExit(3)"
    code, tail = run_logged([sys.executable, "-u", "-c", program], tmp_path / "log", lines.append)
    assert code == 3
    assert tail.splitlines() == [str(i) for i in range(5, 20)]
    assert [fraction(line) for line in lines[:2]] == [0.01, 0.02]
    assert "\n19\n" in (tmp_path / "log").read_text()
    assert run_logged([str(tmp_path / "nothing")], tmp_path / "log", lines.append)[0] == 127


def test_a_running_program_ends_with_its_block() -> None:
    program = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with running([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
    assert process.returncode == 128 + 9
    assert process.stdout.closed


def test_a_program_that_this_cpu_refuses_says_so(tmp_path: Path) -> None:
    refused = script(tmp_path / "llama-imatrix", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(Unable, match="exit status 132") as caught:
        write_file(ToolRun("weigh", [str(refused)], "Close other programs."), tmp_path / "out", lambda *_: None)
    assert caught.value.fix == install.OF_ANOTHER_CPU


def test_run_logged_leaves_no_process_behind(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt) as caught:
        run_logged([sys.executable, "-c", program], tmp_path / "log", stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value)), 0)


@pytest.mark.parametrize("session", [False, True])  # Ninja starts compilers in process groups of their own
def test_what_a_program_has_started_ends_with_it(session: bool, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    start = "import subprocess, sys; inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(77)']"
    program = f"{start}, start_new_session={session}); print(inner.pid, flush=True); inner.wait()"
    with pytest.raises(KeyboardInterrupt) as caught:
        run_logged([sys.executable, "-c", program], tmp_path / "log", stop)
    pid = int(str(caught.value))
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- server

TALKING = """
    def answer(self, body):
        text = body["messages"][-1]["content"]
        if text == "die": print("out of memory, sorry", flush=True); os._exit(1)
        assert body["temperature"] == 0 and body["cache_prompt"] is False
        self.send({"choices": [{"message": {"content": text.upper()}}]})
"""


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_server_is_asked_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy nobody listens at
    llama = llama_server(tmp_path, TALKING)
    done: list[float] = []
    with Server(llama, tmp_path / "m.gguf", ServerOptions(slots=2, timeout=60)) as server:
        assert server.chat(talk("hello"), 5) == "HELLO"
        answers = server.chat_many([talk(c) for c in "abcd"], 5, lambda fraction_done, text: done.append(fraction_done))
        assert answers == ["A", "B", "C", "D"]
        assert done == [0.25, 0.5, 0.75, 1.0]
        assert server.tokenize("ab") == [97, 98]
        with pytest.raises(UserError, match="gave no answer to /v1/chat") as caught:
            server.chat(talk("die"), 5)
        assert "out of memory, sorry" in caught.value.what
        process: subprocess.Popen[bytes] | None = server._process
    assert process is not None
    assert process.poll() is not None


def test_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    llama = LlamaCpp(tmp_path, tmp_path, script(tmp_path / "llama-server", "raise SystemExit('bad file')"), "test", "1")
    with pytest.raises(UserError, match=r"m\.gguf did not come up.*\nbad file"), Server(llama, tmp_path / "m.gguf"):
        pass


# --- quants


def header(path: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    """A GGUF's header with float32 tensors of these shapes."""
    names = b"".join(
        struct.pack("<Q", len(name))
        + name.encode()
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", 0, 0)
        for name, shape in tensors.items()
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + names)
    return path


def test_an_importance_matrix_of_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = ModelFolder(tiny_llama)
    layers, widths = base.config["num_hidden_layers"], {s[1] for s in linear_shapes(base, ["all-linear"]).values()}
    sums = {f"blk.{layer}.{width}.weight.in_sum2": (width, 1) for layer in range(layers) for width in sorted(widths)}
    given = tmp_path / "imatrix.gguf"
    check_imatrix_file(header(given, sums), base)
    others = [dict(list(sums.items())[: len(widths)]), {name: (7, 1) for name in sums}]
    for other in others:
        with pytest.raises(UserError, match="is of another model"):
            check_imatrix_file(header(given, other), base)
    for content in (b"GGUF", b"legacy"):
        given.write_bytes(content)
        with pytest.raises(UserError, match="is not an importance matrix"):
            check_imatrix_file(given, base)
    with pytest.raises(UserError, match="is not an importance matrix"):  # a model
        check_imatrix_file(header(given, {"blk.0.attn_q.weight": (8, 8)}), base)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        check_imatrix_file(tmp_path / "none.gguf", base)


def test_a_split_size_that_cannot_hold_the_largest_tensor(tiny_llama: Path) -> None:
    base = ModelFolder(tiny_llama)
    check_split(2_000_000, ["Q4_K_M", "F32"], base)
    with pytest.raises(UserError, match=r"largest tensor of this model takes about 1 MB.*0 MB is less") as caught:
        check_split(1_000, ["Q4_K_M"], base)
    assert caught.value.fix == "Give 2MB or more."


def test_a_split_that_fails_leaves_the_whole_file_and_its_log(tmp_path: Path) -> None:
    whole = header(tmp_path / "model.gguf", {"a": (10**6, 8), "b": (10**6, 4)})
    os.truncate(whole, 10**6 * 48)
    assert split(whole, 10**8, tmp_path / "none", tmp_path) == []
    tool = script(tmp_path / "tool", "import sys; print(sys.argv[2]); sys.exit('no luck')")
    with pytest.raises(UserError, match=r"splitting model\.gguf failed.*\n32M\nno luck"):  # of the largest tensor
        split(whole, 3 * 10**7, tool, tmp_path / "scratch")
    assert whole.exists()


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"<html>")
    with pytest.raises(UserError, match="is not a complete GGUF file"):
        read_tensors(tmp_path / "a.gguf")


def test_weights_that_nobody_reads_have_no_importance(tmp_path: Path) -> None:
    plain, hub = (
        ModelFolder(write_family(tmp_path / name, "gemma4_text", older=name == "hub")) for name in ("plain", "hub")
    )
    check_imatrix_base(["IQ2_M"], plain)
    check_imatrix_base(["IQ4_XS"], hub)
    with pytest.raises(UserError, match=r"--quant IQ2_M: .* never reads, such as model\.layers\.\d+\.self_attn\.k_"):
        check_imatrix_base(["Q4_K_M", "IQ2_M"], hub)


def test_few_rows_have_no_importance() -> None:
    check_imatrix_rows(96)
    with pytest.raises(UserError, match="the training rows have 95 tokens, too few"):
        check_imatrix_rows(95)


# --- the converter and the tokenizer


def test_a_tokenizer_that_the_converter_does_not_know_is_refused_before_training(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    llama = find(str(fake(tmp_path / "llama", "bin")))
    assert llama is not None
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')  # its weights are not given along
    failing = 'print("NotImplementedError: BPE pre-tokenizer was not recognized - update it"); sys.exit(1)'
    script(llama.converter, f"import sys\n{failing}")
    with pytest.raises(UserError, match="does not know its tokenizer:\nNotImplementedError: BPE") as caught:
        check_vocabulary(folder, llama)
    assert caught.value.fix.startswith("Use --export fused")
    script(llama.converter, "import sys; sys.exit('no such option')")  # may know it all the same
    check_vocabulary(folder, llama)
    script(
        llama.converter,
        "import os, sys\nassert '--vocab-only' in sys.argv\nassert 'index' not in str(os.listdir(sys.argv[1]))",
    )
    check_vocabulary(folder, llama)
    script(llama.converter, f"import sys\n{failing}")
    check_vocabulary(folder, llama)  # is known
