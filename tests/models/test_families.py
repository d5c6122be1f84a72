"""The contract of every family: configuration, logits, gradients and files of a tiny model of transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from plain_models import PlainModel
from safetensors.torch import load_file
from torch.nn import functional as F
from twins import FAMILIES, tokens, write

from moekit.models import KVCache, load_decoder, read_config, save_decoder, write_config
from moekit.plan import parameters
from tolerances import near

# Written as what they mean: a sparse step as the layers it leaves dense, a default as itself.
SAID_OTHERWISE = {
    "_name_or_path",
    "architectures",
    "decoder_sparse_step",
    "dtype",
    "head_dim",
    "max_window_layers",
    "mlp_only_layers",
    "n_inner",
}


@pytest.fixture(params=FAMILIES)
def theirs(request, tmp_path):
    """transformers' model, whose files are in tmp_path/theirs."""
    return write(request.param, tmp_path / "theirs")


def close(actual, expected, name="logits", what="fp32 twin"):
    torch.testing.assert_close(actual, expected, **near(what), msg=lambda message: f"{name}: {message}")


def token_by_token(decoder, ids):
    cache = KVCache(decoder.config, batch=len(ids), capacity=4)
    return torch.cat([decoder(piece, cache=cache).logits for piece in ids.split(1, dim=1)], dim=1)


def reload(model, folder):
    if isinstance(model, PlainModel):
        return model.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def config_in(model, folder):
    """What config.json says, with transformers' defaults for what it leaves out."""
    if isinstance(model, PlainModel):
        values = json.loads((folder / "config.json").read_text())
        return {name: values[name] for name in model.values}
    return transformers.AutoConfig.from_pretrained(folder).to_dict()


def files(folder):
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def test_logits_in_one_pass_and_token_by_token(theirs, tmp_path):
    ours, ids = load_decoder(tmp_path / "theirs"), tokens(2, 13)
    expected = theirs(ids).logits
    close(ours(ids).logits, expected)
    close(token_by_token(ours, ids), expected)
    close(token_by_token(ours, ids[:1]), expected[:1])  # alone: the way of the native steps, where there are some


@torch.no_grad()
def test_transformers_loads_what_we_save(theirs, tmp_path):
    ours, ids = load_decoder(tmp_path / "theirs"), tokens(2, 9)
    save_decoder(ours, tmp_path / "ours")
    written, expected = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    again = reload(theirs, tmp_path / "ours")
    read, held = again.state_dict(), theirs.state_dict()
    assert read.keys() == held.keys()
    assert all(torch.equal(read[name], held[name]) for name in held)
    # Not bit for bit: on some CPUs PyTorch's products depend on where in memory a tensor begins.
    close(again(ids).logits, theirs(ids).logits)
    assert torch.equal(load_decoder(tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_transformers_reads_back_what_we_write(theirs, tmp_path):
    config = read_config(tmp_path / "theirs")
    write_config(config, tmp_path / "ours", dtype="bfloat16")
    assert read_config(tmp_path / "ours" / "config.json") == config
    there, back = (said(config_in(theirs, tmp_path / who)) for who in ("theirs", "ours"))
    assert back == there
    # A selection bias learns without a gradient: a buffer of ours and mostly of theirs, a frozen parameter of ERNIE.
    assert parameters(config).total == theirs.num_parameters(only_trainable=True)


def said(values):
    return {name: value for name, value in values.items() if name not in SAID_OTHERWISE}


def test_gradients_of_a_step(theirs, tmp_path):
    """Compared through files: ours are written under transformers' names."""
    ours, ids = load_decoder(tmp_path / "theirs"), tokens(2, 13)
    loss = theirs(ids, labels=ids).loss
    loss.backward()
    logits = ours(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in (*ours.parameters(), *theirs.parameters()):  # what has no gradient stays as it is
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    save_decoder(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    actual, expected = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], name, "fp32 model")


def test_every_row_has_a_twin():
    from moekit.models import ARCHS

    assert {name.split()[0] for name in FAMILIES} == set(ARCHS)
