"""`Tokenizer`: text to ids and back, chats to ids, and `TextStream` for text that grows id by id.

A thin face of transformers' tokenizers, which are imported when one is loaded. Nothing here reaches the network.
"""

from __future__ import annotations

import json
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

__all__ = ["Message", "TextStream", "Tokenizer", "load_tokenizer"]

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...}; see `Tokenizer.chat`."""

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_HALF_A_CHARACTER = "\ufffd"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers' own
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

    def text_of(self, token: int) -> str:
        """Text of one id alone, special ones included; U+FFFD for a part of a character."""
        text: str = self.hf.decode([token], clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant's next answer begins.

        Args:
            messages: each with "role", and "content" or "tool_calls"; what else there is, as "tool_call_id" and
                "name" of a tool's answer, the template sees too. A call's arguments may be a mapping, as templates
                expect them, or its JSON, as OpenAI's API gives it.
            tools: what the model may call: JSON schemas as in OpenAI's API, or documented functions, of which
                transformers makes such schemas. They reach the template as `tools`.
        Raises:
            UnsupportedError: the tokenizer has no chat template, or one that knows no tools.
            ConfigError: the template does not take these messages or tools.
        """
        if not self.hf.chat_template:
            raise UnsupportedError("this tokenizer has no chat template; give a plain prompt instead")
        ready = [_message(message) for message in messages]
        try:
            if tools and not self._takes_tools():
                raise UnsupportedError("this tokenizer's chat template takes no tools; put them in a system message")
            text = self.hf.apply_chat_template(ready, tools=tools or None, tokenize=False, add_generation_prompt=True)
        except UnsupportedError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            raise ConfigError(f"the chat template does not take these messages: {_first_line(error)}") from error
        return list(self.hf.encode(text, add_special_tokens=False))

    def _takes_tools(self) -> bool:
        """Whether the template reads a variable of that name; one that does not would drop them without a word."""
        from jinja2 import Environment, nodes

        template = _GENERATION.sub("", self.hf.get_chat_template(tools=[{}]))
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        return any(node.name == "tools" for node in parsed.find_all(nodes.Name))

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
        raise FormatError(f"the tokenizer of {path} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: always with a content, and a call's arguments as a mapping.

    transformers' guide to tool use ("Tool use", passing calls back) has arguments as a dict and says why.
    """
    if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        said = sorted(message) if isinstance(message, Mapping) else repr(message)
        raise ConfigError(f"every message needs a role, and a content or tool_calls, not {said}")
    ready = {**message, "content": "" if message.get("content") is None else message["content"]}
    if message.get("tool_calls"):
        ready["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return ready


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"the arguments of the call of {function.get('name')!r} are no JSON: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}


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
