"""Models loaded and saved: against transformers, in shards, in other dtypes, and from broken folders."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from broken import survives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from twins import tokens, write

from moekit.errors import FileError, FormatError, UnsafeFileError, UnsupportedError
from moekit.models import SafetensorsFile, load_decoder, save_decoder
from tolerances import near

INDEX = "model.safetensors.index.json"


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def transformers_load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["llama tied", "mixtral", "gpt2"])
def test_transformers_loads_shards_that_we_save(name, tmp_path):
    theirs = write(name, tmp_path / "theirs")
    save_decoder(load_decoder(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=20_000)
    ids = tokens(2, 9)
    expected = logits(theirs, ids)
    assert torch.equal(logits(transformers_load(tmp_path / "ours"), ids), expected)
    torch.testing.assert_close(logits(load_decoder(tmp_path / "ours"), ids), expected, **near("fp32 twin"))
    assert INDEX in names(tmp_path / "ours")


def test_one_file_and_what_it_says_of_itself(tmp_path):
    write("mixtral", tmp_path / "theirs")
    save_decoder(load_decoder(tmp_path / "theirs"), tmp_path / "ours")
    assert INDEX not in names(tmp_path / "ours")
    assert SafetensorsFile(tmp_path / "ours" / "model.safetensors").metadata == {"format": "pt"}
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_gpt2_without_the_prefix_that_its_published_files_lack(tmp_path):
    write("gpt2", tmp_path)
    ids, expected = tokens(1, 9), load_decoder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_decoder(tmp_path), ids), logits(expected, ids))


def test_shards_keep_to_their_limit_and_the_index_counts_them(tmp_path):
    theirs = write("mixtral", tmp_path)
    save_decoder(load_decoder(tmp_path), tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in theirs.parameters())
    shards = list((tmp_path / "out").glob("model-*"))
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 24_000 for path in shards)


def test_fused_experts_are_read_as_well_as_single_ones(tmp_path):
    write("qwen3_moe", tmp_path)
    expected = load_decoder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in expected.config.moe_layers:
        experts = expected.layers[layer].mlp.experts
        for part in ("gate_up_proj", "down_proj"):
            tensors[f"model.layers.{layer}.mlp.experts.{part}"] = getattr(experts, part).detach()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = tokens(1, 9)
    assert torch.equal(logits(load_decoder(tmp_path), ids), logits(expected, ids))


def test_bfloat16_there_and_back(tmp_path):
    write("mixtral", tmp_path / "a")
    wide, narrow = load_decoder(tmp_path / "a"), load_decoder(tmp_path / "a", torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    save_decoder(wide, tmp_path / "b", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_decoder(tmp_path / "b")
    for (name, one), two, three in zip(wide.named_parameters(), narrow.parameters(), again.parameters(), strict=True):
        assert torch.equal(two, three), name
        assert torch.equal(one.bfloat16(), two), name
    theirs = transformers_load(tmp_path / "b")
    assert theirs.dtype == torch.bfloat16
    ids = tokens(2, 9)
    torch.testing.assert_close(logits(again, ids), logits(theirs, ids), **near("bf16 weights"))
    assert {p.dtype for p in load_decoder(tmp_path / "b", torch.float32).parameters()} == {torch.float32}


def test_loading_leaves_nothing_uninitialised(tmp_path, poisoned):
    write("qwen3_moe", tmp_path)
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in load_decoder(tmp_path).parameters())


def test_saving_over_another_save_leaves_none_of_its_weights(tmp_path):
    write("llama tied", tmp_path / "a")
    decoder = load_decoder(tmp_path / "a")
    save_decoder(decoder, tmp_path / "b", max_shard_bytes=20_000)
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    save_decoder(decoder, tmp_path / "b")
    assert names(tmp_path / "b") == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    save_decoder(decoder, tmp_path / "b", max_shard_bytes=20_000)
    assert "model.safetensors" not in names(tmp_path / "b")
    assert torch.equal(load_decoder(tmp_path / "b").embed.weight, decoder.embed.weight)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, call):
    write("llama tied", tmp_path / "a")
    decoder = load_decoder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    before, calls, sync = names(tmp_path), [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    for target in ("new", "old"):
        calls.clear()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="the disk is full"):
            save_decoder(decoder, tmp_path / target)
        monkeypatch.setattr(os, "fsync", sync)
    assert names(tmp_path) == before
    assert names(tmp_path / "old") == names(tmp_path / "a")
    assert load_decoder(tmp_path / "old").config == decoder.config


def test_adapted_decoders_are_not_written(tmp_path):
    write("llama tied", tmp_path / "a")
    decoder = load_decoder(tmp_path / "a")
    decoder.layers[0].attn.q_proj.lora = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"differs at 'layers\.0\.attn\.q_proj\.lora"):
        save_decoder(decoder, tmp_path / "b")
    del decoder.layers[0].attn.q_proj.lora
    decoder.config = dataclasses.replace(decoder.config, rope_theta=5.0, qk_norm=True)
    with pytest.raises(UnsupportedError, match=r"differs at|cannot express"):
        save_decoder(decoder, tmp_path / "b")
    assert names(tmp_path) == ["a"]


@pytest.fixture
def broken(tmp_path):
    """Change the tensors of a Mixtral folder; returns a function that does it and loads."""

    def load(change):
        write("mixtral", tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return load_decoder(tmp_path)

    return load


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            r"'model.layers.1.block_sparse_moe.experts.2.w3.weight' \(expert 2 of layer 1\) is missing",
        ),
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(96, 32)}), r"shape \[96, 32\], but .* asks for \[97, 32\]"),
        (
            lambda t: t.update({"model.layers.0.block_sparse_moe.experts.0.w2.weight": torch.zeros(48, 32)}),
            r"experts.0.w2.weight' has shape \[48, 32\], but the configuration asks for \[32, 48\]",
        ),
        (
            lambda t: t.update({f"model.layers.{i}.extra": torch.zeros(1) for i in range(5)}),
            r"no place for 'model.layers.0.extra', 'model.layers.1.extra', 'model.layers.2.extra' and 2 more",
        ),
        (
            lambda t: t.update({"model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.zeros(48, 32)}),
            r"no place for 'model.layers.0.block_sparse_moe.experts.4.w1.weight'",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.block_sparse_moe.experts.1.w1.weight": torch.zeros(48, 32, dtype=torch.float16)}
            ),
            "experts.1.w1.weight' is torch.float16, the experts before it torch.float32",
        ),
    ],
)
def test_wrong_tensors_are_named(broken, change, words):
    with pytest.raises(FormatError, match=words) as caught:
        broken(change)
    assert "\n" not in str(caught.value)


def test_integer_weights_are_refused(broken):
    with pytest.raises(UnsupportedError, match=r"'model.norm.weight' is stored as torch.int8"):
        broken(lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))


def test_a_second_copy_of_a_tied_head_and_old_rotary_buffers_are_ignored(tmp_path):
    write("llama tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_decoder(tmp_path).head is None


@pytest.fixture
def sharded(tmp_path):
    write("llama tied", tmp_path / "a")
    save_decoder(load_decoder(tmp_path / "a"), tmp_path / "b", max_shard_bytes=40_000)

    def change(edit):
        index = json.loads((tmp_path / "b" / INDEX).read_text())
        edit(index["weight_map"])
        (tmp_path / "b" / INDEX).write_text(json.dumps(index))
        return tmp_path / "b"

    return change


@pytest.mark.parametrize(
    "name",
    ["../a/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\model.safetensors", "a.bin"],
)
def test_an_index_that_points_out_of_its_folder_is_not_followed(sharded, name):
    folder = sharded(lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(UnsafeFileError, match=r"(only .safetensors files|is not the name of a file in)"):
        load_decoder(folder)


def test_shards_that_are_links_out_of_the_folder_are_not_followed(sharded):
    folder = sharded(lambda m: None)
    third = folder / "model-00003-of-00003.safetensors"
    third.rename(folder.parent / "elsewhere.safetensors")
    third.symlink_to("../elsewhere.safetensors")
    with pytest.raises(UnsafeFileError, match=r"00003-of-00003.safetensors is a link to .*elsewhere"):
        load_decoder(folder)


def test_an_index_that_lists_a_tensor_twice_is_named(sharded):
    folder = sharded(lambda m: None)
    text = (folder / INDEX).read_text()
    line = '"model.norm.weight": "model-00001-of-00003.safetensors",'
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{ {line}'))
    with pytest.raises(FormatError, match=r"the name 'model.norm.weight' occurs twice"):
        load_decoder(folder)


def test_loading_shards_holds_the_model_and_the_largest_tensor(tmp_path):
    """Peak of a process of its own: 3 layers of 4 experts, 108 MB in bf16, in shards of 30 MB; the largest is 8 MB.

    glibc is told to give large blocks back at once; its own reserve is up to 36 MB, whatever the size of the model.
    """
    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=896,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    assert len(names(tmp_path)) > 4
    code = """
import sys
from moekit.models.weights import load_decoder
load_decoder(sys.argv[1] + "/tiny")  # what loading imports is not what it holds
clear = open("/proc/self/clear_refs", "w")
clear.write("5")  # the high-water mark starts again
clear.close()
status = lambda key: int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024
before = status("VmRSS:")
model = load_decoder(sys.argv[1])
print(status("VmHWM:") - before, sum(p.nbytes for p in model.parameters()))
"""
    write("mixtral", tmp_path / "tiny")
    allocator = {"MALLOC_MMAP_THRESHOLD_": "500000", "MALLOC_TRIM_THRESHOLD_": "500000"}
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env={**os.environ, **allocator},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, run.stdout.split())
    largest = max(
        tensor.end - tensor.start
        for path in tmp_path.glob("*.safetensors")
        for tensor in SafetensorsFile(path).tensors.values()
    )
    assert size > 90_000_000
    assert peak < size + largest + 2_000_000


def test_an_index_that_lies_is_named(sharded):
    folder = sharded(lambda m: m.update({"model.norm.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(
        FormatError, match=r"'model.norm.weight' is listed in 'model-00001.*' but stored in 'model-0000[23]"
    ):
        load_decoder(folder)
    folder = sharded(lambda m: m.pop("model.norm.weight"))
    with pytest.raises(FormatError, match=r"'model.norm.weight' is listed in no file"):
        load_decoder(folder)


def test_missing_shards_and_tensors_in_two_are_named(sharded):
    folder = sharded(lambda m: None)
    twice = load_file(folder / "model-00001-of-00003.safetensors")
    third = folder / "model-00003-of-00003.safetensors"
    save_file({**load_file(third), **dict([twice.popitem()])}, third)
    with pytest.raises(FormatError, match=r"is in both .*00001-of.* and .*00003-of"):
        load_decoder(folder)
    third.unlink()
    with pytest.raises(FileError, match=r"cannot read .*00003-of-00003"):
        load_decoder(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(FormatError, match="weight_map must map tensors to files"):
        load_decoder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(tmp_path, name):
    write("llama tied", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsafeFileError, match=rf"{name} is a pickle.*convert it to safetensors"):
            load_decoder(path)


def test_folders_without_weights_are_named(tmp_path):
    write("llama tied", tmp_path)
    with pytest.raises(FileError, match="give the folder"):
        load_decoder(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"has no model\.safetensors"):
        load_decoder(tmp_path)
    with pytest.raises(FileError, match="cannot read"):
        load_decoder(tmp_path / "gone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lies")
    write("mixtral", folder)
    return folder, json.loads((folder / "config.json").read_text())


NUMBERS = st.sampled_from([0, -1, 1, 2, 2**20, 2**31, 2**40, 2**63, 10**30, None, True, "4", 0.5, [4], {}])


@given(
    key=st.sampled_from(
        [
            "hidden_size",
            "num_hidden_layers",
            "num_local_experts",
            "vocab_size",
            "head_dim",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "rope_parameters",
            "eos_token_id",
            "num_experts_per_tok",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        ]
    ),
    value=NUMBERS,
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_lying_configuration_ends_in_one_of_our_errors(folder, key, value):
    path, config = folder
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    survives(lambda: load_decoder(path))
