"""The model card and the terms it carries over."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from common import files
from common.errors import UserError
from common.export import model_card
from common.export.model_card import base_form, parts_of, write_card
from common.model_files import license_files
from common.models.license import KNOWN, copy_terms, find_terms, read_front_matter, terms_of
from common.run_record import Run
from tests.full_disk import full_disk
from tests.unit.hub import TOKEN, finished_run
from tests.unit.old_run import edit_record

ALL = ["fused", "adapter", "gguf"]


def card(run: Path, parts: list[str]) -> str:
    return model_card.card(Run(run), parts)


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_the_front_matter(tmp_path: Path) -> None:
    text = card(finished_run(tmp_path / "run"), ALL)
    assert front(text) == {
        "license": "apache-2.0",
        "base_model": "some/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["twintune", "lora", "gguf"],
    }


def test_the_body(tmp_path: Path) -> None:
    text = card(finished_run(tmp_path / "run"), ALL)
    for said in (
        "Fine-tuned with LoRA from [some/base](https://huggingface.co/some/base) (SHA-256 of its contents: `f00d`)",
        "A local data set: 1,234 training rows, 5,678 tokens in the training rows, 432 of them label "
        "tokens. SHA-256 of the "
        "rows: `beef`.",
        "| learning_rate | 0.01 |",
        "| final training loss | 1.2500 |",
        "| peak memory | 2.00 GB |",
        "- `gguf/model-Q4_K_M.gguf`: for llama.cpp, 4.0 MB, 4.90 bits per weight, 3 tensors in a larger type",
        "ollama create my-model -f gguf/Modelfile",
        "llama-server -m gguf/model-Q4_K_M.gguf --jinja",
        'PeftModel.from_pretrained(model, "adapter")',
        "That of [some/base](https://huggingface.co/some/base): apache-2.0.",
    ):
        assert said in text, said
    assert "None" not in text
    assert "best validation loss" not in text  # there was none


_VLLM = "vllm serve some/base --enable-lora --max-lora-rank"


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"r": 4, "lora_alpha": 8}, f"    {_VLLM} 8 --lora-modules tuned=adapter\n"),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 48}, "alpha_pattern": {"q": 96}}, f"    {_VLLM} 64 "),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 48}}, "vLLM would compute another model of this adapter"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 9}}, "vLLM would compute another model of this adapter"),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q": 16}, "alpha_pattern": {"q": 16}}, _VLLM),
        ({"r": 4, "use_dora": True}, ""),  # which vLLM does not know
        ({"r": 1024, "lora_alpha": 8}, ""),
    ],
)
def test_how_vllm_serves_it(adapter: dict, line: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with_config(run, **adapter)
    text = card(run, ALL)
    assert "    vllm serve .\n" in text
    assert ("--enable-lora" in text) == (_VLLM in line)
    assert line in text
    assert "vllm" not in card(run, ["gguf"])


def with_config(run: Path, **settings: object) -> None:
    """The adapter's settings, changed."""
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_is_served_with_the_runs_chat_template(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    Run(run).update_export(lora_gguf="gguf/adapter.gguf")
    assert "template" not in card(run, ALL).split("## How to run it")[1]
    (run / "chat_template.jinja").write_text("{{ messages }}")
    text = card(run, ALL)
    assert "--lora-modules tuned=adapter --chat-template adapter/chat_template.jinja\n" in text
    assert "--lora gguf/adapter.gguf --jinja --chat-template-file gguf/chat_template.jinja\n" in text
    assert '    tokenizer.chat_template = open("adapter/chat_template.jinja", encoding="utf-8").read()\n' in text


def test_an_adapter_over_a_multimodal_base(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert "AutoModelForCausalLM" in card(run, ALL)
    with_config(run, target_modules=["model.language_model.layers.0.self_attn.q_proj"])
    text = card(run, ALL)
    assert '    model = AutoModelForImageTextToText.from_pretrained("some/base")\n' in text
    assert "AutoModelForCausalLM" not in text


def test_an_adapter_over_what_mlx_quantized_has_no_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path / "run")
    monkeypatch.setattr(model_card, "quantized_source", lambda folder: (folder, "mlx-4bit-64"))
    edit_record(run, base={"terms": vars(KNOWN["gemma"]), "form": base_form(tmp_path, "some/base")})
    text = card(run, ALL)
    assert "the adapter alone, for PEFT, over the base in 16 bits, which the named one was quantized from" in text
    assert "PeftModel" not in text
    assert "--enable-lora" not in text


def test_the_vision_tower_is_named_and_used(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert "mmproj" not in card(run, ALL)
    Run(run).update_export(mmproj="gguf/mmproj-BF16.gguf")
    text = card(run, ALL)
    assert "- `gguf/mmproj-BF16.gguf`: its vision tower, for llama.cpp\n" in text
    assert "    llama-server -m gguf/model-Q4_K_M.gguf --mmproj gguf/mmproj-BF16.gguf --jinja\n" in text


def test_an_adapter_that_peft_does_not_load_is_not_for_it(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    Run(run).update(left_out_by_peft=True)
    text = card(run, ALL)
    assert "the adapter alone, for PEFT, of which PEFT 0.21.2 loads a part only: use the complete model" in text
    assert "PeftModel" not in text
    assert "--enable-lora" not in text


def test_the_adapters_gguf_beside_the_models(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    Run(run).update_export(lora_gguf="gguf/adapter.gguf")
    (run / "gguf" / "adapter.gguf").write_bytes(b"GGUF")
    text = card(run, ALL)
    assert "    llama-server -m base.gguf --lora gguf/adapter.gguf --jinja" in text
    assert "    llama-server -m gguf/model-Q4_K_M.gguf --jinja" in text


def test_an_adapter_for_llama_cpp_alone(tmp_path: Path) -> None:
    run = Run(finished_run(tmp_path / "run"))
    run.update(export={"lora_gguf": "gguf/adapter-F16.gguf"})
    (run.gguf / "adapter-F16.gguf").write_bytes(b"GGUF")
    assert parts_of(run) == ["adapter", "gguf"]
    text = card(run.path, parts_of(run))
    assert "- `gguf/adapter-F16.gguf`: the adapter alone" in text
    assert "llama-server -m base.gguf --lora gguf/adapter-F16.gguf" in text
    assert "Modelfile" not in text


@pytest.mark.parametrize("model", ["some/base", "/home/someone/base", "some/base.gguf"])
def test_no_path_no_row_no_token(tmp_path: Path, model: str) -> None:
    run = finished_run(tmp_path / "run", model=model)
    (run / "environment.json").write_text(f'{{"token": "{TOKEN}"}}')
    text = card(run, ALL)
    for private in (str(tmp_path), "/home", "rows.jsonl", "a row's own words", "what a row's prompt brought", TOKEN):
        assert private not in text


def test_a_local_base_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    text = card(finished_run(tmp_path / "run", model=str(tmp_path)), ALL)
    assert "base_model" not in front(text)
    assert "Fine-tuned with LoRA from a local model folder" in text
    assert "PeftModel" not in text


@pytest.mark.parametrize(
    ("data", "names"),
    [("owner/rows:config@main#train", ["owner/rows"]), ("owner/rows", ["owner/rows"]), ("/a/b", None)],
)
def test_a_data_set_of_the_hub_is_named(tmp_path: Path, data: str, names: list[str] | None) -> None:
    run = finished_run(tmp_path / "run")
    Run(run).update(options={"model": "some/base", "data": data})
    assert front(card(run, ALL)).get("datasets") == names


@pytest.mark.parametrize("part", ALL)
def test_only_what_goes_along_is_described(tmp_path: Path, part: str) -> None:
    text = card(finished_run(tmp_path / "run"), [part])
    words = {"fused": "`model*.safetensors`", "adapter": "`adapter/`", "gguf": "`gguf/Modelfile`"}
    assert {name for name, word in words.items() if word in text} == {part}
    library = {"fused": "transformers", "adapter": "peft", "gguf": None}[part]
    assert front(text).get("library_name") == library


def test_a_quantized_base_is_told(tmp_path: Path) -> None:
    text = card(finished_run(tmp_path / "run", quantization="nf4"), ALL)
    assert "In training the base was quantized (nf4); the adapter is fused into the original weights." in text
    folder = tmp_path / "SmolLM2-135M-Instruct.Q4_1-b179c9523d0e"
    assert "had been quantized to 4 bits (Q4_1)" in base_form(folder, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert base_form(tmp_path / "snapshots", "HuggingFaceTB/SmolLM2-135M-Instruct") == ""
    assert "GGUF" in base_form(folder, "/home/x/y.gguf")


def test_the_verdict_and_its_figures(tmp_path: Path) -> None:
    run = Run(finished_run(tmp_path / "run"))
    assert "## Verification\n\nNot verified: these files have not been compared with what was trained." in card(
        run.path, ALL
    )
    link = {"mean_kl": 0.012345, "p99_kl": 0.1, "same_top": 0.987}
    found = {
        "verdict": "sound with remarks",
        "checks": [{"name": "Q4_K_M", "state": "note", "text": "a row's words"}, {"name": "stop", "state": "ok"}],
        "divergence": {"base": link, "fused": link | {"mean_kl": math.nan}, "Q4_K_M": link},
        "rows": 3,
        "held_out": True,
    }
    run.update(verify=found)
    text = card(run.path, ALL)
    assert "Verdict: sound with remarks." in text
    assert "Remarks or faults: `Q4_K_M`. Next-token distributions compared on 3 validation rows:" in text
    assert "| base, untuned | tuned | 0.01235 | 0.1000 | 98.7% |" in text
    assert "| fused | tuned | not finite | 0.1000 | 98.7% |" in text
    assert "| Q4_K_M | BF16 GGUF | 0.01235 | 0.1000 | 98.7% |" in text
    assert "a row's words" not in text
    run.update(verify=found | {"verdict": "the best [model](http://x) of all"})
    assert "the best" not in card(run.path, ALL)


def test_the_fused_folders_card_is_written_again_where_there_is_one(tmp_path: Path) -> None:
    run = Run(finished_run(tmp_path / "run"))
    run.update(verify={"verdict": "sound"})
    write_card(run)
    assert "Verdict: sound." in (run.fused / "README.md").read_text()
    shutil.rmtree(run.fused)
    write_card(run)
    assert not run.fused.exists()


def test_parts_are_those_that_are_whole(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert parts_of(Run(run)) == ALL
    (run / "gguf" / "model-Q4_K_M.gguf").unlink()
    assert parts_of(Run(run)) == ["fused", "adapter"]


# --- terms


def test_a_notice_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(files, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        copy_terms(tmp_path, tmp_path / "out", KNOWN["gemma"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_license_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, out: Path) -> None:
        out.write_text("MI")
        full_disk(out)

    (tmp_path / "LICENSE").write_text("MIT License")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError, match="No space left") as caught:
        copy_terms(tmp_path, tmp_path / "out", KNOWN["gemma"])
    assert caught.value.filename == str(tmp_path / "out" / "LICENSE")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "model", "kind", "license", "name"),
    [
        ({"README.md": "---\nlicense: mit\n---\n# x"}, "a/b", "llama", "mit", ""),
        ({"README.md": "---\nlicense: gemma\n---\n"}, "a/b", "gemma3", "gemma", ""),
        ({"README.md": "---\nlicense: llama3.2\nlanguage: en\n---\n"}, "a/b", "llama", "llama3.2", ""),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n"},
            "a/b",
            "q",
            "other",
            "qwen-research",
        ),
        ({"README.md": "---\nlicense: other\n---\n"}, "a/b", "q", "other", "see-base-model"),
        (
            {"README.md": "no head", "LICENSE": "  Apache License\n  Version 2.0, January 2004"},
            "a/b",
            "q",
            "apache-2.0",
            "",
        ),
        ({"LICENSE.txt": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, "a/b", "llama", "llama3.1", ""),
        ({"LICENSE": "MIT License\n\nCopyright"}, "a/b", "phi3", "mit", ""),
        ({"LICENSE": "Ours alone"}, "a/b", "q", "other", "see-base-model"),
        ({}, "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", "apache-2.0", ""),
        ({}, "google/gemma-3-270m", "gemma3_text", "gemma", ""),
        ({}, "/home/x/base", "gemma3_text", "gemma", ""),
        ({"README.md": "---\nlicense: [broken\n---\n"}, "a/b", "llama", "other", "see-base-model"),
        ({"README.md": "---\nlicense: 2.0\n---\n"}, "a/b", "llama", "other", "see-base-model"),
        ({"README.md": "---\nlicense: [mit]\n---\n", "LICENSE": "MIT License"}, "a/b", "phi3", "mit", ""),
        ({"README.md": f"---\nlicense: {'x' * 301}\n---\n"}, "a/b", "llama", "other", "see-base-model"),
        ({"README.md": "---\nlicense: other\nlicense_name: [a, b]\n---\n"}, "a/b", "q", "other", "see-base-model"),
    ],
)
def test_where_the_license_is_found(
    tmp_path: Path, files: dict[str, str], model: str, kind: str, license: str, name: str
) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    terms = find_terms(tmp_path, model, kind)
    assert (terms.license, terms.name) == (license, name)


def test_an_unknown_license_is_not_invented(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", find_terms(tmp_path, "some/base", "llama"))
    text = card(run, ALL)
    assert front(text)["license"] == "other"
    assert front(text)["license_name"] == "see-base-model"
    assert "Read it before you distribute the model." in text


def test_gemmas_terms_are_carried_over(tmp_path: Path) -> None:
    text = card(finished_run(tmp_path / "run", KNOWN["gemma"]), ALL)
    assert front(text)["license"] == "gemma"
    assert "https://ai.google.dev/gemma/terms" in text
    assert "https://ai.google.dev/gemma/prohibited_use_policy" in text
    assert copy_terms(tmp_path, tmp_path / "run" / "fused", KNOWN["gemma"]) == ["NOTICE"]
    assert (tmp_path / "run" / "fused" / "NOTICE").read_text() == (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    )


@pytest.mark.parametrize(
    ("version", "built", "notice", "begins"),
    [
        ("2", "", "Llama 2 is licensed under the LLAMA 2 Community License", ""),
        ("3", "**Built with Meta Llama 3.**", "Meta Llama 3 is licensed under the Meta Llama 3 Community", "Llama 3"),
        ("3.2", "**Built with Llama.**", "Llama 3.2 is licensed under the Llama 3.2 Community License", "Llama"),
    ],
)
def test_llamas_terms_are_carried_over(tmp_path: Path, version: str, built: str, notice: str, begins: str) -> None:
    terms = KNOWN[f"llama{version}"]
    text = card(finished_run(tmp_path / "run", terms), ALL)
    assert built in text
    assert notice in text
    assert f"https://www.llama.com/llama{version.replace('.', '_')}/license/" in text
    assert (terms.begins, terms.notice.startswith(notice)) == (begins, True)
    assert (f"its name begins with “{begins}”" in text) == bool(begins)


def test_license_and_safety_files_are_copied(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    names = ["LICENSE", "LICENSE.txt", "NOTICE", "Notice.txt", "USE_POLICY.md", "SAFETY.md", "GEMMA_PROHIBITED_USE.md"]
    for name in [*names, "README.md", "config.json"]:
        (base / name).write_text(name)
    assert copy_terms(base, out, KNOWN["gemma"]) == sorted(names)
    assert license_files(out) == sorted(names) == sorted(path.name for path in out.iterdir())
    assert (out / "NOTICE").read_text() == "NOTICE"  # the base's own stays


def test_front_matter_is_read_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert read_front_matter(path) == {}
    path.write_text("---\r\nlicense: mit\r\n---\r\nx")
    assert read_front_matter(path) == {"license": "mit"}
    for text in ("---\njust text\n---\n", "---\n---\n", "---\na: [\n---\n", "no head"):
        path.write_text(text)
        assert read_front_matter(path) == {}
    path.write_bytes(b"---\nlicense: \x01\n---\n")
    assert read_front_matter(path) == {}


@pytest.mark.parametrize("value", ["[" * 3000, "- " * 3000, "&a [*a]", "!!timestamp x"])
def test_hostile_front_matter_is_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\n")
    assert find_terms(tmp_path, "a/b", "llama").license == "other"


def test_aliases_that_multiply_are_not_written_out(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    (tmp_path / "README.md").write_text("\n".join(["---", "a0: &a0 [x, x]", *levels, "license: *a7", "---", ""]))
    assert read_front_matter(tmp_path / "README.md") == {}


def test_front_matter_is_found_at_the_head_of_a_long_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\ufeff---\nlicense: mit\n---\n" + "é" * 200_000, encoding="utf-8")
    assert read_front_matter(tmp_path / "README.md") == {"license": "mit"}


def test_terms_survive_the_record() -> None:
    assert all(terms_of(vars(terms)) == terms for terms in KNOWN.values())


def test_terms_on_record_may_be_of_another_version_and_are_texts(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    Run(run).update(base={"terms": {"seal": "gold"}})
    assert front(card(run, ALL))["license"] == "other"
    edit_record(run, base={"terms": {"license": 2.0}})
    with pytest.raises(UserError, match=r"run\.json is not the record of a run: base\.terms\.license"):
        card(run, ALL)


def test_an_attest_is_named_with_its_short_form(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert "## Attest" not in card(run, ALL)
    link = {"mean_kl": 0.0198, "p99_kl": 0.1, "same_top": 0.98}
    found = {"verdict": "sound", "divergence": {"Q4_K_M": link}}
    export = {"fused": "fused", "gguf": [{"file": "gguf/model-Q4_K_M.gguf", "name": "Q4_K_M"}]}
    edit_record(run, attest={"sha256": "ab12", "date": "2026-11-29"}, verify=found, export=export)
    text = card(run, ALL)
    assert "(SHA-256 of its content: `ab12`)" in text
    assert "verdict sound; Q4_K_M: mean KL 0.01980, top-1 agreement 98.0%." in text
    assert "twintune attest RUN --check attest.json" in text
