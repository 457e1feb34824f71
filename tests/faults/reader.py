"""What is fuzzed: a folder of good files, and what is done with it once some of them are changed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from common.errors import UserError

Case = dict[str, bytes | None]  # contents by relative path; None: there is no such file


@dataclass(frozen=True)
class Reader:
    """`read` ends or raises UserError, whatever the case."""

    folder: Path
    good: dict[str, bytes]  # what stands in the folder, as far as a case may change it
    read: Callable[[Case], None]
    cases: st.SearchStrategy[Case]
    limit: float = 10  # seconds after which a case counts as hanging

    def write(self, files: Case) -> None:
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)


def each(*steps: Callable[[], object]) -> None:
    """Take every step, whether or not those before were refused; the first UserError is raised at the end."""
    refusals = []
    for step in steps:
        try:
            step()
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
