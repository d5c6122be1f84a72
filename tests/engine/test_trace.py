"""Routing traces: what is read is what was written, and nothing else is believed."""

import json
import os

import pytest
import torch

from moekit import MoE, MoEConfig
from moekit.engine import RoutingTrace, TraceHead, TraceRow, TraceWriter
from moekit.engine.trace import row_of
from moekit.errors import ConfigError, FileError, FormatError, UnsupportedError
from moekit.models.safetensors_file import SafetensorsFile, write_safetensors
from moekit.moe import RoutingRecord

HEAD = TraceHead((1, 3), 5, ("plays", "code"), {"architecture": "mixtral", "layers": 4})
PIECES = {7: " a", 8: "\n", 9: "\ufffd", 10: "ß$[b]"}


def rows():
    generator = torch.Generator().manual_seed(0)
    for text, size, width in ((0, 3, 2), (0, 1, 2), (1, 5, 3)):
        ids = torch.rand(size, 2, 5, generator=generator).argsort(dim=-1)[..., :width].to(torch.int16)
        ids[-1, :, -1] = -1
        yield TraceRow(text, torch.randint(7, 11, (size,), generator=generator, dtype=torch.int32), ids)


def write(path, head=HEAD):
    with TraceWriter(path) as writer:
        for row in rows():
            writer.add(row)
        writer.finish(head, PIECES)
    return path


def test_what_is_read_is_what_was_written(tmp_path):
    trace = RoutingTrace(write(tmp_path / "new" / "a.safetensors"))
    assert trace.head == HEAD
    assert trace.pieces == PIECES
    read = list(trace.rows())
    assert len(read) == 3
    for one, other in zip(read, rows(), strict=True):
        assert one.text == other.text
        for a, b in ((one.tokens_T, other.tokens_T), (one.experts_TMK, other.experts_TMK)):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]


def test_rows_of_odd_sizes(tmp_path):
    odd = TraceRow(0, torch.tensor([7], dtype=torch.int32), torch.tensor([[[4]]], dtype=torch.int16))
    with TraceWriter(tmp_path / "a") as writer:
        for _ in range(3):
            writer.add(odd)
        writer.finish(TraceHead((1,), 5, ("plays",), {}), PIECES)
    read = list(RoutingTrace(tmp_path / "a").rows())
    assert [(row.tokens_T.tolist(), row.experts_TMK.tolist()) for row in read] == [([7], [[[4]]])] * 3


def test_the_same_rows_are_the_same_bytes(tmp_path):
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def test_nothing_is_there_before_the_end_nor_without_it(tmp_path):
    path = tmp_path / "a.safetensors"
    with TraceWriter(path) as writer:
        for row in rows():
            writer.add(row)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        TraceWriter(tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize(
    "router",
    [
        {"router": "topk"},
        {"router": "expert_choice"},
        {"router": "top_p", "gate_order": "softmax_topk", "norm_topk_prob": False},
    ],
    ids=lambda router: router["router"],
)
def test_a_row_has_the_experts_of_each_token_whatever_the_router(router):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2, **router)).eval()
    _, first = layer(torch.randn(9, 8))
    _, second = layer(torch.randn(9, 8))
    row = row_of(1, list(range(9)), (first, second))
    assert row.tokens_T.tolist() == list(range(9))
    for number, routing in enumerate((first, second)):
        for token in range(9):
            taken = [
                e
                for t, e in zip(routing.token_ids_A.tolist(), routing.expert_ids_A.tolist(), strict=True)
                if t == token
            ]
            assert [e for e in row.experts_TMK[token, number].tolist() if e >= 0] == taken


def test_a_row_of_a_trace_is_routed_again():
    torch.manual_seed(0)
    layers = [MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2)) for _ in range(2)]
    row = row_of(0, list(range(9)), [layer(torch.randn(9, 8))[1] for layer in layers])
    record = RoutingRecord.of_ids(row.experts_TMK.unbind(1))
    with record.replaying():
        again = [layer(torch.randn(9, 8))[1].expert_ids_TK for layer in layers]
    assert torch.equal(torch.stack(again, dim=1), row.experts_TMK.long())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"texts": ("a", "a")}, ConfigError, "different names"),
        ({"texts": ()}, ConfigError, "different names"),
        ({"texts": tuple(map(str, range(300)))}, ConfigError, "1 to 256"),
        ({"texts": ("a\x1b[2J",)}, ConfigError, "can be printed"),
        ({"facts": {"a": "\n"}}, ConfigError, "can be printed"),
        ({"num_experts": 30_000}, UnsupportedError, "too many pairs"),
    ],
)
def test_a_head_is_checked(changes, error, words):
    fields = {"layers": (1, 3), "num_experts": 5, "texts": ("a",), "facts": {}} | changes
    with pytest.raises(error, match=words):
        TraceHead(**fields)


def forged(path, change):
    """The file of `write`, after `change(tensors, notes)`."""
    file = SafetensorsFile(write(path))
    tensors = {name: file.read(name) for name in file.tensors}
    notes = json.loads(file.metadata["moekit_trace"])
    notes = change(tensors, notes) or notes
    write_safetensors(path, tensors, metadata={"moekit_trace": notes if isinstance(notes, str) else json.dumps(notes)})
    return path


def put(name, tensor):
    return lambda tensors, _: tensors.update({name: tensor})


def note(**changes):
    return lambda _, notes: notes.update(changes)


HOSTILE = {
    "an expert that is not": put("0.experts", torch.full((3, 2, 2), 5, dtype=torch.int16)),
    "an expert below -1": put("0.experts", torch.full((3, 2, 2), -2, dtype=torch.int16)),
    "an expert twice": put("0.experts", torch.full((3, 2, 2), 1, dtype=torch.int16)),
    "more experts than there are": put("0.experts", torch.full((3, 2, 6), -1, dtype=torch.int16)),
    "experts of other tokens": put("0.experts", torch.full((2, 2, 2), -1, dtype=torch.int16)),
    "experts of other layers": put("0.experts", torch.full((3, 1, 2), -1, dtype=torch.int16)),
    "experts without a dimension": put("0.experts", torch.full((6, 2), -1, dtype=torch.int16)),
    "another dtype": put("0.experts", torch.full((3, 2, 2), -1, dtype=torch.int32)),
    "tokens of another dtype": put("0.tokens", torch.full((3,), 7, dtype=torch.int64)),
    "a token without text": put("0.tokens", torch.full((3,), 6, dtype=torch.int32)),
    "no tokens": put("0.tokens", torch.zeros(0, dtype=torch.int32)),
    "a long row": lambda tensors, _: tensors.update(
        {
            "0.tokens": torch.full((1025,), 7, dtype=torch.int32),
            "0.experts": torch.full((1025, 2, 2), -1, dtype=torch.int16),
        }
    ),
    "a tensor more": put("3.tokens", torch.zeros(1, dtype=torch.int32)),
    "a row too few": note(rows=[0, 1]),
    "a text without rows": note(rows=[0, 0, 0]),
    "a row of no text": note(rows=[0, 1, 2]),
    "rows that are no list": note(rows={"0": 1}),
    "many rows": note(rows=10**9),
    "layers in disorder": note(layers=[3, 1]),
    "no layers": note(layers=[]),
    "no experts": note(num_experts=0),
    "half an expert": note(num_experts=4.5),
    "true experts": note(num_experts=True),
    "too many experts": note(num_experts=32_767),
    "more experts than an id can say": note(num_experts=1 << 40),
    "texts of one name": note(texts=["a", "a"]),
    "names that move the cursor": note(texts=["a\x1b[2J", "b"]),
    "names that are no text": note(texts=[1, 2]),
    "a surrogate": note(texts=["\ud800", "b"]),
    "facts in a list": note(facts=["a"]),
    "a fact of another kind": note(facts={"a": [1]}),
    "a long fact": note(facts={"a": "b" * 1000}),
    "a huge fact": note(facts={"a": 1 << 70}),
    "pieces that are no text": note(pieces={"7": 1}),
    "pieces of no token": note(pieces={"seven": "a"}),
    "pieces in a list": note(pieces=["a"]),
    "notes in a list": lambda *_: "[]",
    "notes that are no JSON": lambda *_: "{",
    "notes with a name twice": lambda *_: '{"rows": [], "rows": []}',
    "deep notes": lambda *_: "[" * 100_000,
    "no notes": lambda _, notes: notes.clear(),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_forged_trace_is_refused_in_one_line(tmp_path, change):
    path = forged(tmp_path / "a.safetensors", change)
    with pytest.raises(FormatError) as caught:
        list(RoutingTrace(path).rows())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(3)})
    with pytest.raises(FormatError, match="not a routing trace"):
        RoutingTrace(path)
    path.write_bytes(write(tmp_path / "b").read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        RoutingTrace(path)
    path.write_text("# Hamlet")
    with pytest.raises(FormatError):
        RoutingTrace(path)
    with pytest.raises(FileError):
        RoutingTrace(tmp_path)
