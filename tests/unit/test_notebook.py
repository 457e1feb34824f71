"""The notebook as it is committed: no output, cells that are valid, commands and flags that exist."""

import ast
import json
import re

from tests import ROOT
from tests.unit.test_docs import help_of

NOTEBOOK = json.loads((ROOT / "notebooks" / "twintune.ipynb").read_text(encoding="utf-8"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}


def test_it_has_few_cells_and_no_output() -> None:
    assert list(CODE) == ["install", "rows", "train", "report", "download"]
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_every_cell_is_python_of_a_notebook() -> None:
    from IPython.core.inputtransformer2 import TransformerManager

    for name, source in CODE.items():
        ast.parse(TransformerManager().transform_cell(source), name)


def test_its_commands_and_flags_exist() -> None:
    lines = [line for source in CODE.values() for line in source.splitlines() if line.startswith("!")]
    found = [(line.split()[1], re.findall(r" (--[a-z-]+)", line)) for line in lines]
    assert [name for name, _ in found] == ["check-data", "train"]
    for name, flags in found:
        assert [flag for flag in flags if flag not in help_of(name)] == []


def test_it_names_no_address_that_may_not_exist() -> None:
    assert not re.search(r"https?://|github\.com/", json.dumps(NOTEBOOK))
