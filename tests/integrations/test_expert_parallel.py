"""transformers' expert parallelism over two processes, each running its experts on "moekit"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integrations.families import build
from moekit.integrations.transformers import expert_modules
from tolerances import rel

TESTS = Path(__file__).parents[1]


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_two_processes_equal_one(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    worker = TESTS / "integrations" / "expert_parallel_worker.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, worker, type(model).__name__, tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["all_reduce", "all_to_all"]
    assert all(float(error) <= rel("fp32 twin") for line in lines for error in line[1:]), done.stdout


def test_eager_of_gpt_oss_does_not_know_experts_of_other_processes():
    """Of transformers: its loop makes room for E ids, not E + 1, so that exchange by all-reduce fails on eager."""
    experts = next(iter(expert_modules(build("gpt_oss")).values()))
    inputs = (torch.randn(2, 32), torch.tensor([[0, 4], [1, 4]]), torch.rand(2, 2))
    experts.config._experts_implementation = "eager"
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        experts(*inputs)
    experts.config._experts_implementation = "moekit"
    assert experts(*inputs).isfinite().all()
