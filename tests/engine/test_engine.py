"""The engine on a tiny random model: what streams is what a plain loop without cache computes."""

import pytest
import torch

import moekit
from moekit.engine import Session
from moekit.errors import ConfigError, ContextLengthError, UnknownNameError, UnsupportedError
from tiny import byte_tokenizer, tiny_model
from tolerances import near

PROMPT = "Two roads diverged"
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(params=["moe", "dense"])
def model(request):
    return tiny_model(moe=request.param == "moe")


def plain_greedy(model, ids, count):
    """Recompute everything for every token; no cache, no chunks."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.decoder(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_cached_decode_equals_full_recompute(model):
    ids = model.tokenizer.encode(PROMPT)
    expected = plain_greedy(model, ids, 40)
    assert model.generate(PROMPT, max_new_tokens=40) == model.tokenizer.decode(expected)
    assert len(set(expected)) > 3  # a model stuck on one token would prove nothing


def test_pieces_together_are_the_text(model):
    sampling = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3}
    pieces = list(model.stream(PROMPT, **sampling))
    assert len(pieces) > 5
    assert "".join(pieces) == model.generate(PROMPT, **sampling)


@pytest.mark.parametrize("chunk", [1, 3, 7, 18, 100])
def test_any_prefill_chunk_gives_the_same_logits(model, chunk):
    ids = model.tokenizer.encode(PROMPT)
    logits_V = Session(model.decoder, chunk=chunk).read(ids)
    torch.testing.assert_close(logits_V, model(torch.tensor([ids])).logits[0, -1].detach(), **near("fp32 model"))


def test_seeds(model):
    def text(seed):
        return model.generate(PROMPT, max_new_tokens=30, temperature=1.0, seed=seed)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_stop_string_across_tokens_ends_the_text_before_it(model):
    whole = model.generate(PROMPT, max_new_tokens=40)
    stop = next(whole[i : i + 3] for i in range(8, 30) if "\N{REPLACEMENT CHARACTER}" not in whole[i : i + 3])
    text = model.generate(PROMPT, max_new_tokens=40, stop=(stop,))
    assert text == whole[: whole.find(stop)]
    assert model.last_stats.finish_reason == "stop"
    assert model.last_stats.new_tokens < 40


def test_the_end_token_ends_the_text():
    model = tiny_model()
    ids = model.tokenizer.encode(PROMPT)
    fifth = plain_greedy(model, ids, 5)[-1]
    earlier = plain_greedy(model, ids, 5).index(fifth)
    model.tokenizer.eos_ids = (fifth,)
    model.generate(PROMPT, max_new_tokens=40)
    assert model.last_stats.new_tokens == earlier
    assert model.last_stats.finish_reason == "stop"


def test_the_context_ends_the_text():
    model = tiny_model(context=24)
    model.generate(PROMPT, max_new_tokens=100)
    assert model.last_stats.finish_reason == "context"
    assert model.last_stats.prompt_tokens + model.last_stats.new_tokens == 24
    model.generate(PROMPT, max_new_tokens=5)
    assert model.last_stats.finish_reason == "length"


@pytest.mark.parametrize("length", [24, 25, 1000])
def test_a_prompt_that_leaves_no_room_names_both_numbers(length):
    with pytest.raises(ContextLengthError, match=rf"{length} tokens.* 24 "):
        tiny_model(context=24).stream("x" * length)


def test_a_session_computes_only_what_is_new_and_says_the_same(model):
    session = model.new_session()
    first = model.generate(CHAT, session=session, max_new_tokens=12)
    longer = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
    again = model.generate(longer, session=session, max_new_tokens=30)
    assert model.last_stats.reused_tokens >= len(model.tokenizer.chat(CHAT))
    assert again == model.generate(longer, max_new_tokens=30)
    assert model.last_stats.reused_tokens == 0


@pytest.mark.parametrize("changed", ["xwo roads diverged", "Two roads", "Two roads diverged in a wood", "Two rodents"])
def test_a_session_goes_back_to_the_first_token_that_differs(model, changed):
    session = model.new_session()
    model.generate(PROMPT, session=session, max_new_tokens=10)
    common = next((i for i, (a, b) in enumerate(zip(PROMPT, changed, strict=False)) if a != b), None)
    text = model.generate(changed, session=session, max_new_tokens=20)
    if common is not None:
        assert model.last_stats.reused_tokens == common
    assert text == model.generate(changed, max_new_tokens=20)


def test_an_abandoned_answer_leaves_a_session_that_works(model):
    session = model.new_session()
    stream = model.stream(PROMPT, session=session, max_new_tokens=50)
    next(stream)
    stream.close()
    assert model.last_stats.finish_reason == "cancelled"
    assert model.generate(PROMPT, session=session, max_new_tokens=20) == model.generate(PROMPT, max_new_tokens=20)


def test_stats_count_tokens_and_experts():
    model = tiny_model()
    model.generate(PROMPT, max_new_tokens=10)
    stats = model.last_stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.finish_reason) == (len(PROMPT), 10, "length")
    computed = len(PROMPT) + 9  # the tenth token is never read
    assert [sum(layer) for layer in stats.expert_counts] == [2 * computed] * 2
    ids = model.tokenizer.encode(PROMPT)
    ids += plain_greedy(model, ids, 9)
    expected = tuple(tuple(r.counts_E.tolist()) for r in model(torch.tensor([ids])).routings)
    assert stats.expert_counts == expected
    assert stats.time_to_first_token > 0
    assert stats.decode_tokens_per_second > 0


def test_mistakes_are_named_before_any_work():
    model = tiny_model(chat=False)
    with pytest.raises(ConfigError, match="temperature"):
        model.stream(PROMPT, temperature=-1.0)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        model.stream(PROMPT, temprature=1.0)
    with pytest.raises(ConfigError, match="empty"):
        model.stream("")
    with pytest.raises(UnsupportedError, match="no chat template"):
        model.stream(CHAT)


def test_what_is_saved_loads_and_says_the_same(model, tmp_path):
    model.save(tmp_path / "copy")
    copy = moekit.load(tmp_path / "copy")
    assert copy.config == model.config
    assert copy.generate(CHAT, max_new_tokens=20) == model.generate(CHAT, max_new_tokens=20)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtypes_by_name_and_by_object(dtype, tmp_path):
    tiny_model().save(tmp_path)
    model = moekit.load(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
    assert model.generate(PROMPT, max_new_tokens=5)


def test_load_refuses_what_it_does_not_have(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown dtype 'fp8'; choose from: bfloat16, float16, float32"):
        moekit.load(tmp_path, dtype="fp8")
    with pytest.raises(UnknownNameError, match="unknown format 'fp8'"):
        moekit.load(tmp_path, quant="fp8")
    for option in ({"memory": "8GB"}, {"quant": "int8", "dtype": "float32"}):
        with pytest.raises(UnsupportedError, match=next(iter(option))):
            moekit.load(tmp_path, **option)


def test_a_mock_decoder_needs_no_weights():
    """The engine asks a decoder only for logits: one that always continues the alphabet spells it."""

    class Alphabet(torch.nn.Module):
        cache_dtype = torch.float32

        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, ids, *, cache, last_only):
            cache.advance(ids.shape[1])
            logits = torch.nn.functional.one_hot(ids[:, -1:] + 1, self.config.vocab_size).float()
            return moekit.models.decoder.DecoderOutput(logits, ())

    model = moekit.Model(Alphabet(tiny_model().config), byte_tokenizer())
    assert model.generate("abc", max_new_tokens=6) == "defghi"
    assert model.generate("abc", stop=("hij",)) == "defg"
    assert "".join(model.stream("A", max_new_tokens=3)) == "BCD"
