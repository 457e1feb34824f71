"""The rows of a Parquet file, and of a data set on the hub, which are read through Arrow."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from common.data.row_source import NumberedRows, Position
from common.errors import UserError, first_line

_READ = 1 << 20  # bytes of a column at a time; without it the whole file is read into memory
_TOGETHER, _TOGETHER_BYTES = 1000, 1 << 20  # rows of Arrow that become Python objects at once


def parquet_rows(path: Path, position: Position) -> NumberedRows:
    from pyarrow.parquet import ParquetFile

    number = 0
    with closing(_arrow(path, partial(ParquetFile, path, pre_buffer=False, buffer_size=_READ))) as file:
        about = _arrow(path, lambda: file.metadata)
        size = sum(_arrow(path, about.row_group, at).total_byte_size for at in range(about.num_row_groups))
        position.share = lambda: number / max(1, about.num_rows)
        batches = _arrow(path, file.iter_batches, _together(about.num_rows, size))
        while (batch := _arrow(path, next, batches, None)) is not None:
            for row in _arrow(path, batch.to_pylist):
                number += 1
                yield number, _as_json(row)


def hub_rows(rows: Any, position: Position) -> NumberedRows:
    """The rows of a split. Columns that nobody reads, such as pictures, are not decoded."""
    number, count = 0, max(1, len(rows))
    position.share = lambda: number / count
    for table in rows.with_format("arrow").iter(batch_size=_together(rows.data.num_rows, rows.data.nbytes)):
        for row in table.to_pylist():
            number += 1
            yield number, _as_json(row)


def _together(rows: int, size: int) -> int:
    """How many of so many rows, of so many bytes in all, become Python objects at once."""
    return max(1, min(_TOGETHER, _TOGETHER_BYTES * rows // max(1, size)))


def _arrow(path: Path, call: Callable[..., Any], *given: Any) -> Any:
    """What `call` gives. Raises UserError where the file is damaged, or is none."""
    try:
        return call(*given)
    except FileNotFoundError:
        raise UserError(f"--data {path}: no such file.", "Check the path.") from None
    except Exception as error:  # its own, the system's, memory for sizes that the file only claims, no UTF-8 in a text
        raise UserError(
            f"{path} cannot be read as Parquet: {first_line(error)}", "Fetch or write the file again."
        ) from None


def _as_json(value: Any) -> Any:
    """`value` of Arrow without keys that hold None, since every struct has the keys of all of them, and without bytes.

    Bytes, such as those of a picture, become empty: no row is made of them.
    """
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_as_json(part) for part in value]
    return b"" if isinstance(value, bytes) else value
