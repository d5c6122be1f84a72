"""Hostile files end in errors of ours: `fuzz.py` in a process of its own, whose memory and time are bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def fuzz(folder, cases, seed):
    run = subprocess.run(
        [sys.executable, HERE / "fuzz.py", folder, str(cases), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60 + cases / 10,
        check=True,
    )
    return json.loads(run.stdout)


def check(figures):
    assert figures["problems"] == []
    assert figures["slowest_seconds"] < 1
    assert figures["peak_rss_above_start_mb"] < 200
    assert {"loaded", "FormatError", "UnsafeFileError"} <= figures["endings"].keys()
    assert figures["endings"]["FormatError"] > figures["cases"] / 2


def test_hundreds(tmp_path):
    check(fuzz(tmp_path, 300, 3))


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_ten_thousand(tmp_path, capsys):
    figures = fuzz(tmp_path, 10_000, 1)
    with capsys.disabled():
        print(json.dumps(figures))
    check(figures)
