"""Experts on disk: placement changes speed, never a number."""

from __future__ import annotations

import dataclasses
import gc
import random
import re
import shutil
import threading

import pytest
import torch

import moekit
from moekit import machine
from moekit.adapt import load_packed, quantise, save_packed
from moekit.adapt.budget import MemoryBudget, limit_for, load_within, slots_within
from moekit.adapt.expert_policies import POLICIES
from moekit.adapt.expert_probe import ReaderChoice
from moekit.adapt.expert_reader import KINDS
from moekit.adapt.offload import Foresight
from moekit.config import AttentionConfig, ModelConfig, MoEConfig
from moekit.engine.session import Session, append_each
from moekit.errors import BudgetError, FormatError, UnsupportedError
from moekit.kernels import forced
from moekit.models.decoder import Decoder
from moekit.models.safetensors_file import SafetensorsFile
from moekit.moe import Routing
from moekit.train import perplexity_of_files
from tiny import tiny_model

VOCABULARY, LAYERS, EXPERTS, TOP_K = 90, 3, 12, 3
PLENTY = 1 << 40  # more than a process full of other tests takes, so that every expert has a slot
CONFIG = ModelConfig(
    arch="qwen2_moe",
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=600,
    attention_bias=True,
    attention=AttentionConfig(output_bias=False),
    moe=MoEConfig(
        hidden_size=48,
        intermediate_size=33,
        num_experts=EXPERTS,
        top_k=TOP_K,
        gate_order="softmax_topk",
        num_shared_experts=1,
        shared_intermediate_size=40,
        shared_gate=True,
    ),
)


@pytest.fixture(autouse=True)
def own_memory_of_heat(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(folder, config=CONFIG, formats=None):
    """A folder with a random packed decoder."""
    torch.manual_seed(5)
    decoder = Decoder(config).eval()
    quantise(decoder, "int4", per_expert=formats)
    save_packed(decoder, folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """With experts of different formats, and so of different sizes."""
    mixed = {1: ["int8", "nf4", "int4-g64-asym", "mxfp4"] * (EXPERTS // 4)}
    return written(tmp_path_factory.mktemp("model") / "packed", formats=mixed)


@pytest.fixture(scope="module")
def whole(packed):
    return load_packed(packed)


def load(folder, slots, policy="lfuda", reader="cached"):
    """With room for so many experts, and no more."""
    return load_within(folder, PLENTY, policy, ReaderChoice(reader, threads=2, chunk=8192, gb_s=1.0), most=slots)


def conversation(decoder, seed=0):
    """Logits of prompts of several lengths, then of single tokens, then of several sequences at once."""
    ids = random.Random(seed)
    draw = lambda count: [ids.randrange(VOCABULARY) for _ in range(count)]  # noqa: E731
    sessions = [Session(decoder) for _ in range(3)]
    found = [session.read(draw(length)) for session, length in zip(sessions, (1, 9, 40), strict=True)]
    found += [sessions[0].append(draw(1)) for _ in range(3)]
    for _ in range(3):
        found += append_each(sessions, draw(3))
    return torch.stack(found)


@pytest.mark.parametrize(("slots", "threads"), [(3, 1), (4, 2), (7, 1), (20, 1), (LAYERS * EXPERTS, 1)])
def test_no_bit_depends_on_how_many_experts_are_in_memory(packed, whole, slots, threads):
    decoder, before = load(packed, slots), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(conversation(decoder), conversation(whole))
    finally:
        torch.set_num_threads(before)
    assert decoder.room.report.slots == slots
    stats = decoder.room.stats
    assert (stats.misses <= LAYERS * EXPERTS) == (slots == LAYERS * EXPERTS)


def test_random_budgets_policies_and_readers_say_the_same(packed, whole):
    draw, want = random.Random(1), conversation(whole)
    for _ in range(12):
        slots, policy, reader = draw.randint(TOP_K, 36), draw.choice([*POLICIES]), draw.choice(KINDS)
        assert torch.equal(conversation(load(packed, slots, policy, reader)), want), (slots, policy, reader)


@pytest.mark.heavy
def test_two_hundred_random_budgets_policies_and_readers_say_the_same(packed, whole):
    draw, wants = random.Random(2), [conversation(whole, seed) for seed in range(4)]
    for turn in range(200):
        slots, policy, reader = draw.randint(TOP_K, 36), draw.choice([*POLICIES]), draw.choice(KINDS)
        got = conversation(load(packed, slots, policy, reader), turn % 4)
        assert torch.equal(got, wants[turn % 4]), (slots, policy, reader)


def test_the_reference_kernels_and_the_modules_agree_too(packed, whole):
    ids = torch.randint(VOCABULARY, (2, 33))
    decoder = load(packed, 5)
    with torch.inference_mode(), forced("reference"):
        assert torch.equal(decoder(ids).logits, whole(ids).logits)
    hooks = [each.layers[1].mlp.register_forward_hook(lambda *_: None) for each in (decoder, whole)]
    try:  # whoever listens makes the modules run
        assert torch.equal(conversation(decoder), conversation(whole))
    finally:
        for hook in hooks:
            hook.remove()


def test_a_prompt_reads_each_expert_at_most_once(packed):
    decoder = load(packed, 9)
    before = decoder.room.stats
    Session(decoder).read([number % VOCABULARY for number in range(300)])
    stats = decoder.room.stats
    assert stats.misses - before.misses <= LAYERS * EXPERTS
    sizes = sum(extent.nbytes for extent in decoder.room._traffic.in_use.store.extents.values())
    assert stats.bytes_read - before.bytes_read <= sizes


def test_sequences_together_read_less_than_alone(packed):
    prompts = [[7, number] for number in range(16)]

    def read(together):
        decoder = load(packed, 8)
        sessions = [Session(decoder) for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            session.read(prompt)
        before = decoder.room.stats.bytes_read
        for turn in range(4):
            tokens = [(turn * 16 + number) % VOCABULARY for number in range(16)]
            if together:
                append_each(sessions, tokens)
            else:
                for session, token in zip(sessions, tokens, strict=True):
                    session.append([token])
        return decoder.room.stats.bytes_read - before

    assert 2 * read(True) < read(False)


# ---- the budget -----------------------------------------------------------------------------------------------------


def test_too_little_memory_names_the_least_that_works_and_that_works(packed, whole):
    with pytest.raises(BudgetError, match=r"is the least .*tokens a second") as caught:
        load_within(packed, 100 << 20)
    least = machine.parse_bytes(re.search(r"([\d.]+ MiB) is the least", str(caught.value))[1])
    decoder = load_within(packed, int(1.05 * least))  # the process grows a little from one load to the next
    assert torch.equal(conversation(decoder), conversation(whole))


def test_experts_leave_for_a_conversation_and_come_back_after_it(packed):
    slots, position = 30, 2 * LAYERS * 2 * 12 * 2  # bytes of a position's keys and values
    decoder = load(packed, slots)
    room = decoder.room
    room.limit = limit_for(room.report.base, slots, room.report.slot)
    session = Session(decoder)
    session.read([1, 2, 3])
    assert room.report.conversations == 64 * position
    few = room.report.slots
    assert few < slots
    session.read([number % VOCABULARY for number in range(500)])
    assert room.report.conversations >= 500 * position
    assert room.report.slots < few
    del session
    assert room.report.conversations == 0
    assert room.report.slots == slots


def test_a_conversation_that_does_not_fit_is_refused_and_the_shorter_one_goes_on(packed, whole):
    decoder, position = load(packed, 30), 2 * LAYERS * 2 * 12 * 2
    room = decoder.room
    room.limit = limit_for(room.report.base + 128 * position, TOP_K, room.report.slot)
    ours, theirs = Session(decoder), Session(whole)
    with pytest.raises(BudgetError, match=r"do not hold this conversation.*would"):
        ours.read([number % VOCABULARY for number in range(400)])
    assert torch.equal(ours.read([5, 6, 7]), theirs.read([5, 6, 7]))


def test_a_damaged_expert_is_named_and_the_others_go_on(packed, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.adapt.budget.load_heat", lambda store: {})  # else the damage shows while warming up
    folder = shutil.copytree(packed, tmp_path / "damaged")
    name, data = "layers.1.mlp.experts.expert_4", bytearray((folder / "packed.safetensors").read_bytes())
    data[SafetensorsFile(folder / "packed.safetensors").tensors[name].start + 100] ^= 1
    (folder / "packed.safetensors").write_bytes(data)
    decoder = load(folder, 20)
    with pytest.raises(FormatError, match="layer 1, expert 4"):
        Session(decoder).read([number % VOCABULARY for number in range(300)])
    assert decoder.room._traffic.in_use._pinned == 0
    experts = decoder.layers[1].mlp.experts
    x, ids = torch.randn(1, 48), torch.tensor([3, 5])
    other = Routing(torch.zeros(2).long(), ids, torch.ones(2), torch.zeros(1, EXPERTS), 2)
    with torch.inference_mode():
        assert torch.equal(experts.decode(x, other), whole.layers[1].mlp.experts.decode(x, other))


def test_slots_and_limits_are_inverse():
    for taken, slots, stride in ((0, 3, 4096), (500_000_000, 85, 3_538_944), (7, 16_128, 3_538_944)):
        limit = limit_for(taken, slots, stride)
        assert slots_within(limit, taken, stride) == slots
        assert slots_within(limit - stride // 2, taken, stride) == slots - 1


def test_two_conversations_on_two_threads(packed, whole):
    decoder, found = load(packed, 8), {}

    def talk(seed):
        found[seed] = conversation(decoder, seed)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (3, 4):
        assert torch.equal(found[seed], conversation(whole, seed))


# ---- through the engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A folder with a packed model that has a tokenizer."""
    folder = tmp_path_factory.mktemp("speaking") / "packed"
    model = tiny_model()
    quantise(model.decoder, "int4")
    model.save(folder)
    return folder


def test_a_model_within_a_budget_says_the_same(speaking):
    within, whole = moekit.load(speaking, memory="1TB"), moekit.load(speaking)
    assert within.generate("abc", max_new_tokens=20) == whole.generate("abc", max_new_tokens=20)
    figures = within.last_stats.experts
    assert 0 < figures.hit_rate < 1
    assert figures.bytes_read > 0
    assert 0 <= figures.wait_share < 1
    assert whole.last_stats.experts is None
    prompts = ["a", "bcd", "ef"]
    assert within.generate(prompts, max_new_tokens=9) == whole.generate(prompts, max_new_tokens=9)


def test_what_it_cannot_do_it_says(speaking, tmp_path):
    within = moekit.load(speaking, memory="1TB")
    with pytest.raises(UnsupportedError, match="copy the folder"):
        within.save(tmp_path / "out")
    plain = tiny_model()
    plain.save(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match=r"moekit pack .*plain OUT"):
        moekit.load(tmp_path / "plain", memory="1TB")
    dense = tiny_model(moe=False)
    quantise(dense.decoder, "int4")
    dense.save(tmp_path / "dense")
    with pytest.raises(UnsupportedError, match="no packed experts"):
        moekit.load(tmp_path / "dense", memory="1TB")


def test_heat_is_remembered(packed):
    decoder = load(packed, 12)
    conversation(decoder)
    heat = decoder.room._traffic.in_use.heat()
    del decoder
    gc.collect()
    again = load(packed, 12)
    busiest = sorted(heat, key=lambda key: -heat[key])[:6]
    assert all(again.room._traffic.in_use.resident(key) is not None for key in busiest)


def test_evaluation_leaves_itself_room_and_finds_the_same(speaking, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    found = []
    for model in (moekit.load(speaking), moekit.load(speaking, memory="1TB")):
        found.append(
            perplexity_of_files(
                model.decoder, model.tokenizer, [str(tmp_path / "text.txt")], tmp_path / f"cache{len(found)}",
                sequence_length=64,
            )
        )  # fmt: skip
    assert found[0].nll == found[1].nll
    assert found[0].routing.report() == found[1].routing.report()


# ---- reading ahead --------------------------------------------------------------------------------------------------


def test_reading_ahead_is_kept_only_where_tokens_come_sooner(monkeypatch):
    for with_it, without, kept in ((0.08, 0.10, True), (0.10, 0.10, False), (0.12, 0.10, False)):
        foresight, clock = Foresight(), [0.0]
        for _ in range(1000):
            foresight.tick(full=False)  # not before the cache is full
        assert not foresight.on
        monkeypatch.setattr("moekit.adapt.offload.time.perf_counter", lambda clock=clock: clock[0])
        for token in range(Foresight.TURN * Foresight.TURNS):
            foresight.tick(full=True)
            clock[0] += 5.0 if token == 20 else with_it if foresight.on else without  # somebody paused once
        assert foresight.on is kept
        assert foresight.gain == pytest.approx(without / with_it)


def test_tokens_that_come_together_are_no_trial(packed):
    decoder = load(packed, 8)
    sessions = [Session(decoder) for _ in range(3)]
    for turn in range(60):
        append_each(sessions, [turn, turn + 1, turn + 2])
    assert decoder.room._traffic.foresight._count == 0
    sessions[0].append([1])
    assert decoder.room._traffic.foresight._count == 1


def test_what_the_next_router_wants_is_read_ahead_and_changes_no_number(packed, whole):
    decoder = load(packed, 14)
    decoder.room._traffic.foresight.on, decoder.room._traffic.foresight.gain = True, 2.0
    assert torch.equal(conversation(decoder), conversation(whole))
    assert decoder.room.stats.useful > 0
    other = load(packed, 14)
    other.room._traffic.foresight.gain = 1.0
    conversation(other)
    assert other.room.stats.useful == other.room.stats.useless == 0


def test_a_disk_that_was_busy_when_it_was_tried_is_tried_again(packed, monkeypatch):
    decoder, choice = load(packed, 20), ReaderChoice("cached", threads=2, chunk=8192, gb_s=7.0)
    monkeypatch.setattr("moekit.adapt.budget.probe", lambda store, again: choice)
    for seconds, found in ((3.0, 1.0), (2.0, 7.0)):  # 5 GB: less than twice what the probe said, and more
        stats = dataclasses.replace(decoder.room.stats, bytes_read=5 * 10**9, read_seconds=seconds)
        monkeypatch.setattr(MemoryBudget, "stats", stats)
        decoder.room.settle()
        assert decoder.room.report.reader.gb_s == found
