"""A packed folder: what is written is what is loaded; files that lie, stop short or are half written are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn

import moekit
from moekit.adapt import load_packed, load_quantised, packed_formats, quantise, save_packed
from moekit.adapt.quant import replace_modules
from moekit.adapt.quant_modules import PAGE, empty_twin
from moekit.errors import FormatError, UnsupportedError
from moekit.kernels.formats import Format
from moekit.models import load_decoder, read_config
from moekit.models.decoder import Decoder
from moekit.models.weights_write import save_decoder
from tiny import tiny_config, tiny_model

MIXED = ["int8", "nf4", "int4-g64-asym", "mxfp4"]
IDS = torch.arange(20)[None]


@pytest.fixture
def packed(tmp_path):
    """(model, folder) of a tiny model with experts in four formats."""
    model = tiny_model()
    quantise(model.decoder, "int4", per_expert={0: MIXED})
    model.save(tmp_path / "packed")
    return model, tmp_path / "packed"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def header(folder: Path) -> tuple[dict, bytes]:
    data = (folder / "packed.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder: Path, values: dict, data: bytes) -> None:
    text = json.dumps(values).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    (folder / "packed.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_round_trip_is_exact(packed, tmp_path):
    model, folder = packed
    loaded = moekit.load(folder)
    assert loaded.decoder.is_packed
    assert packed_formats(loaded.decoder) == packed_formats(model.decoder)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generate("ab", max_new_tokens=8) == model.generate("ab", max_new_tokens=8)
    loaded.save(tmp_path / "again")
    for name in ("packed.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    loaded.save(folder)  # over the file that its tensors are mapped from
    assert torch.equal(logits(moekit.load(folder)), logits(model))


def test_tied_and_dense_models(tmp_path):
    config = type(tiny_config())(**{**vars(tiny_config(moe=False)), "tie_word_embeddings": True})
    decoder = Decoder(config).eval()
    quantise(decoder, "nf4", head="int4")
    save_packed(decoder, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path)(IDS).logits, decoder(IDS).logits)


def test_bytes_lie_where_one_read_gets_an_expert(packed):
    model, folder = packed
    entries, _ = header(folder)
    entries.pop("__metadata__")
    start = 8 + struct.unpack("<Q", (folder / "packed.safetensors").read_bytes()[:8])[0]
    raw = (folder / "packed.safetensors").read_bytes()
    for name in packed_formats(model.decoder):
        first, last = (start + offset for offset in entries[name]["data_offsets"])
        assert first % PAGE == 0
        assert (last - first) % PAGE == 0
    experts = model.decoder.layers[0].mlp.experts
    gate_up, down = experts.packed_expert(1)
    first = start + entries["layers.0.mlp.experts.expert_1"]["data_offsets"][0]
    bytes_ = bytes(gate_up.data.numpy()) + bytes(down.data.numpy())
    assert raw[first : first + len(bytes_)] == bytes_


def test_every_tensor_has_the_checksum_of_its_bytes(packed):
    _, folder = packed
    entries, data = header(folder)
    notes = entries.pop("__metadata__")
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        assert notes[f"{name}.xxh3"] == xxhash.xxh3_64(data[first:last]).hexdigest()


def test_an_old_folder_is_to_be_packed_again(packed):
    _, folder = packed
    values, data = header(folder)
    values["__metadata__"]["moekit.packed"] = "1"
    write(folder, values, data)
    with pytest.raises(FormatError, match=r"packed as version 1, .* pack the model again \(moekit pack MODEL OUT\)"):
        moekit.load(folder)


def test_biases_stored_in_bf16_load_again(tmp_path):
    """They come along into the packed linears, and lie in the file as float32 like all that is not packed."""
    config = dataclasses.replace(tiny_config(moe=False), attention_bias=True)
    save_decoder(Decoder(config).bfloat16(), tmp_path / "plain")
    decoder, _ = load_quantised(tmp_path / "plain", "int8")
    save_packed(decoder, tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "packed")(IDS).logits, decoder(IDS).logits)


def test_the_safetensors_package_reads_it(packed):
    safetensors = pytest.importorskip("safetensors")
    model, folder = packed
    with safetensors.safe_open(folder / "packed.safetensors", "pt") as file:
        state = model.decoder.state_dict()
        assert set(file.keys()) == {name for name, value in state.items() if isinstance(value, torch.Tensor)}
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in file.keys())  # noqa: SIM118
        assert file.metadata()["layers.0.mlp.experts.expert_1"] == "nf4"


def test_transformers_refuses_it_with_a_clear_message(packed):
    transformers = pytest.importorskip("transformers")
    _, folder = packed
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_what_needs_the_unquantised_model_says_so(packed):
    _, folder = packed
    with pytest.raises(UnsupportedError, match="packed by moekit"):
        load_decoder(folder)
    with pytest.raises(UnsupportedError, match="packed already"):
        moekit.load(folder, quant="int8")
    with pytest.raises(UnsupportedError, match="float32"):
        moekit.load(folder, dtype="bfloat16")
    assert read_config(folder) == tiny_config()
    with pytest.raises(UnsupportedError, match="not quantised"):
        save_packed(tiny_model().decoder, folder)


def test_truncation_anywhere(packed):
    _, folder = packed
    data = (folder / "packed.safetensors").read_bytes()
    for length in (0, 7, 9, 2000, PAGE, len(data) // 2, len(data) - 1):
        (folder / "packed.safetensors").write_bytes(data[:length])
        with pytest.raises(FormatError):
            load_packed(folder)


LIES = {
    "no version": lambda v: v["__metadata__"].pop("moekit.packed"),
    "another version": lambda v: v["__metadata__"].update({"moekit.packed": "9"}),
    "no checksum": lambda v: v["__metadata__"].pop("layers.1.mlp.experts.expert_3.xxh3"),
    "a short checksum": lambda v: v["__metadata__"].update({"norm.weight.xxh3": "12ab"}),
    "no format": lambda v: v["__metadata__"].pop("layers.0.attn.q_proj.data"),
    "an unknown format": lambda v: v["__metadata__"].update({"layers.0.attn.q_proj.data": "int5"}),
    "a wider format": lambda v: v["__metadata__"].update(
        {"layers.0.mlp.experts.expert_0": "nf4", "embed.data": "int4"}
    ),
    "a tensor of another name": lambda v: v.update({"norm.bias": v.pop("norm.weight")}),
    "another dtype": lambda v: v["norm.weight"].update({"dtype": "I32"}),
    "another shape": lambda v: v["norm.weight"].update({"shape": [2, 16]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(packed, lie):
    _, folder = packed
    values, data = header(folder)
    LIES[lie](values)
    write(folder, values, data)
    with pytest.raises(FormatError):
        load_packed(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_local_experts", 10**9), ("num_hidden_layers", 9000), ("vocab_size", 2**30), ("intermediate_size", 64)],
)
def test_configurations_that_lie(packed, key, value):
    _, folder = packed
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(FormatError):
        load_packed(folder)


def test_a_file_that_is_not_aligned(packed):
    _, folder = packed
    values, data = header(folder)
    text = json.dumps(values).encode()
    (folder / "packed.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(FormatError, match="page"):
        load_packed(folder)


def test_formats_of_equal_size_are_told_apart(packed):
    """int4-g32 and int4-g64-asym both take 4.5 bits: only the header's note tells them apart."""
    sizes = {Format.parse(each).matrix_bytes(32, 128) for each in ("int4-g32", "int4-g64-asym")}
    assert len(sizes) == 1
    _, folder = packed
    assert packed_formats(load_packed(folder))["layers.0.mlp.experts.expert_2"] == "int4-g64-asym"


def test_a_plain_save_over_a_packed_folder_and_back(packed):
    model, folder = packed
    plain = tiny_model()
    plain.save(folder)
    assert not moekit.load(folder).decoder.is_packed
    model.save(folder)
    assert torch.equal(logits(moekit.load(folder)), logits(model))


KILLED = """
import os, sys, torch
from moekit.adapt import quantise, save_packed
from moekit.models import safetensors_file
sys.path.insert(0, {tests!r})
from tiny import tiny_model
torch.manual_seed(1)
model = tiny_model()
quantise(model.decoder, "int8")
writes = 0
real = safetensors_file._bytes
def dying(tensor):
    global writes
    writes += 1
    if writes == 5:
        os.kill(os.getpid(), 9)
    return real(tensor)
safetensors_file._bytes = dying
model.save({folder!r})
"""


def test_killed_while_writing(packed):
    model, folder = packed
    code = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert result.returncode == -signal.SIGKILL
    assert torch.equal(logits(moekit.load(folder)), logits(model))
    fresh = folder.parent / "fresh"
    subprocess.run([sys.executable, "-c", code.replace(str(folder), str(fresh))], check=False, capture_output=True)
    assert not fresh.exists()


RSS = """
import os, sys
import moekit.engine.engine
from moekit.adapt import load_packed
load_packed({small!r})
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = high()
decoder = load_packed({big!r})
print(high() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_loading_holds_the_file_and_little_more(packed, tmp_path):
    _, small = packed
    moe = type(tiny_config().moe)(hidden_size=512, intermediate_size=512, num_experts=64, top_k=2)
    config = type(tiny_config())(**{**vars(tiny_config()), "hidden_size": 512, "moe": moe})
    big = Decoder(config)
    formats = [Format.parse("int4")]
    twins = {part: empty_twin(part, formats) for part in big.modules() if isinstance(part, nn.Linear | nn.Embedding)}
    twins |= {block.mlp.experts: empty_twin(block.mlp.experts, 64 * formats) for block in big.layers}
    replace_modules(big, twins)
    save_packed(big, tmp_path / "big")
    size = (tmp_path / "big" / "packed.safetensors").stat().st_size
    code = RSS.format(small=str(small), big=str(tmp_path / "big"))
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert size > 50e6
    assert int(result.stdout) * 1024 < size + 20e6
