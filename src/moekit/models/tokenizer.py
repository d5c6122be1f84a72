"""`Tokenizer`: text to ids and back, chats to ids, and `TextStream` for text that grows id by id.

A thin face of transformers' tokenizers, which are imported when one is loaded. Nothing here reaches the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moekit.errors import ConfigError, FileError, FormatError, MoekitError, UnsupportedError
from moekit.files import file_errors, replacing_folder
from moekit.models.gguf_file import GGUFFile
from moekit.models.gguf_vocabulary import read_tokenizer

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_HALF_A_CHARACTER = "\ufffd"
_ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """Text to ids and back.

    Args:
        hf: a tokenizer of transformers.

    Attributes:
        eos_ids: ids that end a text.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.eos_ids: tuple[int, ...] = () if hf.eos_token_id is None else (int(hf.eos_token_id),)
        self.vocab_size = len(hf)
        # Some tokenizers begin every text with a token and some end it with one; a prompt must only begin.
        first = hf.encode("")[:1]
        self._prefix: list[int] = first if first and first[0] == hf.bos_token_id else []

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, after the beginning-of-text token if the tokenizer's own convention is to put one."""
        return [*self._prefix, *self.hf.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens have none."""
        text: str = self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant's next answer begins.

        Args:
            messages: each with "role" and "content".
        Raises:
            UnsupportedError: the tokenizer has no chat template.
            ConfigError: the template does not take these messages.
        """
        from jinja2 import TemplateError

        if not self.hf.chat_template:
            raise UnsupportedError("this tokenizer has no chat template; give a plain prompt instead")
        for message in messages:
            if not {"role", "content"} <= message.keys():
                raise ConfigError(f"every message needs a role and a content, not {sorted(message)}")
        try:
            text = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(f"the chat template does not take these messages: {error}") from None
        return list(self.hf.encode(text, add_special_tokens=False))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files, chat template included, so that `load_tokenizer` and transformers read them."""
        with replacing_folder(folder) as temporary:
            self.hf.save_pretrained(temporary)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a folder of Hugging Face's layout, or inside a .gguf file.

    Raises:
        FileError: there is none.
        FormatError: it cannot be understood.
        UnsupportedError: it is of a kind that moekit does not read from GGUF files.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        metadata = GGUFFile(path).metadata
        with _errors_of_the_libraries(path):
            return Tokenizer(read_tokenizer(metadata, str(path)))
    if not any((path / name).exists() for name in _FILES):
        raise FileError(f"{path} has no tokenizer (none of {', '.join(_FILES)})")
    import transformers

    with _errors_of_the_libraries(path):
        return Tokenizer(transformers.AutoTokenizer.from_pretrained(path, local_files_only=True))


@contextmanager
def _errors_of_the_libraries(path: Path) -> Iterator[None]:
    try:
        with file_errors(path, "read the tokenizer of"):
            yield
    except MoekitError:
        raise
    except Exception as error:  # the tokenizer libraries raise plain Exception for a file they do not understand
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"the tokenizer of {path} cannot be read: {reason}") from error


class TextStream:
    """Ids in, one by one; text out in pieces that never cut a character, and that together are `decode` of all ids.

    A character may need the bytes of several tokens, so a piece waits until its last character is whole. Tokens that
    stand for one byte (<0x0A> and the like, of sentencepiece) wait for the next other token, because decoders replace
    a whole run of them when one is wrong.

    Args:
        tokenizer: what decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode, self._token = tokenizer.decode, tokenizer.hf.convert_ids_to_tokens
        self._silent = frozenset(tokenizer.hf.all_special_ids)
        self._ids: list[int] = []
        self._sent = ""
        # Decoding starts a few tokens back, because a token's text may depend on the one before it.
        self._from, self._to = 0, 0

    def push(self, token: int) -> str:
        """Add one id; returns the text that became certain, often one piece, sometimes none."""
        self._ids.append(token)
        if token in self._silent or _ONE_BYTE.fullmatch(self._token(token) or ""):
            return ""
        before = self._decode(self._ids[self._from : self._to])
        now = self._decode(self._ids[self._from :])
        if now.endswith(_HALF_A_CHARACTER) or len(now) <= len(before):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._send(now[len(before) :])

    def end(self) -> str:
        """The text that was still held back; half a character comes out as U+FFFD, as in `decode`."""
        return self._send(self._decode(self._ids)[len(self._sent) :])

    def _send(self, piece: str) -> str:
        self._sent += piece
        return piece
