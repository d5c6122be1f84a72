"""A model larger than memory, on ids: what a budget gives, with random weights and no tokenizer.

python examples/bigger_than_memory.py [FOLDER MEMORY [TOKENS]]     (a tiny random model without FOLDER)

FOLDER is one of moekit pack, with weights of a model or, to find out about a size, of `moekit pack --random`.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from moekit.adapt.budget import load_within
from moekit.cli import main
from moekit.engine import Session
from moekit.machine import parse_bytes, peak_memory, readable_bytes

with tempfile.TemporaryDirectory() as scratch, peak_memory() as peak:
    if len(sys.argv) > 2:
        folder, limit = Path(sys.argv[1]), parse_bytes(sys.argv[2])
    else:
        sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
        Qwen3MoeConfig(**sizes, num_experts=32, num_experts_per_tok=4, num_key_value_heads=4).save_pretrained(scratch)
        folder, limit = Path(scratch, "packed"), parse_bytes("3GB")
        main(["pack", "--random", scratch, str(folder), "--json"])
    decoder = load_within(folder, limit)
    stored = json.loads((folder / "config.json").read_text())
    file = (folder / "packed.safetensors").stat().st_size
    report = decoder.room.report
    print(f"{stored['model_type']}, {readable_bytes(file)} on disk, {report.slots} of {report.total_slots} experts fit")

    session, vocabulary = Session(decoder), decoder.config.vocab_size
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 8
    steps = torch.randint(vocabulary, (2 * tokens,)).tolist()  # each given: the routing of text that repeats nothing
    session.read([0])
    for cold, some in ((True, steps[:tokens]), (False, steps[tokens:])):
        before, start = decoder.room.stats, time.perf_counter()
        for token in some:
            session.append([token])
        seconds, after = time.perf_counter() - start, decoder.room.stats
        taken = after.hits - before.hits + after.misses - before.misses
        print(
            f"{'first' if cold else 'then'} {tokens} tokens: {tokens / seconds:.2f} a second, "
            f"{readable_bytes((after.bytes_read - before.bytes_read) / tokens)} read a token, "
            f"{(after.hits - before.hits) / taken:.0%} of the experts in memory"
        )
print(f"at most {readable_bytes(peak.value)} in memory, of {readable_bytes(limit)}")
assert peak.value <= limit
