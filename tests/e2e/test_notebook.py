"""The notebook in a real kernel, on the CPU: installed already, with a tiny model in place of SmolLM2."""

import json
import sys
from pathlib import Path

import pytest

from common.llama_cpp.build import ensure
from tests import ROOT
from tests.tiny import write_convertible, write_rows


@pytest.mark.long
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this finds that the cells fit each other: names, folders, the page and the GGUF that is handed out."""
    import nbformat
    from nbclient import NotebookClient

    vocabulary = ensure(None, lambda share, text: None).converter.parent / "models" / "ggml-vocab-gpt-2.gguf"
    write_convertible(tmp_path / "model", vocabulary)
    write_rows(tmp_path / "my.jsonl", 40)
    notebook = nbformat.read(ROOT / "notebooks" / "twintune.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.get("id") != "install"]
    for cell in notebook.cells:
        cell.source = (
            cell.source.replace("!twintune", f"!{sys.executable} {ROOT / 'cli.py'}")
            .replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model")
            .replace('MORE = ""', 'MORE = "--steps 4 --device cpu --backend torch"')
        )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    by_name = {cell.id: json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    assert "messages, 40 rows" in by_name["rows"]
    assert "The run is in run" in by_name["train"]
    assert "<iframe srcdoc=" in by_name["report"]
    assert "run/gguf/model-Q4_K_M.gguf: " in by_name["download"]
    assert "href" in by_name["download"]
