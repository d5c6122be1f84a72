"""Every training test runs on one thread, on a corpus of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_training import tiny_data

from moekit.train import TrainingData


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    return tiny_data(tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in parallel depend on the number of threads; one makes them the same on every machine of one kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
