"""Freed memory is kept while training and given back afterwards: counted in page faults, not in seconds."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from moekit.train.memory import freed_memory_kept

BYTES = 64 << 20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def faults(times: int = 8) -> int:
    """Page faults of allocating, touching and freeing one large block again and again."""
    torch.ones(BYTES, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_blocks_are_used_again_inside_and_given_back_outside():
    with freed_memory_kept():
        inside = faults()
    outside = faults()
    pages = 8 * BYTES // resource.getpagesize()
    assert inside <= pages / 4  # the heap may grow by a block or two before it serves them all
    assert outside > pages / 2


def test_settings_are_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        raise ZeroDivisionError
    assert faults(2) > BYTES // resource.getpagesize()
