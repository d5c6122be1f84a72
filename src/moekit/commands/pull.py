"""`moekit pull`: a model from the Hugging Face Hub, only the files moekit reads, each checked after it has arrived."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moekit.errors import ConfigError, FileError, FormatError, UnsafeFileError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile
    from rich.console import Console

    from moekit.commands.progress import ShareProgress

_WEIGHTS = ("*.safetensors", "*.gguf")
_OTHERS = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SECOND_COPY = "consolidated*"
_ANOTHER_INDEX = "*.bin.index.json"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Options:
    """Download a model from the Hugging Face Hub, or go on where a download stopped."""

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """Name on the Hub, as in HuggingFaceTB/SmolLM2-135M."""
    revision: str = "main"
    """Branch, tag or commit."""
    to: str | None = None
    """Folder to download to; the Hub's cache unless given."""
    only: str | None = None
    """Pattern of the weights to take, where there are several GGUF files ('*Q4_K_M.gguf')."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """List, choose, download, verify; returns the folder and what is in it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    from moekit.commands.progress import ShareProgress
    from moekit.machine import readable_bytes

    with _one_line(options):
        api = HfApi()
        commit = api.model_info(options.id, revision=options.revision).sha
        assert commit is not None
        tree = api.list_repo_tree(options.id, revision=commit)
        listed = {file.path: file for file in tree if isinstance(file, RepoFile) and "/" not in file.path}
        files = _choose(listed, options)
        total = sum(file.size for file in files.values())
        console.print(f"{options.id} {commit[:12]}: {len(files)} files, {readable_bytes(total)}")
        with ShareProgress(console, "downloading") as bar:
            folder = snapshot_download(
                options.id,
                revision=commit,
                local_dir=options.to,
                allow_patterns=[_literal(name) for name in files],
                tqdm_class=_reporting(bar, total),
            )
    with ShareProgress(console, "verifying") as bar:
        _verify(Path(folder), files, bar)
    console.print("every file is as published")
    console.print(folder, soft_wrap=True)
    return {
        "id": options.id,
        "commit": commit,
        "folder": folder,
        "files": {name: file.size for name, file in files.items()},
        "bytes": total,
    }


def _choose(files: Mapping[str, RepoFile], options: Options) -> dict[str, RepoFile]:
    """The files of the repository's first level that moekit reads; GGUF ones only where there is no safetensors."""

    def named(patterns: tuple[str, ...]) -> list[str]:
        return [name for name in files if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    weights = [name for name in named(_WEIGHTS) if not fnmatch.fnmatchcase(name, _SECOND_COPY)]
    if options.only is not None:
        found, weights = weights, [name for name in weights if fnmatch.fnmatchcase(name, options.only)]
        if found and not weights:
            raise ConfigError(f"--only {options.only}: matches none of the weights of {options.id}: {', '.join(found)}")
    elif any(name.endswith(".safetensors") for name in weights):
        weights = [name for name in weights if name.endswith(".safetensors")]
    elif len(weights) > 1:
        raise ConfigError(f"{options.id} has {len(weights)} GGUF files, choose with --only: {', '.join(weights)}")
    if not weights:
        if pickles := named(_PICKLES):
            raise UnsafeFileError(f"{options.id} has its weights in pickles only ({pickles[0]}), which can run code")
        raise FileError(f"{options.id} has no .safetensors and no .gguf file at its first level")
    others = [name for name in named(_OTHERS) if not fnmatch.fnmatchcase(name, _ANOTHER_INDEX)]
    return {name: files[name] for name in sorted({*weights, *others})}


def _literal(name: str) -> str:
    """A pattern that matches `name` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _verify(folder: Path, files: Mapping[str, RepoFile], bar: ShareProgress) -> None:
    """Compare every file with the digest that the Hub states.

    Raises:
        FormatError: a file is not what was published; it is removed, so that the next pull fetches it again.
    """
    total, done = max(sum(file.size for file in files.values()), 1), 0
    for name, file in files.items():
        path = folder / name
        digest, stated = _published(file)
        with path.open("rb") as data:
            while part := data.read(_CHUNK):
                digest.update(part)
                done += len(part)
                bar.on_part(min(done, total), total)
        if digest.hexdigest() != stated:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise FormatError(f"{path} is not the file that was published; it has been removed, pull again")


def _published(file: RepoFile) -> tuple[Any, str]:
    """(a hash to feed the file to, what must come out): SHA-256 of large files, git's own of the rest."""
    if file.lfs is not None:
        return hashlib.sha256(), file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False), file.blob_id


def _reporting(bar: ShareProgress, total: int) -> type:
    """A silent tqdm: the bytes that it is told of move `bar`."""
    from tqdm import tqdm

    lock, done = threading.Lock(), 0

    class Reporting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            # The library has two bars of bytes, received and written; in the plain protocol only the second moves.
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if self._counts:
                with lock:
                    done += int(n or 0)
                    bar.on_part(min(done, total), max(total, 1))
            return None

    return Reporting


@contextmanager
def _one_line(options: Options) -> Iterator[None]:
    """Every ending of the Hub's library in one line that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(f"{options.id!r} is no name on the Hub: {_first(error)}") from error
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{options.id}"
        raise FileError(f"{options.id} is gated: ask for access on {page}, then run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{options.id} has no revision {options.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileError(f"the Hub has no model {options.id}, or it is private: `hf auth login`") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise FileError(f"cannot download {options.id}: HF_HUB_OFFLINE is set") from error
        raise FileError(f"cannot reach {constants.ENDPOINT} to download {options.id}: {_first(error)}") from error
    except (errors.HTTPError, OSError) as error:
        again = "what has arrived is kept, pull again to go on"
        raise FileError(f"cannot download {options.id} from {constants.ENDPOINT}: {_first(error)}; {again}") from error


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
