"""`moekit generate`, and the mistakes that every command which loads a model must name."""

import json
import pickle
import shutil

import pytest

import moekit
from moekit.cli import main
from moekit.engine import Stream


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
    pieces = ["[bold]x[/] ", "y" * 300]
    monkeypatch.setattr(Stream, "__next__", lambda _: pieces.pop(0) if pieces else next(iter(())))
    assert main(["generate", str(folders / "moe"), "Hello"]) == 0
    assert capsys.readouterr().out.startswith("[bold]x[/] " + "y" * 300 + "\n")


def test_json_holds_log_probabilities(folders, capsys):
    code, result = run_json(capsys, "generate", folders / "moe", "Hello", "--max-new-tokens", 4, "--logprobs", 2)
    assert code == 0
    expected = moekit.load(folders / "moe").complete("Hello", max_new_tokens=4, logprobs=2)
    assert result["token_ids"] == list(expected.token_ids)
    assert [each["id"] for each in result["logprobs"]] == result["token_ids"]
    for got, wanted in zip(result["logprobs"], expected.logprobs, strict=True):
        assert got["text"] == wanted.text
        assert got["logprob"] == wanted.logprob <= 0
        assert [each["id"] for each in got["top"]] == [each.id for each in wanted.top]
        assert got["top"][0]["id"] == got["id"]  # greedy


def test_system_and_tools_reach_the_template(folders, capsys, tmp_path):
    model = moekit.load(folders / "moe")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    flags = ("--chat", "--system", "Be brief", "--max-new-tokens", 8)
    code, result = run_json(capsys, "generate", folders / "moe", "Hi", *flags)
    assert code == 0
    assert result["text"] == model.generate(messages, max_new_tokens=8)
    (tmp_path / "tools.json").write_text(json.dumps({"tools": tools}))
    code, result = run_json(capsys, "generate", folders / "moe", "Hi", *flags, "--tools", tmp_path / "tools.json")
    assert code == 2
    assert "takes no tools" in result["error"]
    shutil.copytree(folders / "moe", tmp_path / "tools")
    model.tokenizer.hf.chat_template = "{{ tools | tojson }}{{ messages[0].content }}"
    model.tokenizer.save(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "tools")
    code, result = run_json(capsys, "generate", tmp_path / "tools", "Hi", *flags, "--tools", tmp_path / "tools.json")
    assert code == 0
    assert result["prompt_tokens"] == len(json.dumps(tools) + "Be brief")
    assert result["text"] == model.generate(messages, tools=tools, max_new_tokens=8)


@pytest.mark.parametrize("flag", [("--system", "x"), ("--tools", "x.json")])
def test_system_and_tools_need_a_chat(flag, capsys):
    code, result = run_json(capsys, "generate", "m", "Hi", *flag)
    assert code == 2
    assert "add --chat" in result["error"]


def test_tools_must_be_a_list(capsys, tmp_path):
    (tmp_path / "tools.json").write_text('{"tools": {}}')
    code, result = run_json(capsys, "generate", "m", "Hi", "--chat", "--tools", tmp_path / "tools.json")
    assert code == 2
    assert "tools.json must hold" in result["error"]


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
        (["--min-p", "1.5"], "min_p must lie in [0, 1], not 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0 and finite, not 0.0"),
        (["--presence-penalty", "-3"], "presence_penalty must lie in [-2, 2], not -3.0"),
        (["--frequency-penalty", "2.5"], "frequency_penalty must lie in [-2, 2], not 2.5"),
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
