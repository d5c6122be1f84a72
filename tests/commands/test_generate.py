"""`moekit generate`, and the mistakes that every command which loads a model must name."""

import json
import pickle

import pytest

import moekit
from moekit.cli import main


def run_json(capsys, *args):
    code = main([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_it_streams_the_text_and_ends_with_figures(folders, capsys):
    assert main(["generate", str(folders / "moe"), "Hello", "--max-new-tokens", "12"]) == 0
    out = capsys.readouterr().out
    text = moekit.load(folders / "moe").generate("Hello", max_new_tokens=12)
    assert out.startswith(text + "\n")
    assert "5 + 12 tokens" in out
    assert "max_new_tokens reached" in out


def test_json_holds_text_and_figures(folders, capsys):
    flags = ("--max-new-tokens", 9, "--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--seed", 4)
    code, result = run_json(capsys, "generate", folders / "moe", "Hello", *flags)
    expected = moekit.load(folders / "moe").generate(
        "Hello", max_new_tokens=9, temperature=0.8, top_k=20, top_p=0.9, seed=4
    )
    assert code == 0
    assert result["text"] == expected
    assert (result["prompt_tokens"], result["new_tokens"], result["finish_reason"]) == (5, 9, "length")
    assert len(result["expert_counts"]) == 2


def test_chat_and_stop(folders, capsys):
    model = moekit.load(folders / "moe")
    whole = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=20)
    flags = ("--chat", "--max-new-tokens", 20, "--stop", whole[4:6])
    code, result = run_json(capsys, "generate", folders / "moe", "Hi", *flags)
    assert code == 0
    assert result["text"] == whole[: whole.find(whole[4:6])]


def test_text_is_printed_as_it_is(folders, capsys, monkeypatch):
    """Brackets are no markup, and long lines are not wrapped."""
    monkeypatch.setattr(moekit.Model, "_pieces", lambda self, *_: self_stats(self) or iter(["[bold]x[/] ", "y" * 300]))
    assert main(["generate", str(folders / "moe"), "Hello"]) == 0
    assert capsys.readouterr().out.startswith("[bold]x[/] " + "y" * 300 + "\n")


def self_stats(model):
    from moekit.engine import GenerationStats

    model.last_stats = GenerationStats(1, 0, 1, 0.1, 1.0, 1.0, "stop", ())


@pytest.mark.parametrize("verb", ["generate", "chat", "inspect"])
def test_a_missing_folder_is_named(verb, capsys, tmp_path):
    prompt = ["Hello"] if verb == "generate" else []
    code, result = run_json(capsys, verb, tmp_path / "nowhere", *prompt)
    assert code == 2
    assert "nowhere" in result["error"]


def test_a_pickle_is_refused(folders, capsys, tmp_path):
    (tmp_path / "config.json").write_text((folders / "moe" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    code, result = run_json(capsys, "generate", tmp_path, "Hello")
    assert code == 2
    assert result["type"] == "UnsafeFileError"
    assert "pickle" in result["error"]


def test_a_prompt_that_is_too_long_names_both_numbers(folders, capsys):
    code, result = run_json(capsys, "generate", folders / "base", "x" * 300)
    assert code == 2
    assert result["type"] == "ContextLengthError"
    assert "300" in result["error"]
    assert "256" in result["error"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature must be at least 0, not -1.0"),
        (["--top-p", "0"], "top_p must lie in (0, 1], not 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be a whole number of at least 1, not 0"),
    ],
)
def test_bad_sampling_is_one_line(flags, words, capsys):
    assert main(["generate", "m", "Hello", *flags]) == 2
    assert capsys.readouterr().err == f"moekit: {words}\n"


def test_chat_needs_a_template(folders, capsys):
    code, result = run_json(capsys, "generate", folders / "base", "Hello", "--chat")
    assert code == 2
    assert "no chat template" in result["error"]
