"""Bad luck with experts on disk: every fault is one clear error, nothing hangs, and what comes next is right."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import moekit
from moekit.adapt import quantise
from moekit.adapt.budget import load_within
from moekit.adapt.expert_cache import ExpertCache
from moekit.adapt.expert_probe import ReaderChoice
from moekit.cli import main
from moekit.config import ModelConfig, MoEConfig
from moekit.engine import Model
from moekit.errors import FileError, FormatError
from moekit.machine import parse_bytes
from moekit.models.decoder import Decoder
from tiny import VOCABULARY, byte_tokenizer, tiny_model

pytestmark = pytest.mark.timeout(60)  # a hang is a failure
PLENTY = 2 << 30  # more than the tests' process takes
FILE = "packed.safetensors"
LENGTH = 12


@pytest.fixture(autouse=True)
def own_memory_of_heat(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "packed"
    torch.manual_seed(3)
    model = tiny_model()
    quantise(model.decoder, "int4")
    model.save(folder)
    return folder


@pytest.fixture
def folder(packed, tmp_path):
    """A copy that a test may harm."""
    return shutil.copytree(packed, tmp_path / "packed")


@pytest.fixture(scope="module")
def whole(packed):
    return moekit.load(packed)


def within(folder, slots=2):
    """With room for so many experts of 8: with two, a token's experts of one layer, every layer reads."""
    reader = ReaderChoice("cached", threads=2, chunk=4096, gb_s=1.0)
    return Model(load_within(folder, PLENTY, reader=reader, most=slots), byte_tokenizer())


def say(model, prompt="abc", **options):
    return model.generate(prompt, max_new_tokens=LENGTH, **options)


def pinned(model):
    return model.decoder.room._traffic.in_use._pinned


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_file_replaced_during_a_conversation_is_refused_until_it_is_back(folder, whole):
    model, path, kept = within(folder), folder / FILE, folder / "kept"
    session = model.new_session()
    before = say(model, session=session)
    os.link(path, kept)
    shutil.copy(path, folder / "other")
    os.replace(folder / "other", path)
    for _ in range(2):
        with pytest.raises(FormatError, match="was replaced or changed while in use; load it again"):
            say(model, "abc" + before, session=session)
    assert pinned(model) == 0
    os.replace(kept, path)
    assert say(model, "abc" + before, session=session) == say(whole, "abc" + before)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_file_cut_during_an_answer_is_refused(folder, share):
    model = within(folder)
    stream = model.stream("abc", max_new_tokens=100)
    next(stream)
    os.truncate(folder / FILE, int(share * (folder / FILE).stat().st_size))
    with pytest.raises(FormatError, match=r"was cut to .* bytes while in use"):
        list(stream)
    with pytest.raises(FormatError, match=r"was cut to .* bytes while in use"):
        say(model)
    assert pinned(model) == 0


def test_a_file_removed_during_an_answer_is_refused(folder):
    model = within(folder)
    stream = model.stream("abc", max_new_tokens=100)
    next(stream)
    (folder / FILE).unlink()
    with pytest.raises(FileError, match=FILE):
        list(stream)


# ---- the disk -------------------------------------------------------------------------------------------------------


def test_an_error_of_the_disk_in_an_answer_names_the_expert_and_the_next_answer_is_whole(packed, whole, monkeypatch):
    model, real, left = within(packed), os.preadv, [1]
    session = model.new_session()
    stream = model.stream("abc", max_new_tokens=LENGTH, session=session)
    began = next(stream)

    def preadv(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(FileError, match=r"cannot read layer \d, expert \d of .*Input/output error"):
        list(stream)
    assert left == [0]
    assert pinned(model) == 0
    assert say(model, session=session) == say(whole)
    assert say(whole).startswith(began)


def test_a_slow_disk_makes_the_same_text_later(packed, whole, monkeypatch):
    model, real = within(packed), os.preadv

    def preadv(*arguments):
        time.sleep(0.005)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    assert say(model) == say(whole)
    assert model.last_stats.experts.wait_share > 0.3


SECOND = """
import sys
sys.path.insert(0, sys.argv[2])
from test_offload_faults import say, within
model = within(sys.argv[1])
for _ in range(3):
    print(repr(say(model)), flush=True)
"""


def test_two_processes_on_one_store_say_the_same(packed, whole):
    here = Path(__file__).parent
    command = [sys.executable, "-c", SECOND, packed, here]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        model, found = within(packed), set()
        while other.poll() is None:
            found.add(say(model))
        assert other.returncode == 0
        assert found == {say(whole)}
        assert other.stdout.read().splitlines() == 3 * [repr(say(whole))]


# ---- the user -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3, 9])
def test_ctrl_c_while_waiting_holds_nothing(packed, whole, monkeypatch, after):
    model, real, left = within(packed), ExpertCache._wait, [after]

    def interrupted(cache, landed):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return real(cache, landed)

    monkeypatch.setattr(ExpertCache, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(model)
    assert pinned(model) == 0
    assert say(model) == say(whole)


@pytest.mark.parametrize(
    ("memory", "message"),
    [("10MB", "9.5 MiB of memory are too little for this model: "), ("nonsense", "a size is written 16GB, ")],
)
def test_memory_that_does_not_do_is_one_line(packed, capsys, memory, message):
    assert main(["generate", str(packed), "x", "--memory", memory]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ---- the promise ----------------------------------------------------------------------------------------------------


def test_the_tokenizer_counts(packed, monkeypatch):
    held, limit = [], "1900MB"
    base = moekit.load(packed, memory=limit).budget.report.base

    def load_tokenizer(path):
        held.append(bytearray(b"x") * (64 << 20))
        return byte_tokenizer()

    monkeypatch.setattr("moekit.engine.engine.load_tokenizer", load_tokenizer)
    assert moekit.load(packed, memory=limit).budget.report.base >= base + (56 << 20)


HOLES = """
from moekit.machine import resident_memory, return_freed_memory
return_freed_memory()
before, kept = resident_memory(), []
for _ in range(4):  # each is freed above blocks that stay, after a larger one was
    big, blocks = bytearray(b"x") * (24 << 20), []
    del big
    for _ in range(16):
        blocks.append(bytearray(b"x") * (8 << 20))
        kept.append(bytearray(b"x") * 100_000)
    del blocks
print(resident_memory() - before)
"""


def test_freed_memory_goes_back_to_the_system():
    result = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True)
    assert int(result.stdout) < 16 << 20  # of which 6 are kept


CHILD = """
import re, sys
from moekit.cli import main
code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@contextmanager
def memory_group(limit):
    """Put the children of this process that ask for it into a control group, version 1 or 2, of so many bytes."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in own:
        root, path, names = "/sys/fs/cgroup/memory", own["memory"], ("memory.limit_in_bytes", "memory.oom_control")
    else:
        root, path, names = "/sys/fs/cgroup", own.get("", "/"), ("memory.max", "memory.events")
    parents = [Path(root), Path(f"{root}{path}")]
    for parent in parents:
        group = parent / f"moekit-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / names[0]).write_text(str(limit))
            break
        except OSError:
            if group.exists():
                group.rmdir()
    else:
        pytest.skip("no memory control group can be made here")
    try:
        yield group, names[1]
    finally:
        group.rmdir()


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="control groups are root's")
def test_inside_a_memory_group_of_its_budget_it_is_never_killed(tmp_path):
    moe = MoEConfig(hidden_size=256, intermediate_size=512, num_experts=32, top_k=4)
    config = ModelConfig(
        arch="mixtral", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, moe=moe,
    )  # fmt: skip
    model = Model(Decoder(config).eval(), byte_tokenizer())
    quantise(model.decoder, "int4")
    model.save(tmp_path / "packed")
    want = model.generate("x" * 700, max_new_tokens=40)
    arguments = [str(tmp_path / "packed"), "x" * 700, "--max-new-tokens", "40", "--json"]

    def generate(memory, group=None):
        command = [sys.executable, "-c", CHILD, "generate", *arguments, "--memory", str(memory)]
        enter = None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
        return subprocess.run(command, check=False, preexec_fn=enter, capture_output=True, text=True)

    least = parse_bytes(re.search(r"([\d.]+ MiB) is the least", generate("10MB").stderr)[1])
    limit = least + (20 << 20)  # a quarter of the experts
    with memory_group(limit) as (group, events):
        result = generate(f"{limit // 1024}KiB", group)
        assert result.returncode == 0, result.stderr
        killed = re.search(r"^oom_kill (\d+)$", (group / events).read_text(), re.MULTILINE)
        assert killed is None or int(killed[1]) == 0
    *text, peak = result.stdout.strip().splitlines()
    assert int(peak.split()[1]) * 1024 <= limit
    answer = json.loads("\n".join(text))
    assert answer["text"] == want
    assert 0 < answer["experts"]["hit_rate"] < 1
