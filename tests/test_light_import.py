"""Import is free: `import halfbyte` and `halfbyte --help` load no tensor library. Each case runs in a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "numpy")
LIMIT = 0.5  # processor seconds, interpreter start included: what a person at a prompt takes for immediate
TRIES = 5  # the best of these counts; waiting for a busy machine does not

# What a user can do before any work starts. Public names resolve on first use; listing them must resolve none.
IMPORT = "import halfbyte; halfbyte.__all__; dir(halfbyte)"
HELP = "import runpy, sys; sys.argv = ['halfbyte', '--help']; runpy.run_module('halfbyte.cli', run_name='__main__')"


def run(code: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result


def heavy_modules(code: str) -> list[str]:
    """The heavy packages that are loaded once `code` has run, even if it ended by sys.exit()."""
    report = f"import atexit, sys; atexit.register(lambda: print('loaded:', *sorted(set({HEAVY}) & set(sys.modules))))"
    last_line = run(f"{report}\n{code}").stdout.splitlines()[-1]
    assert last_line.startswith("loaded:")
    return last_line.split()[1:]


def best_time(code: str, tries: int = TRIES) -> float:
    """Processor seconds of the quickest of some fresh interpreters; stops at the first that is within LIMIT."""
    best = float("inf")
    for _ in range(tries):
        timed = f"import atexit, time; atexit.register(lambda: print(time.process_time()))\n{code}"
        best = min(best, float(run(timed).stdout.splitlines()[-1]))
        if best < LIMIT:
            break
    return best


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_loads_nothing_heavy(code):
    assert heavy_modules(code) == []


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_is_quick(code):
    assert best_time(code) < LIMIT


def test_help_is_the_help():
    output = run(HELP).stdout
    assert "Usage" in output
    assert "quantize" in output


@pytest.mark.parametrize("code", ["import numpy", "import json, numpy.linalg; raise SystemExit(0)"])
def test_the_check_can_fail(code):
    assert heavy_modules(code) == ["numpy"]


def test_the_clock_can_fail():
    assert best_time(f"import time\nwhile time.process_time() < {LIMIT}: pass", tries=1) > LIMIT
