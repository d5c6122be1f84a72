"""Freed memory is kept while training and given back afterwards: counted in page faults, not in seconds."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# A process of its own, whose heap has no room left over from other tests.
PROGRAM = """
import json, resource, torch
from moekit.train.memory import freed_memory_kept

BYTES, TIMES = 64 << 20, 8

def faults():
    torch.ones(BYTES, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.ones(BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before, outside = resident(), faults()
try:
    with freed_memory_kept():
        inside, held = faults(), resident()
        raise ZeroDivisionError
except ZeroDivisionError:
    after = resident()
pages = TIMES * BYTES // resource.getpagesize()
print(json.dumps({"outside": outside / pages, "inside": inside / pages,
                  "held": (held - before) / BYTES, "after": (after - before) / BYTES}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_blocks_are_used_again_inside_and_given_back_at_the_end_also_after_an_error():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["outside"] > 0.9
    assert measured["inside"] < 0.3  # none, but for the block or two by which the heap may grow first
    assert measured["held"] > 0.5
    assert measured["after"] < 0.5
