"""`moekit pull` against a small Hub of our own on this machine: what it asks for, resumes, verifies and says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from moekit.commands.pull import Options, _choose
from moekit.errors import ConfigError, FileError, UnsafeFileError
from moekit.models import load_decoder, save_decoder
from tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files` as the model someone/moe, in the Hub's own protocol.

    Attributes:
        files: contents by path.
        served: contents that differ from the listed ones.
        cut: paths whose next answer ends after so many bytes.
        down: paths that are answered with an error.
        asked: (path, first byte) of every file that was sent.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.served, self.cut, self.down, self.asked = files, {}, {}, set(), []

    def listing(self):
        for path, data in self.files.items():
            entry = {"type": "file", "path": path, "size": len(data)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.endswith((".safetensors", ".bin", ".gguf")):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            yield entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/someone/gated"):
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not path.startswith(("/api/models/someone/moe", "/someone/moe/resolve/")):
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(r"/api/models/someone/moe(/revision/(main|v1|\w{40}))?", path):
            self.send(200, json.dumps({"id": "someone/moe", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/someone/moe/tree/{COMMIT}":
            self.send(200, json.dumps(list(self.server.listing())).encode())
        elif path.startswith(f"/someone/moe/resolve/{COMMIT}/"):
            self.file(path.rpartition(f"{COMMIT}/")[2], body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def file(self, name, body):
        hub, data = self.server, self.server.served.get(name, self.server.files[name])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(hub.files[name]).hexdigest()}"'}
        if not body:
            self.send(200, data, headers, body=False)
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        hub.asked.append((name, start))
        if name in hub.down:
            self.send(500, b"")
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, data[start:], headers, cut=hub.cut.pop(name, None))

    def send(self, code, data, headers=None, body=True, cut=None):
        self.send_response(code)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    made = tiny_model()
    save_decoder(made.decoder, folder, max_shard_bytes=60_000)
    made.tokenizer.save(folder)
    return folder


@pytest.fixture
def hub(model):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    unwanted = ("pytorch_model.bin", "pytorch_model.bin.index.json", "README.md", ".gitattributes", "run.py")
    files |= dict.fromkeys(unwanted, b"not wanted")
    files |= {"original/model.safetensors": b"", "onnx/config.json": b"", "consolidated.safetensors": b"again"}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pull(hub, tmp_path):
    def run(*args, **environment):
        hub.asked.clear()
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}
        env |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "*", **environment}
        line = [sys.executable, "-m", "moekit", "pull", *args]
        return subprocess.run(line, capture_output=True, text=True, env=env, check=False)

    return run


def test_only_what_moekit_reads_is_fetched_and_loads(hub, pull, model, tmp_path):
    done = pull("someone/moe", "--to", str(tmp_path / "here"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    wanted = {path.name for path in model.iterdir()}
    assert {path.name for path in (tmp_path / "here").iterdir() if path.is_file()} == wanted
    assert {name for name, _ in hub.asked} == wanted == report["files"].keys()
    assert (report["commit"], report["folder"]) == (COMMIT, str(tmp_path / "here"))
    assert report["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    for one, two in zip(load_decoder(model).parameters(), load_decoder(report["folder"]).parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_cache_is_used_and_its_links_are_followed(hub, pull, tmp_path):
    done = pull("someone/moe", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip().splitlines()[-1]
    assert folder.startswith(str(tmp_path / "cache"))
    assert folder.endswith(COMMIT)
    load_decoder(folder)
    assert pull("someone/moe").returncode == 0
    assert hub.asked == []


def test_a_broken_connection_goes_on_where_it_broke(hub, pull, tmp_path):
    """The library keeps what it has in steps of 10 MiB."""
    hub.files["tokenizer.model"] = os.urandom(12 << 20)
    hub.cut["tokenizer.model"] = 11 << 20
    done = pull("someone/moe", "--to", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    assert [start for name, start in hub.asked if name == "tokenizer.model"] == [0, 10 << 20]
    assert (tmp_path / "here" / "tokenizer.model").read_bytes() == hub.files["tokenizer.model"]


def test_a_pull_that_failed_is_continued_by_the_next(hub, pull, tmp_path):
    shard = sorted(name for name in hub.files if name.startswith("model-"))[-1]
    hub.down.add(shard)
    done = pull("someone/moe", "--to", str(tmp_path / "here"))
    assert done.returncode == 2
    assert re.fullmatch(
        r"moekit: cannot download someone/moe from .*; what has arrived is kept, pull .*\n", done.stderr
    )
    assert not (tmp_path / "here" / shard).exists()
    hub.down.clear()
    arrived = {path.name for path in (tmp_path / "here").iterdir()}
    assert len(arrived) > 2
    assert pull("someone/moe", "--to", str(tmp_path / "here")).returncode == 0
    assert {name for name, _ in hub.asked}.isdisjoint(arrived)
    load_decoder(tmp_path / "here")


@pytest.mark.parametrize("kind", ["model-", "config.json"])
def test_what_arrives_changed_is_removed(hub, pull, tmp_path, kind):
    name = sorted(name for name in hub.files if name.startswith(kind))[0]
    data = bytearray(hub.files[name])
    data[-9] ^= 1
    hub.served[name] = bytes(data)
    done = pull("someone/moe")
    assert done.returncode == 2
    assert f"{name} is not the file that was published; it has been removed, pull again" in done.stderr
    assert done.stderr.count("\n") == 1
    hub.served.clear()
    assert pull("someone/moe").returncode == 0
    assert [asked for asked, _ in hub.asked] == [name]


@pytest.mark.parametrize(
    ("args", "environment", "words"),
    [
        (["someone/moe"], {"HF_HUB_OFFLINE": "1"}, "cannot download someone/moe: HF_HUB_OFFLINE is set"),
        (
            ["someone/moe"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "cannot download someone/moe from http://127.0.0.1:9:",
        ),
        (["someone/else"], {}, "the Hub has no model someone/else, or it is private"),
        (["someone/gated"], {}, r"someone/gated is gated: ask for access on http://127.0.0.1:\d+/someone/gated"),
        (["someone/moe", "--revision", "v9"], {}, "someone/moe has no revision 'v9'"),
        (["../../etc/passwd"], {}, "'../../etc/passwd' is no name on the Hub"),
    ],
)
def test_every_other_ending_is_one_line(pull, args, environment, words):
    done = pull(*args, **environment)
    assert done.returncode == 2
    assert re.match(f"moekit: {words}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def choose(*names, only=None):
    return list(_choose({name: SimpleNamespace(size=1) for name in names}, Options("a/b", only=only)))


def test_what_is_chosen():
    config = ("config.json", "tokenizer.model", "chat_template.jinja")
    assert choose("a.gguf", *config) == sorted(["a.gguf", *config])
    assert choose("a.gguf", "model.safetensors", "config.json") == ["config.json", "model.safetensors"]
    assert choose("a-Q8_0.gguf", "a-Q4_K_M.gguf", only="*Q4*") == ["a-Q4_K_M.gguf"]
    with pytest.raises(ConfigError, match=r"2 GGUF files, choose with --only: a-Q8_0.gguf, a-Q4_K_M.gguf"):
        choose("a-Q8_0.gguf", "a-Q4_K_M.gguf")
    with pytest.raises(ConfigError, match=r"--only \*Q5\*: matches none"):
        choose("a-Q8_0.gguf", "a-Q4_K_M.gguf", only="*Q5*")
    with pytest.raises(UnsafeFileError, match=r"pickles only \(pytorch_model.bin\)"):
        choose("config.json", "pytorch_model.bin")
    with pytest.raises(FileError, match=r"no .safetensors and no .gguf"):
        choose("config.json")
