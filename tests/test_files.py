"""Files that are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from sat.files import read_state, save_state, written_whole


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Neither two threads, nor two machines on which a process has the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "state.pt"
    with written_whole(path) as first, written_whole(path) as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # the last to be done
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_readers_see_no_half_files(tmp_path):
    path = tmp_path / "state.pt"
    save_state({"x": torch.zeros(1000)}, path)

    def write(value: int) -> None:
        for _ in range(20):
            save_state({"x": torch.full((1000,), float(value))}, path)

    with ThreadPoolExecutor(2) as threads:
        writing = [threads.submit(write, value) for value in (1, 2)]
        while not all(future.done() for future in writing):
            values = read_state(path)["x"]
            assert (values == values[0]).all()
        for future in writing:
            future.result()
