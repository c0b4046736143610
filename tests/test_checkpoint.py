"""Folders and files: whole or not at all, and nothing in them believed before it is checked."""

import contextlib
import copy
import hashlib
import json
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import checkpoint
from halfbyte.errors import CheckpointError, CorruptError, HalfbyteError, OutputExistsError, RecipeError, VersionError
from halfbyte.presets import PRESETS
from halfbyte.recipe import Recipe

RECIPE = PRESETS["quartz-w4a4"]
ENTRY = checkpoint.Layout(RECIPE, {"a": RECIPE.inner, "b": RECIPE.edge, "c": RECIPE.inner}, ["a"]).to_dict()
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
    layers = {"a": RECIPE.inner, "b": RECIPE.edge, "c": RECIPE.inner}
    assert checkpoint.Layout.from_dict(json.loads(json.dumps(ENTRY)), "here") == checkpoint.Layout(RECIPE, layers, ["a"])
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
        found = checkpoint.Layout.from_dict(entry, "here")
        assert set(found.smoothed) <= set(found.layers)
        again = json.loads(json.dumps(found.to_dict()))
        assert repr(checkpoint.Layout.from_dict(again, "here")) == repr(found)  # nothing half understood


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


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"format_version": 2}, VersionError, "reads up to 1"),
        ({"format_version": True}, CorruptError, "positive integer, got True"),
        ({"smoothed": "abc"}, CorruptError, "smoothed must be a list of names"),
        ({"smoothed": ["nowhere"]}, CorruptError, "smoothed must be a list of names"),
        ({"files": {"x": 1}}, CorruptError, "files must be a mapping"),
        ({"layers": {"a": True}}, CorruptError, "spec number True"),
        ({"layers": {"a": -1}}, CorruptError, "spec number -1"),
    ],
)
def test_entries_that_would_be_misread_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        checkpoint.Layout.from_dict({**ENTRY, **change}, "here")


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 9999 + ")" * 9999])
def test_patterns_that_python_cannot_compile_are_a_recipes_error(pattern):
    with pytest.raises(RecipeError, match="no regular expression"):
        Recipe.from_dict({**RECIPE.to_dict(), "keep": [pattern]})


PLACES = {  # paths where nothing can be written, below a folder that holds the file "file" and the dangling link "link"
    "a file as parent": "file/out",
    "too long a name": "a" * 300,
    "a name whose temporary twin is too long": "a" * 250,
}


REFUSED = {
    (kind, name): (kind, place) for kind in ("folder", "file") for name, place in {**PLACES, "the folder itself": "."}.items()
}
REFUSED["folder", "a dangling link"] = ("folder", "link")  # a file may replace a link


@pytest.mark.parametrize(("kind", "place"), REFUSED.values(), ids=map(": ".join, REFUSED))
def test_paths_where_nothing_can_be_written_are_explained(tmp_path, monkeypatch, kind, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"was not written|exists already|is a folder") as caught:
        checkpoint.write_folder(place, lambda folder: None) if kind == "folder" else checkpoint.write_file(place, b"")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "[" * 200_000, "\x00"])
def test_files_that_are_no_json_objects_are_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptError, match=r"config\.json (is not JSON|holds a)"):
        checkpoint.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptError, match="is not JSON"):
        checkpoint.read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.read_json(tmp_path / "nowhere.json")


def test_views_transposes_and_empty_tensors_keep_their_values(tmp_path):
    square, whole = torch.arange(16.0).view(4, 4), torch.arange(12.0)
    state = {
        "square": square,
        "turned": square.T,  # one memory, one shape, other values
        "part": whole[2:5],
        "whole": whole,
        "reshaped": whole.view(3, 4),
        "bits": whole.view(torch.int32),
        "empty": torch.empty(0),
        "codes": torch.empty(0, dtype=torch.uint8),
    }
    expected = {key: tensor.clone() for key, tensor in state.items()}
    checkpoint.write_tensors(tmp_path, state, {"_class_name": "X"})
    found = checkpoint.with_aliases(checkpoint.read_tensors(tmp_path), state)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def test_digests_are_recorded_and_verified(tmp_path):
    tensors = {"a": torch.zeros(300), "b": torch.ones(300)}
    checkpoint.write_tensors(tmp_path, tensors, {"quantization_config": {}}, max_shard="1KB")
    checkpoint.record_hashes(tmp_path)
    files = checkpoint.read_json(tmp_path / "config.json")["quantization_config"]["files"]
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert files == {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
    checkpoint.verify_hashes(tmp_path, files)
    shards[0].write_bytes(shards[0].read_bytes() + b"\x00")
    with pytest.raises(CorruptError, match=f"{shards[0].name} was truncated or altered"):
        checkpoint.verify_hashes(tmp_path, files)
    shards[0].unlink()
    with pytest.raises(CorruptError, match=f"lacks its shard {shards[0].name}"):
        checkpoint.verify_hashes(tmp_path, files)
    for name in ("..", ".", "", "a\0b"):
        with pytest.raises(CorruptError, match=r"lacks its shard|outside its own folder"):
            checkpoint.verify_hashes(tmp_path, {name: "00"})
