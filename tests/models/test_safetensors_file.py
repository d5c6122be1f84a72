"""Safetensors files: read and written as the safetensors library does, and not believed when they lie."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest
import torch
from broken import mutations, survives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moekit.errors import FileError, FormatError
from moekit.models import SafetensorsFile, write_safetensors

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "byte": torch.tensor([[1], [2], [3]], dtype=torch.uint8),
    "none": torch.zeros(0, 4),
    "scalar": torch.tensor(3.0),
}


def make(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        assert torch.equal(actual[name], expected[name])


def test_reads_what_the_library_writes(tmp_path, poisoned):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    same({name: file.read(name) for name in file.tensors}, TENSORS)
    assert file.metadata == {"format": "pt"}


def test_the_library_reads_what_we_write(tmp_path):
    views = {**TENSORS, "view": TENSORS["a"][1:, :2], "turned": TENSORS["a"].T, "again": TENSORS["a"]}
    write_safetensors(tmp_path / "a.safetensors", views, metadata={"format": "pt"})
    same(load_file(tmp_path / "a.safetensors"), views)
    write_safetensors(tmp_path / "b.safetensors", {"a": TENSORS["a"]}, dtype=torch.float16)
    same(load_file(tmp_path / "b.safetensors"), {"a": TENSORS["a"].half()})


def test_every_tensor_is_aligned_to_its_own_items(tmp_path):
    write_safetensors(tmp_path / "a", {"byte": TENSORS["byte"], "wide": TENSORS["wide"]})
    assert SafetensorsFile(tmp_path / "a").tensors["wide"].start % 8 == 0


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{", b"", "is not valid JSON"),
        (b"\xff\xfe", b"", "is not valid JSON"),
        (b"[]", b"", "must hold a JSON object"),
        ({"x": 3}, b"", "tensor 'x' has a malformed entry"),
        ({"x": {"dtype": "F32"}}, b"", "tensor 'x' has a malformed entry"),
        ({"x": entry("F31")}, bytes(8), "tensor 'x' has the unknown dtype 'F31'"),
        ({"x": entry(["F32"])}, bytes(8), "tensor 'x' has the unknown dtype"),
        ({"x": entry(shape=(2.0,))}, bytes(8), "tensor 'x' has the malformed shape"),
        ({"x": entry(shape=(-2,))}, bytes(8), "tensor 'x' has the malformed shape"),
        ({"x": entry(shape=(1,) * 99)}, bytes(8), "tensor 'x' has the malformed shape"),
        ({"x": entry(offsets=(8, 0))}, bytes(8), "tensor 'x' has malformed offsets"),
        ({"x": entry(offsets=(0, 8, 8))}, bytes(8), "tensor 'x' has malformed offsets"),
        ({"x": entry(shape=(3,))}, bytes(8), "tensor 'x' of shape .3. in F32 needs 12 bytes, but its offsets span 8"),
        ({"x": entry(shape=(2**62, 2**62))}, bytes(8), "tensor 'x' of shape"),
        ({"x": entry()}, bytes(7), "tensor 'x' ends at byte .* truncated"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "tensor 'y' overlaps"),
        ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "tensor 'y' leaves a hole"),
        ({"x": entry(offsets=(4, 12))}, bytes(12), "tensor 'x' leaves a hole"),
        ({"x": entry()}, bytes(9), "1 bytes follow the last tensor"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map text to text"),
        (b'{"x": 1, "x": 2}', b"", "the name 'x' occurs twice"),
    ],
)
def test_every_lie_is_one_line_that_names_file_and_tensor(tmp_path, header, data, words):
    make(tmp_path / "a.safetensors", header, data)
    with pytest.raises(FormatError, match=rf"a\.safetensors.*{words}") as caught:
        SafetensorsFile(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [99, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path, length):
    make(tmp_path / "a.safetensors", b"{}", length=length)
    with pytest.raises(FormatError, match=f"claims a header of {length} bytes"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_header_over_100_megabytes(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(FormatError, match="claims a header of 100000001 bytes"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_missing_empty_and_shrunk_files(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*gone"):
        SafetensorsFile(tmp_path / "gone")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FormatError, match="too short"):
        SafetensorsFile(tmp_path / "empty")
    write_safetensors(tmp_path / "a", {"x": torch.ones(4)})
    file = SafetensorsFile(tmp_path / "a")
    with pytest.raises(FormatError, match="has no tensor 'y'"):
        file.read("y")
    os.truncate(tmp_path / "a", os.path.getsize(tmp_path / "a") - 1)
    with pytest.raises(FormatError, match="ends inside tensor 'x'"):
        file.read("x")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="the disk is full"):
        write_safetensors(tmp_path / "a", TENSORS)
    assert list(tmp_path.iterdir()) == []


SMALL = {"x": torch.ones(2, 3), "y": torch.zeros(4, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    save_file(SMALL, folder / "valid", metadata={"format": "pt"})
    return folder / "valid"


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_one_of_our_errors(valid, data):
    original = valid.read_bytes()
    broken = valid.with_name("broken")
    broken.write_bytes(data.draw(mutations(original, len(original) - 32)))

    def load():
        file = SafetensorsFile(broken)
        for name in file.tensors:
            file.read(name)

    survives(load)
