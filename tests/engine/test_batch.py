"""A list of prompts: each gets exactly what it gets alone."""

import pytest
import torch

import moekit
from moekit.errors import ConfigError, ContextLengthError
from tiny import tiny_model

TEXT = "Two roads diverged in a yellow wood, and sorry I could not travel both and be one traveller"
# Sixteen of uneven length, twice the same, in no order.
SIZES = (1, 60, 2, 9, 33, 4, 4, 75, 17, 1, 50, 23, 8, 3, 41, 12)
PROMPTS = [TEXT[start : start + size] for start, size in enumerate(SIZES)]
SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 1.2, "seed": 5, "top_p": 0.95},
    "every setting": {
        "temperature": 0.9,
        "seed": 6,
        "top_k": 60,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "stop": ("a", "Q!"),
    },
}


@pytest.fixture(scope="module", params=["moe", "dense", "moe bf16"])
def model(request):
    torch.manual_seed(0)
    made = tiny_model(moe=request.param != "dense", endless=False)
    return moekit.Model(made.decoder.bfloat16(), made.tokenizer) if "bf16" in request.param else made


def without_times(completion):
    stats = completion.stats
    counted = (stats.prompt_tokens, stats.new_tokens, stats.finish_reason, stats.expert_counts)
    return completion.text, completion.token_ids, completion.logprobs, counted


@pytest.mark.parametrize("sampling", SAMPLING)
def test_sixteen_uneven_prompts_equal_one_by_one_to_the_last_bit(model, sampling):
    options = {"max_new_tokens": 50, "logprobs": 2, **SAMPLING[sampling]}
    together = model.complete(PROMPTS, **options)
    assert [without_times(each) for each in together] == [
        without_times(model.complete(each, **options)) for each in PROMPTS
    ]
    assert len({each.text for each in together}) > 10


def test_sequences_that_end_make_room_for_the_next(model):
    """Whatever the number at a time, and some end early by a stop string."""
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 2, "stop": tuple("aei")}
    wanted = [model.generate(each, **options) for each in PROMPTS]
    for size in (1, 2, 5, 16, 100):
        assert model.generate(PROMPTS, batch_size=size, **options) == wanted
    assert len({len(each) for each in wanted}) > 2


def test_no_more_than_batch_size_are_in_memory(monkeypatch):
    model, sizes = tiny_model(), []
    together = model.decoder.forward_each
    monkeypatch.setattr(
        model.decoder, "forward_each", lambda t, caches: sizes.append(len(caches)) or together(t, caches)
    )
    model.generate(PROMPTS, batch_size=3, max_new_tokens=8)
    assert max(sizes) == 3
    # The first token of each comes from its prompt, and the sixteenth prompt goes alone, without `forward_each`.
    assert sum(sizes) == 15 * 7


def test_chats_and_their_tools():
    model = tiny_model()
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Hello there")]
    assert model.generate(chats, max_new_tokens=9) == [model.generate(each, max_new_tokens=9) for each in chats]
    assert model.generate([chats[0], "Hi"], max_new_tokens=3) == [
        model.generate(chats[0], max_new_tokens=3),
        model.generate("Hi", max_new_tokens=3),
    ]


def test_a_list_gives_a_list():
    model = tiny_model()
    assert model.generate([], max_new_tokens=3) == []
    assert model.generate(["Hi"], max_new_tokens=3) == [model.generate("Hi", max_new_tokens=3)]
    assert model.generate(("Hi",), max_new_tokens=3) == [model.generate("Hi", max_new_tokens=3)]


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        (["Hi", ""], ConfigError, r"prompts\[1\]: the prompt is empty"),
        (["Hi", "x" * 24], ContextLengthError, r"prompts\[1\]: the prompt has 24 tokens.* 24 "),
        (["Hi", 3], ConfigError, r"prompts\[1\]: a prompt is text or a list of messages, not 3"),
        (["Hi", ["x"]], ConfigError, r"prompts\[1\]: every message needs a role"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_runs(prompts, error, words, monkeypatch):
    model = tiny_model(context=24)
    monkeypatch.setattr(model.decoder, "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(error, match=words):
        model.generate(prompts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"session": True}, "a session is for one prompt"),
        ({"logprobs": -1}, "logprobs must lie between 0"),
        ({"tools": [{}]}, "tools are for chat messages"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_bad_options_are_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny_model().generate(["Hi"], **options)
