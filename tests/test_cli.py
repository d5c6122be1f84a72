"""The command line: what it imports, how every ending becomes an exit code, and that --json is JSON."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moekit import __version__, cli
from moekit.errors import MissingExtraError

HEAVY = ("torch", "transformers", "rich", "tyro", "numpy")
AFTERWARDS = "; import sys; print(*(name for name in {names} if name in sys.modules), file=sys.stderr)"


def imported_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has imported after running `code`."""
    code += AFTERWARDS.format(names=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split()) & set(HEAVY)


@pytest.fixture
def verb(monkeypatch):
    """Make the verb `doctor` do what a test wants."""
    import moekit.commands.doctor as module

    def replace(work):
        monkeypatch.setattr(module, "run", lambda options, console: work(console))

    return replace


def raising(error):
    def work(console):
        raise error

    return work


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(args, capsys):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out and summary in out for verb, summary in cli.VERBS.items())


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], ["trian"]])
def test_help_imports_nothing_heavy(args):
    assert imported_by(f"from moekit.cli import main; main({args!r})") == set()


def test_importing_moekit_imports_nothing_heavy():
    assert imported_by("import moekit") == set()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_does_not_import_torch(verb):
    assert "torch" not in imported_by(f"from moekit.cli import main; assert main([{verb!r}, '--help']) == 0")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_keeps_the_contract(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"usage: moekit {verb}" in capsys.readouterr().out
    module = importlib.import_module(f"moekit.commands.{verb}")
    assert module.Options.__dataclass_params__.frozen
    assert callable(module.run)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moekit {__version__}\n"


@pytest.mark.parametrize(("given", "hint"), [("trian", "did you mean 'train'?"), ("xyzzy", "choose from: quickstart")])
def test_an_unknown_verb_names_the_nearest(given, hint, capsys):
    assert cli.main([given]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"moekit: unknown verb {given!r}; {hint}")
    assert err.count("\n") == 1


def test_flags_that_do_not_parse_exit_with_2(capsys):
    assert cli.main(["doctor", "--jsno"]) == 2
    assert "--jsno" in capsys.readouterr().err


def test_json_is_one_document_alone_on_stdout(verb, capsys):
    verb(lambda console: console.print("for people") or {"x": [1.5, float("nan"), (2,)], "text": "é"})
    for args in (["--json", "doctor"], ["doctor", "--json"]):
        assert cli.main(args) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == {"x": [1.5, None, [2]], "text": "é"}
        assert "for people" in err
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "for people\n"


def test_global_flags_after_two_dashes_belong_to_the_verb():
    assert cli._split_flags(["generate", "--json", "m", "--", "--debug"]) == (
        ["generate", "m", "--", "--debug"],
        {"--json"},
    )


def test_a_result_that_is_not_ok_exits_with_1(verb):
    verb(lambda console: {"ok": False})
    assert cli.main(["doctor"]) == 1


def test_a_deliberate_error_is_one_line(verb, capsys):
    verb(raising(MissingExtraError("datasets", extra="train")))
    assert cli.main(["doctor", "--json"]) == 2
    out, err = capsys.readouterr()
    message = "datasets is not installed: pip install 'moekit[train]'"
    assert err == f"moekit: {message}\n"
    assert json.loads(out) == {"error": message, "type": "MissingExtraError"}


def test_a_bug_is_one_line_and_a_traceback_with_debug(verb, capsys):
    verb(raising(RuntimeError("two\nlines")))
    assert cli.main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err == "moekit: a bug in moekit: RuntimeError: two lines (run again with --debug for the traceback)\n"
    assert cli.main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_exits_with_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "moekit: interrupted\n"


@pytest.mark.parametrize("handler", ["signal.default_int_handler", "signal.SIG_IGN"])
def test_sigterm_ends_as_ctrl_c_does(handler, tmp_path):
    """Also where Ctrl-C is ignored, as a shell has it for jobs in the background: what was being written is gone."""
    file, folder = str(tmp_path / "a.gguf"), str(tmp_path / "b")
    code = (
        "import signal, time, moekit.commands.doctor as d; from moekit.cli import main; from moekit.files import *\n"
        f"signal.signal(signal.SIGINT, {handler})\n"
        "def run(options, console):\n"
        f"    with replacing({file!r}) as part, replacing_folder({folder!r}) as folder:\n"
        "        part.touch(), (folder / 'c').touch()\n"
        "        print('writing', flush=True), time.sleep(60)\n"
        "d.run = run\n"
        "raise SystemExit(main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "moekit: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_quiet():
    """As in `moekit plan ... | head -0`: a reader that leaves is no error to talk about."""
    code = (
        "import moekit.commands.doctor as d; from moekit.cli import main\n"
        "d.run = lambda options, console: [console.print('x' * 70) for _ in range(5000)] and {}\n"
        "raise SystemExit(main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_a_terminal_without_the_characters_still_works(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from moekit.cli import main; print(end=''); main(['--help']); print('é→')"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        check=True,
    )
    assert done.stdout.endswith(b"??\n")


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "generate.py"
    done = subprocess.run([sys.executable, page], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run `make docs WRITE=--write`:\n{done.stdout}{done.stderr}"
