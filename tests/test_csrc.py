"""The engine's own tests: its core built apart from Python, plain and under sanitizers, every test in it run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
BUILDS = {"plain": "", "address and undefined": "address,undefined", "thread": "thread"}
missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"building the core needs {', '.join(missing)}"),
]


@pytest.mark.parametrize("sanitizers", BUILDS.values(), ids=BUILDS)
def test_the_core_passes_its_own_tests(tmp_path, sanitizers):
    def run(*command):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run("cmake", "-S", CSRC, "-B", tmp_path, "-G", "Ninja", "-DHALFBYTE_TESTS=ON", f"-DHALFBYTE_SANITIZE={sanitizers}")
    run("cmake", "--build", tmp_path, "--parallel", os.cpu_count() or 1)
    told = run("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert "100% tests passed" in told
    assert "No tests were found" not in told
