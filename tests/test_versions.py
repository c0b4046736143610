"""Which releases of diffusers are promised, pinned and tested: pyproject.toml, constraints.txt and the Makefile agree."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version(file, pattern):
    found = re.search(pattern, (ROOT / file).read_text("utf-8"), re.M)
    return tuple(int(number) for number in found[1].split("."))


def test_the_release_before_the_pinned_one_is_tested_and_promised():
    pinned = version("constraints.txt", r"^diffusers==([\d.]+)")
    previous = version("Makefile", r"^PREVIOUS +:= ([\d.]+)$")
    promised = version("pyproject.toml", r'"diffusers>=([\d.]+)"')
    assert previous[:2] == (pinned[0], pinned[1] - 1)
    assert promised == previous[:2]
    assert "make test-previous" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_chosen_tests_are_there():
    names = re.search(r"addsuffix \.py, ([\w ]+)\)", (ROOT / "Makefile").read_text("utf-8"))[1].split()
    assert len(names) > 5
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in names)
