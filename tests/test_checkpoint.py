"""Folders and files: whole or not at all, and nothing in them believed before it is checked."""

import contextlib
import copy
import json
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import checkpoint
from halfbyte.errors import CheckpointError, CorruptError, HalfbyteError, OutputExistsError
from halfbyte.recipe import PRESETS

RECIPE = PRESETS["quartz-w4a4"]
ENTRY = checkpoint.layout(RECIPE, {"a": RECIPE.inner, "b": RECIPE.edge, "c": RECIPE.inner}, ["a"])
scraps = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([{}])
)


def places(value, path=()):
    """Every path into nested mappings and lists."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def test_a_layout_is_read_back():
    assert checkpoint.parse_layout(json.loads(json.dumps(ENTRY)), "here") == (
        RECIPE,
        {"a": RECIPE.inner, "b": RECIPE.edge, "c": RECIPE.inner},
        ["a"],
    )
    assert len(ENTRY["specs"]) == 2  # each distinct spec once


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([path for path in places(ENTRY) if path]), scraps)
def test_any_altered_entry_is_read_or_refused_in_a_sentence(path, scrap):
    entry = copy.deepcopy(ENTRY)
    target = entry
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = scrap
    with contextlib.suppress(HalfbyteError):  # anything else is a bug
        recipe, layers, smoothed = checkpoint.parse_layout(entry, "here")
        assert isinstance(recipe.name, str)
        assert isinstance(layers, dict)
        assert isinstance(smoothed, list)


def test_a_folder_appears_whole_with_ordinary_permissions(tmp_path):
    def write(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")
        (folder / "sub" / "file").chmod(0o600)
        assert not (tmp_path / "out").exists()

    checkpoint.write_folder(tmp_path / "out", write)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE((tmp_path / "out" / "sub" / "file").stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)
    with pytest.raises(OutputExistsError):
        checkpoint.write_folder(tmp_path / "out", write)


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_folder_that_fails_leaves_nothing(tmp_path, failure):
    def write(folder):
        (folder / "half").write_text("content")
        raise failure

    expected = CheckpointError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        checkpoint.write_folder(tmp_path / "deep" / "out", write)
    assert not any(path.name.startswith(".out") or path.name == "out" for path in (tmp_path / "deep").iterdir())


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    target = checkpoint.write_file(tmp_path / "new" / "file", b"one")
    assert target.read_bytes() == b"one"
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="the disk is full"):
        checkpoint.write_file(target, b"two")
    assert target.read_bytes() == b"one"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_tensors_survive_sharding_and_shared_names(tmp_path):
    tensors = {f"t{index}": torch.randn(100, generator=torch.Generator().manual_seed(index)) for index in range(9)}
    state = {**tensors, "alias": tensors["t3"]}
    checkpoint.write_tensors(tmp_path, state, {"_class_name": "X"}, max_shard="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = checkpoint.read_tensors(tmp_path)
    assert "alias" not in found
    whole = checkpoint.with_aliases(found, state)
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[key], state[key]) for key in state)
    header = checkpoint.read_header(tmp_path.glob("*.safetensors"))
    assert header["t0"] == ((100,), "F32")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_outside_the_folder_are_not_touched(tmp_path, name):
    with pytest.raises(CorruptError, match="outside its own folder"):
        checkpoint.verify_hashes(tmp_path, {name: "00"})


def test_files_that_are_no_shards_are_named(tmp_path):
    with pytest.raises(CorruptError, match=r"holds no \.safetensors"):
        checkpoint.read_tensors(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 40)
    for read in (checkpoint.read_tensors, lambda folder: checkpoint.read_header(folder.glob("*"))):
        with pytest.raises(CorruptError, match=r"x\.safetensors is truncated or not a safetensors file"):
            read(tmp_path)
