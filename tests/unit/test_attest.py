"""`attest`: what is stated of a tiny run is found again, and what was altered since is found too."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.attest import computed, document, subject
from common.attest.check import Outcome, compare, within
from common.attest.document import Attest, SectionRecord, own_hash
from common.attest.page import attest_page
from common.attest.subject import digest, other_machine
from common.commands.attest import attest_run, check_attest
from common.errors import UserError
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.tool import ToolRun, write_file
from common.models.adapter_files import write_mlx, write_peft
from common.models.lora_init import initial_adapter, layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.run_fields import ExportRecord, GgufRecord
from common.run_record import Run
from common.verify.cases import Cases, write_cases
from common.verify.parity import measured
from common.verify_record import DivergenceRecord, VerifyRecord
from tests.contexts import context
from tests.progress import silent
from tests.report_run import write_run
from tests.tiny import write_model
from tests.unit.bigram import recipe

EVIL = "</td><script>alert(1)</script>"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a tiny Llama with an adapter, fused weights and a file in place of a GGUF; no llama.cpp is here."""
    monkeypatch.setattr("common.attest.subject.own_build", lambda: None)
    monkeypatch.setattr(computed, "tiny_parity", lambda family, backends: measured(family)["differences"])
    base = ModelFolder(write_model(tmp_path / "base"))
    known = {"model": str(base.path), "data": ["gone.jsonl"]}
    folder = write_run(tmp_path / "run", model_hash=base.content_hash(), options=known, status="complete")
    made = Run(folder)
    made.write_recipe(recipe().model_copy(update={"targets": ["q_proj", "v_proj"], "rank": 2}))
    shapes = linear_shapes(base, ["q_proj", "v_proj"])
    adapter = initial_adapter(shapes, layer_count(shapes), made.recipe)
    for weight in adapter.weights.values():
        weight.B[:] = np.random.default_rng(1).normal(size=weight.B.shape)
    write_peft(made.adapter, adapter)
    write_mlx(folder / "adapter-mlx", adapter)
    write_fused(base, adapter, made.fused, ServingConfig([2]), silent)
    made.gguf.mkdir()
    (made.gguf / "model-Q4_K_M.gguf").write_bytes(bytes(range(256)))
    write_cases(made.verify_cases, Cases([], True, ["a text"], []))
    gguf = GgufRecord(file="gguf/model-Q4_K_M.gguf", name="Q4_K_M", bytes=256)
    link = DivergenceRecord(mean_kl=0.02, p99_kl=0.19, same_top=0.98)
    made.update(
        export=ExportRecord(fused="fused", gguf=[gguf]),
        verify=VerifyRecord(verdict="sound", divergence={"Q4_K_M": link}, checks=[{"name": "stop", "state": "ok"}]),
    )
    attest_run(folder, False, context())
    return folder


def checked(run: Path, file: Path | None = None) -> dict[str, set[str]]:
    """The names of figures by how they came out."""
    found: dict[str, set[str]] = {"reproduced": set(), "differs": set(), "not checkable here": set()}
    for one in check_attest(run, file or run / "attest.json", context()):
        found[one.state].add(f"{one.section}: {one.name}")
    return found


def alter(path: Path, change: Callable[[Any], None], sealed: bool = False) -> None:
    """sealed: with the hash of the altered content, as a forger would."""
    content = json.loads(path.read_text())
    change(content["sections"])
    path.write_text(json.dumps(content | ({"sha256": own_hash(content)} if sealed else {})))


def bytes_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_nothing_differs_of_an_untouched_run_and_nothing_of_it_is_changed(run: Path) -> None:
    before = bytes_of(run)
    found = checked(run)
    assert found["differs"] == set()
    assert {"fused again: fused/model.safetensors", "files: gguf/model-Q4_K_M.gguf", "the file: sha256"} <= (
        found["reproduced"]
    )
    assert "the file: attest.html" in found["reproduced"]
    assert "verification: divergence / Q4_K_M / mean KL" in found["not checkable here"]  # llama.cpp is not built
    assert "label map: " in found["not checkable here"]  # the data were gone when it was made
    assert bytes_of(run) == before


def test_an_altered_value_of_the_adapter_is_found(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, path)
    assert checked(run)["differs"] == {
        "files: adapter/adapter_model.safetensors",
        "fused again: fused/model.safetensors",
    }


@pytest.mark.parametrize("name", ["gguf/model-Q4_K_M.gguf", "fused/model.safetensors", "fused/tokenizer.json"])
def test_an_altered_byte_of_a_file_is_found(run: Path, name: str) -> None:
    content = bytearray((run / name).read_bytes())
    content[-3] ^= 1
    (run / name).write_bytes(content)
    assert checked(run)["differs"] == {f"files: {name}"}


def test_an_altered_figure_is_found_by_the_hash_and_by_the_run(run: Path) -> None:
    def change(sections: Any) -> None:
        sections["held-out rows"]["figures"]["validation loss before"] = 4.4

    alter(run / "attest.json", change)
    assert checked(run)["differs"] == {
        "the file: sha256",
        "the file: attest.html",
        "held-out rows: validation loss before",
    }
    alter(run / "attest.json", lambda sections: None, sealed=True)
    assert "held-out rows: validation loss before" in checked(run)["differs"]


def test_an_altered_page_is_found(run: Path) -> None:
    page = run / "attest.html"
    page.write_text(page.read_text().replace("sound", "splendid", 1))
    assert checked(run)["differs"] == {"the file: attest.html"}


def test_a_fused_folder_that_is_not_the_adapters_is_not_attested(run: Path) -> None:
    content = bytearray((run / "fused" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "fused" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not what the run's adapter gives, fused into its base"):
        attest_run(run, False, context())


def test_no_log_is_named_that_is_removed_with_the_scratch_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "print('no such layer'); raise SystemExit(3)"]
    tool = ToolRun("converting to GGUF", failing, "Export again.")
    monkeypatch.setattr(subject, "convert", lambda folder, out, *_: write_file(tool, out, silent))
    monkeypatch.setattr(subject.Subject, "require_llama", lambda given: None)
    with pytest.raises(UserError) as caught:
        _ = subject.Subject(Run(run), context(), tmp_path / "scratch").bf16_gguf
    assert caught.value.what == "converting to GGUF failed (exit status 3). Its log ends with:\nno such layer"


def test_what_is_missing_is_no_difference(run: Path) -> None:
    for name in ("gguf/model-Q4_K_M.gguf", "metrics.jsonl", "environment.json"):
        (run / name).unlink()
    found = checked(run)
    assert {one for one in found["differs"] if not one.startswith("held-out")} == set()
    assert {"files: gguf/model-Q4_K_M.gguf", "curve: training losses", "versions: python"} <= found[
        "not checkable here"
    ]


def test_a_quant_that_is_altered_and_taken_from_the_record_is_found(run: Path) -> None:
    path = run / "gguf" / "model-Q4_K_M.gguf"
    path.write_bytes(path.read_bytes()[::-1])
    Run(run).update(export=ExportRecord(fused="fused"))
    assert "files: gguf/model-Q4_K_M.gguf" in checked(run)["differs"]


def test_every_file_of_a_split_gguf_is_hashed(run: Path) -> None:
    parts = [f"gguf/model-Q4_K_M-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        (run / part).write_bytes(part.encode())
    gguf = GgufRecord(file=parts[0], parts=parts, name="Q4_K_M", bytes=90)
    Run(run).update(export=ExportRecord(fused="fused", gguf=[gguf]))
    attest_run(run, False, context())
    (run / parts[1]).write_bytes(b"altered")
    assert checked(run)["differs"] == {f"files: {parts[1]}"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda content: content["sections"].pop("held-out rows"), "held-out rows: "),
        (lambda content: content["sections"].update({"held-out rows": {"missing": "nothing"}}), "held-out rows: "),
        (
            lambda content: (
                content["sections"]["files"]["figures"].update({"../x": "ab"})
                or content["sections"]["memory"]["figures"].update(MMLU=0.93)
            ),
            "memory: MMLU",
        ),
        (lambda content: content["sections"]["memory"]["figures"].pop("measured peak"), "memory: measured peak"),
        (lambda content: content["sections"]["memory"]["figures"].update(MMLU=0.93), "memory: MMLU"),
        (lambda content: content["made"].update(model="meta-llama/Llama-3.3-70B"), "the file: model"),
        (lambda content: content["made"].update(reviewed="by a laboratory"), "the file: made / reviewed"),
    ],
)
@pytest.mark.slow
def test_what_is_left_out_or_added_is_found_under_a_renewed_hash(
    run: Path, change: Callable[[Any], Any], found: str
) -> None:
    content = json.loads((run / "attest.json").read_text())
    change(content)
    content["sha256"] = own_hash(content)
    (run / "attest.json").write_text(json.dumps(content))
    assert found in checked(run)["differs"]


def test_a_claim_outside_the_sections_is_refused(run: Path) -> None:
    content = json.loads((run / "attest.json").read_text())
    (run / "attest.json").write_text(json.dumps(content | {"reviewed": "by a laboratory"}))
    with pytest.raises(UserError, match="is no attest: reviewed"):
        checked(run)


def test_the_files_say_nothing_of_this_machine(run: Path) -> None:
    for name in ("attest.json", "attest.html"):
        text = (run / name).read_text()
        assert str(run.parent) not in text
        assert "gone.jsonl" not in text


def test_the_record_and_another_export(run: Path) -> None:
    made = Run(run).record.attest
    assert made is not None
    assert made.sha256 == json.loads((run / "attest.json").read_text())["sha256"]
    assert not made.with_text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is no attest: it lacks"),
        ("[]", "not a JSON object"),
        ('{"format": 9, "sha256": "", "made": {}, "with_text": false, "sections": {}}', "has format 9"),
        ('{"format": 1, "sha256": 5, "made": {}, "with_text": false, "sections": {}}', "is no attest: sha256"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_attest(run: Path, tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        check_attest(run, path, context())


@pytest.mark.parametrize(
    ("section", "figure", "stated", "found", "agree"),
    [
        ("verification", "divergence / Q4_K_M / mean KL", 0.0198, 0.0203, True),
        ("verification", "divergence / Q4_K_M / mean KL", 0.0198, 0.0298, False),
        ("verification", "divergence / Q8_0 / mean KL", 0.0, 8e-5, False),
        ("verification", "divergence / Q4_K_M / mean KL", 0.0198, None, False),
        ("verification", "divergence / Q4_K_M / mean KL", 10**400, 0.5, False),
        ("verification", "divergence / Q4_K_M / top-1 agreement", 1.0, 0.99, True),
        ("verification", "divergence / Q4_K_M / positions", 84, 85, False),
        ("parity of the backends", "logits", 1e-6, 9e-6, True),
        ("memory", "measured peak", 100, 101, False),
        ("memory", "measured peak", 1, True, False),
    ],
)
def test_the_tolerances(section: str, figure: str, stated: Any, found: Any, agree: bool) -> None:
    assert within(section, figure, stated, found) is agree


def outcomes(section: str, stated: dict[str, Any], found: dict[str, Any], other: str) -> dict[str, Outcome]:
    record = {section: SectionRecord(figures=stated)}
    attest = Attest(format=1, sha256="", made={}, with_text=False, sections=record)
    found_here = {section: SectionRecord(figures=found)}
    return {one.name: one for one in compare(attest, found_here, {}, other) if one.section == section}


def test_answers_may_part_on_another_machine_and_prompts_may_not() -> None:
    stated, found = ({"prompt 1": {"prompt": one, "answer": one}} for one in ("a", "b"))
    here = outcomes("answers of the tuned model", stated, found, "")
    assert {one.state for one in here.values()} == {"differs"}
    there = outcomes("answers of the tuned model", stated, found, "processor")
    assert there["prompt 1 / prompt"].state == "differs"
    assert there["prompt 1 / answer"].state == "not checkable here"
    assert there["prompt 1 / answer"].why == "it depends on rounding, and this machine differs in processor"


@pytest.mark.parametrize(
    ("section", "state"), [("verification", "differs"), ("memory", "differs"), ("bf16 GGUF", "not checkable here")]
)
def test_an_emptied_section_differs_where_its_author_could_state_it(run: Path, section: str, state: str) -> None:
    needs = document.SECTIONS[section].needs
    alter(run / "attest.json", lambda sections: sections.update({section: {"missing": needs}}), sealed=True)
    assert f"{section}: " in checked(run)[state]


def test_a_run_without_verification_has_nothing_to_state_of_it(run: Path) -> None:
    Run(run).update(verify=None)
    attest_run(run, False, context())
    found = checked(run)
    assert found["differs"] == set()
    assert "verification: " in found["not checkable here"]


def test_a_claim_as_what_was_missing_differs(run: Path) -> None:
    claim = {"missing": "a laboratory checked this: MMLU 0.93"}
    alter(run / "attest.json", lambda sections: sections.update({"parity of the backends": claim}), sealed=True)
    assert checked(run)["differs"] == {"parity of the backends: ", "the file: attest.html"}


def test_a_section_that_nobody_states_differs() -> None:
    (one,) = outcomes("benchmarks", {"MMLU": 0.93}, {}, "").values()
    assert (one.state, one.found) == ("differs", "Twintune states no such section")


@pytest.mark.parametrize("text", ["Yes.", "No."])
def test_an_answers_text_has_its_hash_on_any_machine(text: str) -> None:
    stated, here = ({"prompt 1": {"answer": digest(of), "text": of}} for of in ("Yes.", "Well."))
    stated["prompt 1"]["text"] = text
    found = outcomes("answers of the base model", stated, here, "processor")
    assert found["prompt 1 / text"].state == ("not checkable here" if text == "Yes." else "differs")
    assert found["prompt 1 / answer"].state == "not checkable here"


def test_a_page_of_another_version_is_said_aloud(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((run / "attest.json").read_text())
    content["made"]["page"] = "0" * 64
    (run / "attest.json").write_text(json.dumps(content | {"sha256": own_hash(content)}))
    assert "the file: attest.html" in checked(run)["not checkable here"]
    assert "attest.html is not proven: another version of Twintune wrote the page" in capsys.readouterr().err


def test_machines_are_told_apart() -> None:
    made = {"processor": "A", "threads": "2", "packages": {"torch": "2"}, "llama.cpp": "1", "backend": "torch on cpu"}
    assert other_machine(made, dict(made)) == ""
    assert other_machine(made, made | {"llama.cpp": "2", "date": "x"}) == "llama.cpp"


def test_a_page_of_a_strangers_file_is_escaped_and_asks_no_network() -> None:
    sections = {
        "curve": SectionRecord(figures={"training": [[1, 2.0], [2, EVIL], "x", [2, 1.5]], EVIL: EVIL}),
        EVIL: SectionRecord(missing=EVIL),
        "verification": SectionRecord(figures={"verdict": EVIL, "divergence": {EVIL: {"mean KL": 1e-3}}}),
    }
    stated = Attest(format=1, sha256=EVIL, made={"model": EVIL, "by": EVIL}, with_text=True, sections=sections)
    page = attest_page(stated)
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src &#39;none&#39;" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page.partition("<script")[0])


def test_the_docs_name_every_section() -> None:
    text = (Path(__file__).parents[2] / "docs" / "attest.md").read_text()
    for name in document.SECTIONS:
        assert f"| {name.removesuffix(' of the tuned model').removesuffix(' of the base model')} |" in text, name
