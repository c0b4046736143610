"""The tree of files in the README cannot rot: all it lists exists, and all there is at the two top levels is listed.

Under the heading "## Files" the README has one fenced block; each line is a path from the repository's root (folders end in "/"),
two or more spaces, and a phrase.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "src/halfbyte/"


def parse_tree(readme: str) -> dict[str, str]:
    """Path -> phrase, from the first fenced block under "## Files"."""
    section = re.search(r"^## Files *\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, 'README.md has no heading "## Files"'
    block = re.search(r"^```\w*\n(.*?)^``` *$", section[1], re.MULTILINE | re.DOTALL)
    assert block, 'README.md has no fenced block under "## Files"'
    tree: dict[str, str] = {}
    for line in filter(str.strip, block[1].splitlines()):
        entry = re.fullmatch(r"(\S+) {2,}(\S.*)", line)
        assert entry, f"not a path, two spaces and a phrase: {line!r}"
        assert entry[1] not in tree, f"listed twice: {entry[1]}"
        tree[entry[1]] = entry[2]
    return tree


def stale(tree: Iterable[str], root: Path) -> list[str]:
    """The listed paths that are not there, or that are a folder without the final slash or a file with it."""
    return [path for path in tree if not ((root / path).is_dir() if path.endswith("/") else (root / path).is_file())]


def entries(files: Iterable[str], folder: str = "") -> set[str]:
    """What lies directly in `folder` ("" or ending in "/"), given all files: names from the root, folders with a final slash."""
    inside = [name.removeprefix(folder) for name in files if name.startswith(folder)]
    return {folder + name.split("/")[0] + ("/" if "/" in name else "") for name in inside}


def missing(tree: Iterable[str], files: Iterable[str]) -> list[str]:
    """What the tree should list and does not: every top-level entry, and all that lies directly in the package."""
    files = list(files)
    return sorted((entries(files) | entries(files, PACKAGE)) - set(tree))


def tracked_files() -> list[str]:
    """Every file git tracks, leaving out those deleted from the working tree."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture
def tree():
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    return parse_tree(readme.read_text("utf-8"))


def test_every_listed_path_exists(tree):
    assert stale(tree, ROOT) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known only in a git checkout")
def test_every_tracked_entry_is_listed(tree):
    assert missing(tree, tracked_files()) == []


README = """# halfbyte
## Files
Words before it.
```text
Makefile       demo, test, lint
src/halfbyte/  the package

tests/         mirror it
```
## More
```
not  in the tree
```
"""


def test_parse():
    assert parse_tree(README) == {"Makefile": "demo, test, lint", "src/halfbyte/": "the package", "tests/": "mirror it"}


@pytest.mark.parametrize(
    ("readme", "sentence"),
    [
        ("# halfbyte\n", 'no heading "## Files"'),
        ("## Files\nnothing\n## More\n```\na  b\n```\n", "no fenced block"),
        ("## Files\n```\nMakefile\n```\n", "not a path"),
        ("## Files\n```\nMakefile one space\n```\n", "not a path"),
        ("## Files\n```\na  one\na  two\n```\n", "listed twice: a"),
    ],
)
def test_parse_refuses(readme, sentence):
    with pytest.raises(AssertionError, match=sentence):
        parse_tree(readme)


def test_stale_paths_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "Makefile").touch()
    assert stale(["docs/", "Makefile"], tmp_path) == []
    assert stale(["docs", "Makefile/", "gone.py"], tmp_path) == ["docs", "Makefile/", "gone.py"]


def test_missing_paths_are_found():
    files = ["Makefile", "src/halfbyte/cli.py", "src/halfbyte/heal/dfa.py", "src/halfbyte/heal/talora.py", "tests/test_cli.py"]
    listed = ["Makefile", "src/", "src/halfbyte/cli.py", "src/halfbyte/heal/", "tests/"]
    assert missing(listed, files) == []
    assert missing(listed[:1], files) == listed[1:]
