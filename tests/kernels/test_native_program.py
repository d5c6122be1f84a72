"""The kernels without Python: csrc/tests under sanitizers, and cross-compiled for arm64 and emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
ARM64_LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler keeps them

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]


def tool(package: str, *names: str) -> str:
    """The path of the first of `names` that is here (also beside this Python); otherwise the test is skipped."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in names:
        if path := shutil.which(name, path=folders):
            return path
    pytest.skip(f"no {names[0]} here: apt-get install {package}")


def output(*command: str | Path) -> str:
    waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}  # spinning threads starve each other on a busy machine
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=waiting)
    assert done.returncode == 0, (
        f"{command[0]} exited with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    )
    return done.stdout


# And the least number of checks on an instruction set.
PROGRAMS = {"test_ops": 10_000, "test_decode": 100, "test_quant": 10_000}


def build(folder: Path, *options: str) -> list[Path]:
    """The test programs, built into `folder`."""
    cmake = tool("cmake", "cmake")
    output(cmake, "-S", ROOT, "-B", folder, "-DMOEKIT_TESTS=ON", *options)
    output(cmake, "--build", folder)
    return [folder / name for name in PROGRAMS]


def isas_that_passed(program: Path, *emulator: str) -> list[str]:
    """The instruction sets a program ran on; it must have counted checks on each, and no failure."""
    isas, verdict = output(*emulator, program).splitlines()
    counted = re.fullmatch(r"(\d+) passed, 0 failed", verdict)
    assert counted, verdict
    assert int(counted[1]) > PROGRAMS[program.name] * len(isas.split())
    return isas.split()


def test_no_memory_error_or_undefined_behaviour_on_any_instruction_set(tmp_path):
    from moekit.kernels import cpu

    compiler = tool("g++", "g++")
    for program in build(tmp_path, f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={SANITIZE}"):
        assert isas_that_passed(program) == list(cpu.available_isas())


def test_arm64_computes_the_same(tmp_path):
    compiler = tool("g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++")
    emulator = tool("qemu-user-static", "qemu-aarch64-static", "qemu-aarch64")
    programs = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    for program in programs:
        assert isas_that_passed(program, emulator, "-L", ARM64_LIBRARIES) == ["portable"]
