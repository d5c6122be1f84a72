"""The store: it knows where every expert is, believes no header that lies, and notices when the file changes."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch

from moekit.adapt import quantise
from moekit.adapt.store import Store
from moekit.errors import ConfigError, FileError, FormatError
from tiny import tiny_model
from tiny_store import FORMATS, PAGE, expert_name, write_store


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path)
    return Store(tmp_path)


def test_extents_are_where_the_bytes_are(tmp_path):
    contents = write_store(tmp_path)
    store = Store(tmp_path)
    raw = store.path.read_bytes()
    assert store.extents.keys() == contents.keys()
    for key, extent in store.extents.items():
        assert raw[extent.start : extent.start + extent.nbytes] == contents[key]
        assert extent.start % PAGE == extent.nbytes % PAGE == 0
        assert str(extent.format).startswith(FORMATS[key[1] % 3])
    assert store.largest == 3 * PAGE
    assert torch.equal(store.read("norm.weight"), torch.linspace(0, 1, 7))
    assert bytes(store.read(expert_name((1, 2))).numpy()) == contents[1, 2]
    assert Store(store.path).extents == store.extents


def test_a_packed_model(tmp_path):
    model = tiny_model()
    quantise(model.decoder, "int4", per_expert={0: ["int8", "nf4", "int4-g64-asym", "mxfp4"]})
    model.save(tmp_path)
    store, raw = Store(tmp_path), (tmp_path / "packed.safetensors").read_bytes()
    assert sorted(store.extents) == [(layer, expert) for layer in range(2) for expert in range(4)]
    for (layer, expert), extent in store.extents.items():
        experts = model.decoder.layers[layer].mlp.experts
        data = experts.get_buffer(f"expert_{expert}")
        assert raw[extent.start : extent.start + extent.nbytes] == bytes(data.numpy())
        assert extent.format == experts.formats[expert]
    assert torch.equal(store.read("norm.weight"), model.decoder.norm.weight)


def test_identity_is_that_of_the_experts(tmp_path):
    for number, seed in enumerate((0, 0, 1)):
        write_store(tmp_path / str(number), seed=seed)
    first, same, other = (Store(tmp_path / str(number)).identity for number in range(3))
    assert first == same != other


def relabel(store: Store, change) -> None:
    """Rewrite the header after `change`; the data stay where they are."""
    data = store.path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    store.path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NAME = expert_name((1, 2))
LIES = {
    "version 1": (lambda v: v["__metadata__"].update({"moekit.packed": "1"}), "version"),
    "no format": (lambda v: v["__metadata__"].pop(NAME), NAME),
    "an unknown format": (lambda v: v["__metadata__"].update({NAME: "int5"}), NAME),
    "no checksum": (lambda v: v["__metadata__"].pop(NAME + ".xxh3"), NAME),
    "half a checksum": (lambda v: v["__metadata__"].update({NAME + ".xxh3": "0123"}), NAME),
    "not bytes": (lambda v: v[NAME].update({"dtype": "I8"}), NAME),
    "no experts": (lambda v: [v.update({k[7:]: v.pop(k)}) for k in list(v) if "mlp" in k], "no experts"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(store, lie):
    change, message = LIES[lie]
    relabel(store, change)
    with pytest.raises(FormatError, match=message):
        Store(store.path)


def test_an_expert_that_is_not_aligned(store):
    data = store.path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip()
    store.path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(FormatError, match="page"):
        Store(store.path)


def test_missing_folder_and_missing_expert(store, tmp_path):
    with pytest.raises(FileError, match="No such file"):
        Store(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no layer 7, expert 1"):
        store.extent((7, 1))


def test_truncation_anywhere(store):
    data = store.path.read_bytes()
    for length in (0, 7, 2000, PAGE, len(data) // 2, len(data) - 1):
        store.path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            Store(store.path)


def test_a_file_that_changes_while_in_use(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copyfile(store.path, copy)
    os.replace(copy, store.path)
    for read in (store.check, store.open_direct, lambda: store.read("norm.weight")):
        with pytest.raises(FormatError, match="replaced"):
            read()
    store = Store(store.path)
    os.truncate(store.path, 3 * PAGE)
    with pytest.raises(FormatError, match="cut to"):
        store.read("norm.weight")
    store.path.unlink()
    with pytest.raises(FileError, match="No such file"):
        store.check()


def test_a_damaged_tensor_that_is_no_expert(tmp_path):
    write_store(tmp_path)
    relabel(Store(tmp_path), lambda v: v["__metadata__"].update({"norm.weight.xxh3": 16 * "0"}))
    with pytest.raises(FormatError, match=r"norm\.weight"):
        Store(tmp_path).read("norm.weight")
    assert len(Store(tmp_path, verify=False).read("norm.weight")) == 7


def test_descriptors_are_closed(tmp_path):
    write_store(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Store(tmp_path).close()
        Store(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
