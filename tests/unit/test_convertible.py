"""What llama.cpp's converter would turn into another model is refused before training."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.llama_cpp.convert import check_convertible, lacks_mtp
from common.models.model_folder import ModelFolder
from common.verify.tiny_models import write_tiny
from tests.tiny import write_family, write_tokenizer


def test_a_smollm3_with_rope_in_other_layers_is_refused(tmp_path: Path) -> None:
    for every in (4, 2):
        folder = write_tiny(tmp_path / str(every), "smollm3", {"no_rope_layer_interval": every})
        write_tokenizer(folder)
        if every == 4:
            check_convertible(folder)
        else:
            with pytest.raises(UserError, match="leaves RoPE out of every fourth layer"):
                check_convertible(folder)


def test_an_exaone_4_with_windows_is_refused_unless_it_has_64_layers(tmp_path: Path) -> None:
    for window in (None, 24):
        folder = write_tiny(tmp_path / str(window), "exaone4", {"sliding_window": window})
        write_tokenizer(folder)
        if window is None:
            check_convertible(folder)
        else:
            with pytest.raises(UserError, match="knows windows only in the model of 64 layers"):
                check_convertible(folder)


def test_an_olmo_with_biases_is_refused(tmp_path: Path) -> None:
    for biased in (False, True):
        folder = write_tiny(tmp_path / str(biased), "olmo2", {"attention_bias": biased})
        write_tokenizer(folder)
        if not biased:
            check_convertible(folder)
        else:
            with pytest.raises(UserError, match="has no biases in an OLMo's attention"):
                check_convertible(folder)


def test_which_qwen3_5_lacks_the_layers_that_predict_more(tmp_path: Path) -> None:
    folders = {family: write_family(tmp_path / family, family) for family in ("qwen3", "qwen3_5", "qwen3_5_text")}
    assert [family for family, folder in folders.items() if lacks_mtp(ModelFolder(folder))] == ["qwen3_5_text"]
