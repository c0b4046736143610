"""The backend is chosen once, and every choice has its reason in words."""

import subprocess
import sys

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.runtime import backends, engine

ABSENT = "no C++ compiler was found when halfbyte was installed"


@pytest.fixture
def choose(monkeypatch):
    """choose(asked, missing) -> the backend of a process where HALFBYTE_BACKEND says so and the engine is missing or not."""

    def made(asked=None, missing=None):
        monkeypatch.delenv(backends.VARIABLE, raising=False)
        if asked is not None:
            monkeypatch.setenv(backends.VARIABLE, asked)
        if missing:
            monkeypatch.setattr(engine, "MISSING", missing)
        backends.backend.cache_clear()
        return backends.backend()

    yield made
    backends.backend.cache_clear()


needs_engine = pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}")


@needs_engine
def test_the_engine_runs_where_it_can(choose):
    assert choose() == backends.Backend("cpu", "the C++ engine, the fastest that works here")
    assert engine.describe() in backends.describe()
    assert backends.integer_limit() > 1e8
    assert choose("cpu") == backends.Backend("cpu", "HALFBYTE_BACKEND asks for it")


def test_without_the_engine_the_reference_runs_and_says_why(choose):
    chosen = choose(missing=ABSENT)
    assert chosen.name == "reference"
    assert ABSENT in chosen.reason
    assert ABSENT in backends.describe()
    assert backends.integer_limit() is None


def test_the_reference_can_be_asked_for(choose):
    assert choose("reference") == backends.Backend("reference", "HALFBYTE_BACKEND asks for it")
    assert choose("reference", missing=ABSENT).name == "reference"


@pytest.mark.parametrize("asked", ["", "gpu", "CPU"])
def test_an_unknown_backend_is_refused(choose, asked):
    with pytest.raises(
        HalfbyteError, match=f"HALFBYTE_BACKEND='{asked}' names no backend; the backends are 'cpu', 'reference', 'triton'"
    ):
        choose(asked)


def test_an_engine_that_cannot_run_is_not_replaced_in_silence(choose):
    with pytest.raises(HalfbyteError, match=r"HALFBYTE_BACKEND asks for the C\+\+ engine, which cannot run: no C\+\+ compiler"):
        choose("cpu", missing=ABSENT)


@needs_engine
def test_an_unknown_instruction_set_is_refused(choose, monkeypatch):
    monkeypatch.setenv("HALFBYTE_ISA", "sse9")
    with pytest.raises(HalfbyteError, match="sse9"):
        choose()
    monkeypatch.setenv("HALFBYTE_ISA", "scalar")
    assert choose().name == "cpu"
    assert "instructions scalar" in backends.describe()


LOADS = {  # what stands where the extension should -> words of the reason
    "nothing": ("sys.modules['halfbyte.runtime._engine'] = None", "it was not built"),
    "the stand-in": (
        "class Finder:\n    def find_spec(self, name, *_):\n        if name.endswith('._engine'):\n"
        "            raise ImportError('no compiler here')\nsys.meta_path.insert(0, Finder())",
        "no compiler here",
    ),
}


@pytest.mark.parametrize(("prepare", "words"), LOADS.values(), ids=LOADS)
def test_halfbyte_works_without_the_extension(prepare, words):
    code = (
        f"import sys\n{prepare}\nimport torch, halfbyte as hb\nfrom halfbyte.runtime.backends import backend, describe\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))\n"
        "hb.quantize(model, 'quartz-w4a4')\nprint(model(torch.randn(2, 8)).shape, backend().name, describe())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 8]) reference" in done.stdout
    assert words in done.stdout
