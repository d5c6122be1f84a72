"""`moekit chat` through a pseudo-terminal, as a person meets it, and over pipes."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

import moekit
from moekit.cli import main

WAIT = 60


class Terminal:
    """A chat running in a pseudo-terminal."""

    def __init__(self, *args):
        self.unread = ""
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moekit", "chat", *map(str, args)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=self._own_terminal,  # noqa: PLW1509 — without it Ctrl-C reaches nobody
            env={**os.environ, "PYTHONPATH": "src", "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(child)

    @staticmethod
    def _own_terminal():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def send(self, text):
        os.write(self.fd, text.encode())

    def read_until(self, words, more=0):
        """Consume the output up to `words` and at least `more` characters after them."""
        end = time.monotonic() + WAIT
        while words not in self.unread or len(self.unread) < self.unread.index(words) + len(words) + more:
            assert time.monotonic() < end, f"no {words!r} in {self.unread!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.unread += os.read(self.fd, 65536).decode(errors="replace")
        cut = self.unread.index(words) + len(words) + more
        seen, self.unread = self.unread[:cut], self.unread[cut:]
        return seen

    def exit_code(self):
        code = self.process.wait(WAIT)
        os.close(self.fd)
        return code


@pytest.fixture
def terminal():
    opened = []

    def start(*args):
        opened.append(Terminal(*args))
        return opened[-1]

    yield start
    for each in opened:
        each.process.kill()
        each.process.wait()


def test_a_person_talks_interrupts_and_leaves(folders):
    # Greedy: a sampled answer ends by itself once in a while.
    chat = Terminal(folders / "moe", "--max-new-tokens", "4000", "--temperature", "0")
    try:
        chat.read_until("> ")
        chat.send("/stats\n")
        chat.read_until("no answer yet")
        chat.read_until("> ")
        for line in ("Hello", "and more"):
            chat.send(f"{line}\n")
            chat.read_until(line, more=40)
            chat.send("\x03")
            chat.read_until("(stopped)")
            chat.read_until("> ")
        chat.send("/stats\n")
        stats = chat.read_until("> ")
        assert "a second; interrupted" in stats
        assert "share of the work of each expert" in stats
        reused = int(re.search(r"(\d+) of the prompt's tokens came from the cache", stats)[1])
        assert reused > len("Hello")
        chat.send("\x1b[A\x1b[A")  # two lines up in the history
        chat.read_until("and more")
        chat.send("\x15/quit\n")
        assert chat.exit_code() == 0
    finally:
        chat.process.kill()
        chat.process.wait()


def over_pipes(folder, text, *flags):
    command = [sys.executable, "-m", "moekit", "chat", str(folder), *flags]
    environment = {**os.environ, "PYTHONPATH": "src"}
    return subprocess.run(
        command, check=False, input=text, capture_output=True, text=True, timeout=WAIT, env=environment
    )


@pytest.fixture
def chat(folders, capsys, monkeypatch):
    """Run a chat in this process with these lines on stdin; gives exit code, stdout and stderr."""

    def talk(kind, text, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", str(folders / kind), "--json", "--temperature", "0", *flags])
        return code, *capsys.readouterr()

    return talk


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave_in_peace(chat, monkeypatch, leaving):
    def leave(prompt):
        raise leaving

    monkeypatch.setattr("builtins.input", leave)
    code, out, _ = chat("moe", "")
    assert code == 0
    assert json.loads(out) == {"messages": [], "answers": 0}


def test_each_turn_sees_the_whole_conversation(folders):
    done = over_pipes(folders / "moe", "Hi\nAnd?\n", "--json", "--temperature", "0", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    model, messages = moekit.load(folders / "moe"), []
    for line in ("Hi", "And?"):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": model.generate(messages, max_new_tokens=12)})
    assert json.loads(done.stdout) == {"messages": messages, "answers": 2}


def test_commands(chat):
    text = "\n/help\n/nonsense [x]\nHi\n/reset\n/system Be brief\n/quit\nnot read\n"
    code, out, err = chat("moe", text, "--max-new-tokens", "5", "--system", "Be kind")
    assert code == 0
    assert "/system TEXT" in err
    assert "unknown command /nonsense; /help lists them" in err
    assert json.loads(out) == {"messages": [{"role": "system", "content": "Be brief"}], "answers": 1}


def test_a_base_model_continues(chat, folders):
    _, out, err = chat("base", "One\n", "--max-new-tokens", "8")
    assert "no chat template" in err
    expected = moekit.load(folders / "base").generate("One", max_new_tokens=8)
    assert json.loads(out)["messages"][-1]["content"] == expected


def test_a_full_context_is_told_and_the_conversation_goes_on(chat):
    code, out, err = chat("base", f"{'x' * 300}\nOne\n", "--max-new-tokens", "5")
    assert code == 0
    assert "the prompt has 300 tokens" in err
    assert "/reset starts again" in err
    assert json.loads(out)["answers"] == 1
