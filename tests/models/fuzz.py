"""Thousands of hostile models in one process: each must load, or end in an error of ours, quickly and in little memory.

    python tests/models/fuzz.py FOLDER CASES SEED

prints a JSON object of figures and of what went wrong. The process gives itself 200 MB of address space beyond what it
has after loading every valid model once; an audit hook watches that nothing outside the case's folder is opened; a
timer ends a case that hangs. `test_fuzz.py` runs it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import gguf
import torch
from gguf_twins import GGUF_TWINS, WORDS
from safetensors.torch import save_file
from test_gguf_file import array, header, info, number, text, write_llama
from twins import write

from moekit.errors import MoekitError
from moekit.models import GGUFFile, SafetensorsFile, load_decoder, load_tokenizer, save_decoder, write_gguf

SECONDS = 1.0
"""Of the processor: another process on the machine is no slowness of ours."""
HANGS = 5
"""Of the clock: then the timer rings, as it would for a case that waits for ever."""
MEMORY = 200_000_000
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NUMBERS = (0, 1, 2, 3, 7, 8, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
NAMES = (
    "../bait.safetensors", "..", ".", "", "/etc/passwd", "..\\bait.safetensors", "sub/a.safetensors", "a\0.safetensors",
    "\ud800.safetensors", "link.safetensors", "pipe.safetensors", "folder.safetensors", "a.bin", "x" * 100_000,
    "x" * 300 + ".safetensors", "two\nlines.safetensors", "\x1b[31m.safetensors", "model.safetensors/",
)  # fmt: skip
UNCHANGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)
"""What a way to damage a file raises when an earlier one left nothing that it could change."""
JUNK = (None, True, False, -1, 0.5, 1e308, "4", "", [], {}, [[]], [1] * 5000, 10**400, "F32", {"a": {"b": {}}})


def make_seeds(root: Path) -> list[Path]:
    """The valid models: folders, and one folder for each GGUF file."""
    write("mixtral", root / "single")
    write("llama tied", root / "plain")
    save_decoder(load_decoder(root / "plain"), root / "shards", max_shard_bytes=20_000)
    shutil.copytree(root / "plain", root / "fp8")
    make_fp8(root / "fp8")
    kinds = gguf.GGMLQuantizationType
    for name, kind in {"f32": None, "q8_0": kinds.Q8_0, "q4_1": kinds.Q4_1}.items():
        (root / name).mkdir()
        write_llama(root / name / "model.gguf", kind)
    for name, twin in {"latent": "deepseek_v3 groups, yarn", "stretched": "llama llama3", "sinks": "gpt_oss"}.items():
        write(twin, root / f"{name} in safetensors", GGUF_TWINS)
        (root / name).mkdir()
        write_gguf(load_decoder(root / f"{name} in safetensors"), root / name / "model.gguf", "f32", tokenizer=WORDS)
    return [root / name for name in ("single", "shards", "fp8", "f32", "q8_0", "q4_1", "latent", "stretched", "sinks")]


def make_fp8(folder: Path) -> None:
    tensors = {name: SafetensorsFile(folder / SINGLE).read(name) for name in SafetensorsFile(folder / SINGLE).tensors}
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 16), -(-columns // 16))
    save_file(tensors, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> None:
    """What a user's `moekit.load` reads, and every tensor."""
    path = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
    load_decoder(path)
    if path.suffix == ".gguf":
        load_tokenizer(path)
        file = GGUFFile(path)
        for name in file.tensors:
            file.read(name)


class Mutator:
    """Damages a copy of a seed in one to three ways, all drawn from `draw`."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def damage(self, folder: Path) -> str:
        """Returns what it did."""
        if (folder / "model.gguf").exists():
            ways = [self.bytes_of_header, self.bytes_of_header, self.length_in_gguf, self.length_in_gguf, self.new_gguf]
            file = folder / "model.gguf"
        else:
            files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
            index = [path for path in files if path.name == INDEX]
            weights = [path for path in files if path.suffix == ".safetensors"]
            file = self.draw.choice(weights + 2 * [*index, folder / "config.json"])
            ways = [self.bytes_of_header, self.json_edit, self.json_edit, self.json_edit, self.raw_json]
            ways += [self.shard_elsewhere] * 2 if file.name == INDEX else []
        done = []
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            way = self.draw.choice(ways)
            try:
                way(file)
            except UNCHANGED:
                continue
            done.append(way.__name__)
        return f"{file.parent.name}/{file.name}: {', '.join(done)}"

    def number(self) -> int:
        return self.draw.choice([*NUMBERS, self.draw.getrandbits(self.draw.choice((8, 16, 32, 64)))])

    def bytes_of_header(self, file: Path) -> None:
        """Flipped, replaced, removed, inserted, repeated bytes, or the file cut short."""
        data = bytearray(file.read_bytes())
        end = min(len(data), 6000)
        at, length = self.draw.randrange(end), self.draw.choice((1, 2, 4, 8, 64, 1000))
        part = data[at : at + length]
        way = self.draw.randrange(7)
        if way == 0:
            data[at] ^= 1 << self.draw.randrange(8)
        elif way == 1:
            data[at : at + length] = self.draw.randbytes(length)
        elif way == 2:
            del data[at : at + length]
        elif way == 3:
            data[at:at] = self.draw.choice((part, b"\xff\xfe", b"\0" * 9, b"[" * 50_000, b'{"a":' * 50_000))
        elif way == 4:
            data = data[: self.draw.choice((at, len(data) - 1 - at, 8, 0))]
        elif way == 5:
            data[at : at + 8] = struct.pack("<Q", self.number())
        else:
            data += self.draw.randbytes(length)
        file.write_bytes(data)

    def raw_json(self, file: Path) -> None:
        """Text instead of a header, an index or a configuration; the length of a header may lie."""
        deep = self.draw.choice((100, 2000, 200_000))
        body = self.draw.choice(
            (b"[" * deep, b'{"a":' * deep, b'{"a":' + b"[" * deep + b"]" * deep + b"}",
             b"{}", b"[]", b"null", b"\xff" * 9, b'{"weight_map": {}}', b'{"weight_map": []}',
             b'{"a":' + b"9" * 10_000 + b"}", b'{"a": 1e999999}',
             b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}\0\0\0\0',
             json.dumps(dict.fromkeys(map(str, range(20_000)), 0)).encode()[:-1] + b', "19999": 1}')
        )  # fmt: skip
        length = self.draw.choice((len(body), len(body), self.number()))
        file.write_bytes(body if file.suffix == ".json" else struct.pack("<Q", length) + body)

    def json_edit(self, file: Path) -> None:
        """One place of the JSON in a header, an index or a configuration becomes something else; names may repeat."""
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0] if file.suffix == ".safetensors" else 0
        start = 8 if length else 0
        value = json.loads(data[start : start + length] if length else data)
        parent, key = self.draw.choice(list(places(value)))
        way, hostile = self.draw.randrange(6), None
        if way == 0:
            parent[key] = self.draw.choice(JUNK)
        elif way == 1:
            parent[key] = self.number()
        elif way == 2:
            parent[key] = hostile = self.draw.choice(NAMES)
        elif way == 3 and isinstance(parent, dict):
            parent[self.draw.choice(NAMES)] = parent.pop(key)
        elif way == 4:
            del parent[key]
        elif isinstance(parent, dict):
            parent[key] = Twice(copy.deepcopy(parent[key]))
        else:
            parent.insert(0, parent[key])
        if hostile is not None:
            prepare(file.parent)
        body = dumps(value).encode("utf-8", "surrogatepass")
        file.write_bytes((struct.pack("<Q", len(body)) + body + data[start + length :]) if length else body)

    def shard_elsewhere(self, file: Path) -> None:
        """Tensors of the index are said to lie in a file of another name, out of the folder, or in none."""
        value = json.loads(file.read_bytes())
        names = list(value["weight_map"])
        target = self.draw.choice(NAMES)
        for name in names if self.draw.randrange(4) == 0 else self.draw.sample(names, 1):
            value["weight_map"][name] = target
        prepare(file.parent)
        file.write_text(json.dumps(value))

    def length_in_gguf(self, file: Path) -> None:
        """A count, a length, a type, a dimension or an offset of the header lies."""
        data = bytearray(file.read_bytes())
        at, size = self.draw.choice(fields(bytes(data)))
        data[at : at + size] = struct.pack("<Q", self.number())[:size]
        file.write_bytes(data)

    def new_gguf(self, file: Path) -> None:
        """A header of parts that are each odd: huge arrays, deep nesting, names twice, too long, or not text."""
        draw, name = self.draw, lambda: draw.choice((b"k", b"general.alignment", b"\xff", b"x" * 70_000, b"\0\n\x1b"))
        pairs = [
            draw.choice(
                (
                    number(name(), draw.choice((0, 4, 7, 10, 12, 13, 99)), draw.randbytes(8)),
                    number(name(), 8, text(draw.randbytes(draw.choice((0, 5, 5000))))),
                    array(draw.choice((0, 4, 8, 9, 12, 55)), self.number(), draw.randbytes(64)),
                    array(draw.choice((4, 8, 9)), self.number(), nested=draw.choice((3, 4, 5, 20_000))),
                )
            )
            for _ in range(draw.randrange(4))
        ]
        infos = [
            info(
                draw.choice((b"t", b"u", b"token_embd.weight", b"x" * 100, b"\xff")),
                tuple(self.number() for _ in range(draw.choice((0, 1, 2, 4, 9, 1000)))),
                draw.choice((0, 1, 2, 8, 12, 30, 39, 999)),
                draw.choice((0, 32, self.number())),
            )
            for _ in range(draw.randrange(4))
        ]
        counts = draw.choice((None, None, (self.number(), len(pairs)), (len(infos), self.number())))
        file.write_bytes(header(pairs, infos, draw.randbytes(draw.choice((0, 64, 4096))), counts=counts))


class Twice:
    """A value that `dumps` writes two times under its name."""

    def __init__(self, value: object) -> None:
        self.value = value


def dumps(value: object) -> str:
    if isinstance(value, Twice):
        return dumps(value.value)
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() for _ in range(2 if isinstance(item, Twice) else 1)]
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(item)}" for key, item in items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def places(value: object) -> list[tuple[dict | list, object]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for _, key in found for place in places(value[key])]


def prepare(folder: Path) -> None:
    """What hostile names point to: a link out of the folder, a pipe nobody writes to, a folder."""
    if not (folder / "pipe.safetensors").exists():
        (folder / "link.safetensors").symlink_to("../bait.safetensors")
        os.mkfifo(folder / "pipe.safetensors")
        (folder / "folder.safetensors").mkdir()


def fields(data: bytes) -> list[tuple[int, int]]:
    """(place, size) of every number in a GGUF header that says how much follows, or what it is."""
    found, at = [(4, 4), (8, 8), (16, 8)], 24
    tensors, pairs = struct.unpack_from("<QQ", data, 8)

    def take(size: int) -> int:
        nonlocal at
        if at + size > len(data) or len(found) > 20_000:
            raise LookupError
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def string() -> None:
        nonlocal at
        at += take(8)

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = take(4), take(8)
            for _ in range(count):
                value(inner)
        else:
            at += {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)

    for _ in range(pairs):
        string()
        value(take(4))
    for _ in range(tensors):
        string()
        for _ in range(take(4)):
            take(8)
        take(4), take(8)
    return found


class Watch:
    """Notes every file that is opened while `folder` is set and that does not lie in it."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.outside: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if event == "open" and self.folder is not None and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(str(self.folder) + os.sep) and not path.startswith((sys.prefix, sys.base_prefix)):
                self.outside.append(path)


class Hang(BaseException):
    """The timer rang."""


def ring(*_: object) -> None:
    raise Hang


def run(root: Path, cases: int, seed: int) -> dict:
    root = root.resolve()
    seeds = make_seeds(root)
    save_file({"model.norm.weight": torch.ones(32)}, root / "bait.safetensors")
    for folder in seeds:
        load(folder)
    signal.signal(signal.SIGALRM, ring)
    watch, draw = Watch(), random.Random(seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endings, problems, slowest = Counter(), [], (0.0, "")
    for case in range(cases):
        folder = root / "case"
        shutil.copytree(draw.choice(seeds), folder)
        did = f"case {case}: {Mutator(draw).damage(folder)}"
        ending, problem, seconds = attempt(folder, watch)
        endings[ending] += 1
        slowest = max(slowest, (seconds, did))
        if problem or seconds > SECONDS:
            problems.append(f"{did}: {problem or f'{seconds:.2f} s'}")
        shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "cases": cases,
        "endings": dict(endings.most_common()),
        "slowest_seconds": round(slowest[0], 3),
        "slowest": slowest[1],
        "peak_rss_above_start_mb": round(peak * 1024 / 1e6, 1),
        "problems": problems,
    }


def attempt(folder: Path, watch: Watch) -> tuple[str, str, float]:
    """(how it ended, what was wrong with that, seconds)."""
    problem = ""
    watch.folder, start = folder, time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        load(folder)
        ending = "loaded"
    except MoekitError as error:
        ending, message = type(error).__name__, str(error)
        if not message.isprintable() or len(message) > 1000:
            problem = f"not one line of text: {message[:200]!r}"
    except (Exception, Hang) as error:
        ending = type(error).__name__
        problem = f"{ending}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, watch.folder = time.process_time() - start, None
    if watch.outside:
        problem = f"opened {watch.outside}"
        watch.outside.clear()
    return ending, problem, seconds


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), indent=2))
