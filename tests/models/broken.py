"""Ways to break the bytes of a file, for hypothesis."""

from __future__ import annotations

import time

from hypothesis import strategies as st

from moekit.errors import MoekitError


def mutations(data: bytes, header: int):
    """`data` with up to four bytes of its first `header` replaced, or cut short, or with 8 of them overwritten."""
    byte = st.tuples(st.integers(0, header - 1), st.integers(0, 255))
    flips = st.lists(byte, min_size=1, max_size=4).map(lambda edits: _flip(data, edits))
    cuts = st.integers(0, len(data) - 1).map(lambda end: data[:end])
    numbers = st.sampled_from([0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
    lies = st.tuples(st.integers(0, header - 8), numbers).map(
        lambda edit: data[: edit[0]] + edit[1].to_bytes(8, "little") + data[edit[0] + 8 :]
    )
    return st.one_of(flips, cuts, lies)


def _flip(data, edits):
    changed = bytearray(data)
    for at, value in edits:
        changed[at] = value
    return bytes(changed)


def survives(load):
    """Run `load`: it must end well or in an error of ours of one line, within a second of the processor."""
    start, message = time.process_time(), ""
    try:
        load()
    except MoekitError as error:
        message = str(error)
    assert "\n" not in message
    assert time.process_time() - start < 1.0
