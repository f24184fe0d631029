"""The rows of a benchmark as two files that anything reads: images.jsonl, and instances.jsonl of words and faces.

Where pyarrow is installed they are written as Parquet too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers_vis.eval.benchmark import folder_of
from tokenizers_vis.eval.journal import PLACE, Row, read_rows
from tokenizers_vis.files import write_atomically

IMAGES, INSTANCES = "images", "instances"
_GROUP = 10_000  # rows of a Parquet row group


def write_rows(out: Path, suites: Sequence[str], labels: Sequence[str]) -> list[Path]:
    """Puts the rows of all suites, methods and shards together, in this order and that of the pictures.

    A row has suite, method, i and image, and what was measured; an instance what was found of one word or face. Files
    of the same rows are the same, however many processes measured them.
    """
    written = []
    for name, rows in ((IMAGES, _image_rows), (INSTANCES, _instance_rows)):
        path = out / f"{name}.jsonl"
        if not any(True for _ in rows(out, suites, labels)):
            continue
        write_atomically(path, lambda aside, rows=rows: _write_lines(aside, rows(out, suites, labels)))
        written.append(path)
        if importlib.util.find_spec("pyarrow"):
            parquet = path.with_suffix(".parquet")
            write_atomically(parquet, lambda aside, path=path: _write_parquet(aside, path))
            written.append(parquet)
    return written


def _ordered(out: Path, suites: Sequence[str], labels: Sequence[str]) -> Iterator[tuple[str, str, Row]]:
    for suite in suites:
        for label in labels:
            for row in sorted(read_rows(folder_of(out, suite, label)), key=lambda row: row["i"]):
                yield suite, label, row


def _image_rows(out: Path, suites: Sequence[str], labels: Sequence[str]) -> Iterator[Row]:
    for suite, label, row in _ordered(out, suites, labels):
        own = {key: value for key, value in row.items() if key not in (PLACE, "instances")}
        yield {"suite": suite, "method": label, **own}


def _instance_rows(out: Path, suites: Sequence[str], labels: Sequence[str]) -> Iterator[Row]:
    for suite, label, row in _ordered(out, suites, labels):
        for one in row.get("instances", ()):
            yield {"suite": suite, "method": label, **one}


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, lines: Path) -> None:
    """Lists and objects, which differ from row to row, become JSON texts."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds: dict[str, type] = {}
    for row in _read(lines):
        for key, value in row.items():
            if value is not None and (kinds.get(key), type(value)) != (float, int):
                kinds[key] = type(value) if isinstance(value, (bool, int, float)) else str
            else:
                kinds.setdefault(key, kinds.get(key, type(None)))
    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), type(None): pa.null()}
    schema = pa.schema([(key, types[kind]) for key, kind in kinds.items()])
    rows = _read(lines)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := [{key: _flat(row.get(key)) for key in kinds} for row in islice(rows, _GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _read(lines: Path) -> Iterator[Row]:
    with lines.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
