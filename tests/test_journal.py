"""The journal of rows: whole after a cut at any byte, and written by one process at a time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizers_vis.eval.journal import Array, Journal, Stored, read_rows


@given(cut=st.integers(0, 10**4), of_array=st.booleans(), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_journal_cut_anywhere_is_whole_again(cut: int, of_array: bool, sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        arrays = {"x": Array(2)}
        rows = [{"i": i, "said": "ü" * i} for i in range(sum(sizes))]
        values = np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2)
        with Journal(path, arrays) as journal:
            start = 0
            for size in sizes:
                journal.append(rows[start : start + size], {"x": values[start : start + size]})
                start += size
        victim = path.with_name("a.x") if of_array else path
        os.truncate(victim, cut % (victim.stat().st_size + 1))
        with Journal(path, arrays):
            pass
        kept = list(read_rows(Path(folder)))
        assert [row["i"] for row in kept] == list(range(len(kept)))  # a beginning, and every row of it whole
        with Journal(path, arrays) as journal:
            journal.append(rows[len(kept) :], {"x": values[len(kept) :]})
        again = list(read_rows(Path(folder)))
        assert [{key: row[key] for key in ("i", "said")} for row in again] == rows
        stored = Stored(Path(folder), "x", arrays["x"])
        assert stored.numbers == list(range(len(rows))) and np.array_equal(stored.at(stored.numbers), values)


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no locks of that kind")
    with Journal(tmp_path / "a.jsonl", {}) as journal:
        journal.append([{"i": 0, "bad": float("nan")}])
        with pytest.raises(ValueError, match="is being written by another process"):
            Journal(tmp_path / "a.jsonl", {})
    with Journal(tmp_path / "a.jsonl", {}):
        assert list(read_rows(tmp_path)) == [{"i": 0, "bad": None}]
