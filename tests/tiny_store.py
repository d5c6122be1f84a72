"""A packed file of random experts, for tests of the store and all that reads from it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
import xxhash

from moekit.adapt.store import Key, Store
from moekit.models.safetensors_file import SafetensorsWriter

PAGE = 4096
FORMATS = ["int4-g32", "int8-g64", "nf4"]


def expert_name(key: Key) -> str:
    return f"layers.{key[0]}.mlp.experts.expert_{key[1]}"


def write_store(folder: Path, layers: int = 3, experts: int = 8, pages: int = 1, *, seed: int = 0) -> dict[Key, bytes]:
    """Write packed.safetensors to `folder`, experts of `pages` pages and up to two more; returns their bytes."""
    make = torch.Generator().manual_seed(seed)
    keys = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    tensors, notes = {}, {"moekit.packed": "2"}
    for key in keys:
        name, size = expert_name(key), PAGE * (pages + sum(key) % 3)
        tensors[name] = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=make)
        notes[name] = FORMATS[key[1] % 3]
        notes[name + ".xxh3"] = xxhash.xxh3_64_hexdigest(tensors[name].numpy())
    contents = {key: bytes(tensors[expert_name(key)].numpy()) for key in keys}
    tensors["norm.weight"] = torch.linspace(0, 1, 7)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(folder / "packed.safetensors", shapes, notes, align=PAGE) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
        file.finish(notes)
    return contents


def flip(store: Store, key: Key, at: int = 100) -> None:
    """Damage one byte of an expert, without a trace in the file's times."""
    times = store.path.stat()
    with store.path.open("r+b") as file:
        file.seek(store.extents[key].start + at)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    os.utime(store.path, ns=(times.st_atime_ns, times.st_mtime_ns))


def without_direct(monkeypatch):
    """os.open as on a file system that knows no O_DIRECT."""
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
