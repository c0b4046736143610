"""Damaged and hostile checkpoints: each ends in a HalfbyteError's sentence or in a load, soon, and inside its own folder.

The mutations run in a process of their own (this file as a script), whose memory is limited: an absurd allocation fails there, and
a crash is seen. A case is a number: `python tests/test_fuzz.py FOLDER 17 1` repeats case 17.
"""

import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

SECONDS = 5  # of processor time that a case may take
MEMORY = 3 << 30  # bytes a case may allocate beyond what the libraries take
OUTSIDE = "outside.safetensors"  # beside the folder: a good shard that no case may load
SCRAPS = (
    None,
    True,
    0,
    -1,
    3,
    10**9,
    10**18,
    2.5,
    float("inf"),
    "",
    "x",
    "../" + OUTSIDE,
    "e\0",
    [],
    {},
    [[]],
    [None] * 9,
    {"a": {}},
)
NAMES = ("../" + OUTSIDE, "/etc/passwd", "nowhere.safetensors", "", ".", "..", "a/../" + OUTSIDE, "config.json", "x\0y", 7, None)
DIFFUSERS_OWN = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError)  # raised before halfbyte is asked


def places(value, path=()):
    """Every path into nested mappings and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def edit_json(draw, content):
    """A JSON object with one entry replaced, removed, renamed or given twice; as text."""
    path = draw.choice(list(places(content)))
    target = content
    for key in path[:-1]:
        target = target[key]
    action = draw.randrange(4)
    if action == 0 and isinstance(target, dict):
        target[draw.choice(["", "extra", "weight_map", "files"])] = target.pop(path[-1])
    elif action == 1:
        del target[path[-1]]
    elif action == 2 and isinstance(target, dict):
        twice = json.dumps({str(path[-1]): draw.choice(SCRAPS)})[:-1] + ","
        return twice + json.dumps(content).lstrip("{")
    else:
        target[path[-1]] = draw.choice(SCRAPS)
    return json.dumps(content)


def damage_text(draw, text):
    """Text cut off, with strange bytes, or nested too deeply."""
    raw, at = text.encode(), draw.randrange(len(text))
    return draw.choice(
        [
            raw[:at],
            raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :],
            b"\xff\xfe" + raw,
            b"[" * 100_000,
            b"",
            raw + raw,
            b"1e999",
        ]
    )


def regular(folder, pattern):
    """The files that an earlier mutation has not replaced by a device."""
    return [file for file in sorted(folder.glob(pattern)) if file.is_file()]


def mutate_json(draw, folder):
    file = draw.choice(regular(folder, "*.json"))
    if draw.random() < 0.7:
        file.write_text(edit_json(draw, json.loads(file.read_text())))
    else:
        file.write_bytes(damage_text(draw, file.read_text()))


def mutate_entry(draw, folder):
    """The quantization entry alone: what halfbyte itself reads."""
    file = regular(folder, "config.json")[0]
    content = json.loads(file.read_text())
    content["quantization_config"] = json.loads(edit_json(draw, content["quantization_config"]))
    file.write_text(json.dumps(content))


def mutate_names(draw, folder):
    """Shard names in the index or the list of digests."""
    index = regular(folder, "*.index.json")[0]
    if draw.random() < 0.6:
        content = json.loads(index.read_text())
        for key in draw.sample(sorted(content["weight_map"]), draw.choice([1, 1, len(content["weight_map"])])):
            content["weight_map"][key] = draw.choice(NAMES)
        index.write_text(json.dumps(content))
    else:
        config = json.loads(regular(folder, "config.json")[0].read_text())
        config["quantization_config"].setdefault("files", {})[str(draw.choice(NAMES))] = draw.choice(["00", 5, None])
        (folder / "config.json").write_text(json.dumps(config))


def mutate_header(draw, folder):
    """The header of a shard: its length, or an entry of it."""
    shard = draw.choice(regular(folder, "*.safetensors"))
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if draw.random() < 0.2:
        absurd = draw.choice([0, 1, length - 1, length + 1, len(raw), 2**31, 2**40, 2**63 - 1, 2**64 - 1])
        shard.write_bytes(absurd.to_bytes(8, "little") + raw[8:])
        return
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, action = header[name], draw.randrange(6)
    if action == 0:
        entry["dtype"] = draw.choice(["F32", "U8", "I64", "F4", "BF16", "", None, 3])
    elif action == 1:
        entry["shape"] = draw.choice([[], [0], [-1], [2**62, 4], [10**9, 10**9], entry["shape"][::-1], [1, *entry["shape"]], "x"])
    elif action == 2:
        entry["data_offsets"] = draw.choice([[0, 0], [0, 2**62], [-4, 4], [8, 4], [len(data), len(data) + 4], [], None])
    elif action == 3:
        header[draw.choice(["", "extra", name + "x", "a" * 10_000])] = header.pop(name)
    elif action == 4:
        del header[name]
    text = json.dumps(header)
    if action == 5:
        text = json.dumps({name: entry})[:-1] + "," + text.lstrip("{")  # the same name twice
    shard.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)


def mutate_bytes(draw, folder):
    """Shards cut off, extended, altered, swapped."""
    shards = regular(folder, "*.safetensors")
    shard, action = draw.choice(shards), draw.randrange(5)
    raw = bytearray(shard.read_bytes())
    if action == 0:
        del raw[draw.randrange(len(raw)) :]
    elif action == 1:
        raw += os.urandom(1) * draw.choice([1, 8, 5000])
    elif action == 2:
        for _ in range(draw.choice([1, 10, 200])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    elif action == 3:
        other = draw.choice(shards)
        shard.write_bytes(other.read_bytes())
        other.write_bytes(raw)
        return
    else:
        shard.unlink()
        return
    shard.write_bytes(raw)


def mutate_links(draw, folder):
    """Files replaced by links, folders, pipes and devices."""
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    action = draw.randrange(5)
    if action == 0:
        file.symlink_to(file.name)
    elif action == 1:
        file.symlink_to("/dev/zero")
    elif action == 2:
        file.mkdir()
    elif action == 3:
        os.mkfifo(file)
    else:
        file.symlink_to("nowhere")


MUTATIONS = (mutate_json, mutate_entry, mutate_names, mutate_header, mutate_bytes, mutate_links)


def forget_digests(folder):
    """As `save_pretrained` leaves a folder: nothing tells that a shard was altered."""
    with contextlib.suppress(Exception):
        config = json.loads(regular(folder, "config.json")[0].read_text())
        del config["quantization_config"]["files"]
        (folder / "config.json").write_text(json.dumps(config))


def diffusers_reads(config):
    """Whether the part of a config that is diffusers' own is as it was."""
    try:
        content = json.loads(config.read_text()) if config.is_file() else {}
        return {key: value for key, value in content.items() if key != "quantization_config"} == OWN_CONFIG
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


OWN_CONFIG: dict = {}  # of the undamaged folder


def timed_out(*_):
    raise TimeoutError(f"more than {SECONDS} s of processor time")


def attempt(folder, arguments):
    """Every way to read the folder; a description of what went wrong, or None."""
    import torch
    from diffusers import DiTTransformer2DModel

    import halfbyte as hb
    from halfbyte.api import describe
    from halfbyte.errors import HalfbyteError

    def run(model):
        with torch.no_grad():
            model(**arguments)

    ways = {
        "info": (lambda: describe(folder), (HalfbyteError,)),
        "load": (lambda: run(hb.load(folder)), (HalfbyteError,)),
        "from_pretrained": (lambda: run(DiTTransformer2DModel.from_pretrained(str(folder))), (HalfbyteError, *DIFFUSERS_OWN)),
    }
    if not all(path.is_file() for path in folder.iterdir()) or not diffusers_reads(folder / "config.json"):
        del ways["from_pretrained"]  # what diffusers makes of pipes, devices and of its own part of the config is not ours to say
    for name, (way, allowed) in ways.items():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            way()
        except allowed as error:
            text = str(error)
            if isinstance(error, HalfbyteError) and ("\n" in text.strip() and name != "from_pretrained"):
                return f"{name}: not one sentence: {text!r}"
        except BaseException:
            return f"{name}: {traceback.format_exc()}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def main(source, first, count):
    """Run cases in this process; prints what went wrong, a JSON line a case."""
    import resource
    import warnings

    import torch

    import halfbyte as hb
    from halfbyte.api import describe

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = {
        "hidden_states": torch.zeros(1, 4, 4, 4),
        "timestep": torch.tensor([1]),
        "class_labels": torch.tensor([1]),
    }
    with torch.no_grad():
        hb.load(source)(**arguments)  # all that is imported and reserved once
    describe(source)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGPROF, timed_out)
    before = {path: path.read_bytes() for path in source.parent.iterdir() if path.is_file()}
    work = source.parent / "case"
    OWN_CONFIG.update(json.loads((source / "config.json").read_text()))
    del OWN_CONFIG["quantization_config"]
    for number in range(first, first + count):
        faulthandler.dump_traceback_later(300, exit=True)  # waiting takes no processor time
        draw = random.Random(number)
        shutil.copytree(source, work / "model")
        if draw.random() < 0.6:
            forget_digests(work / "model")
        for _ in range(draw.choice([1, 1, 1, 2])):
            with contextlib.suppress(Exception):
                draw.choice(MUTATIONS)(draw, work / "model")  # a second one may find nothing left to change
        wrong = attempt(work / "model", arguments)
        if sorted(path.name for path in work.iterdir()) != ["model"]:
            wrong = "wrote outside its folder"
        if before != {path: path.read_bytes() for path in source.parent.iterdir() if path.is_file()}:
            wrong = "changed a file outside its folder"
        if wrong:
            print(json.dumps({"case": number, "wrong": wrong}), flush=True)
        shutil.rmtree(work)
    print("finished", flush=True)


@pytest.fixture
def source(tmp_path):
    """A packed model in several shards, and a good shard beside its folder."""
    import torch
    from diffusers import DiTTransformer2DModel

    import halfbyte as hb

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=4,
        norm_num_groups=4,
    )
    hb.quantize(model, "quartz-w4a4")
    hb.save(model, tmp_path / "source", max_shard_size="8KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    shutil.copy(next((tmp_path / "source").glob("*.safetensors")), tmp_path / OUTSIDE)
    return tmp_path / "source"


def run_cases(source, first, count):
    command = [sys.executable, "-X", "faulthandler", __file__, str(source), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("finished\n"), f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    wrong = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    assert not wrong, f"{len(wrong)} cases, first: {wrong[0]['case']}\n{wrong[0]['wrong']}"


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")


@linux
def test_a_few_dozen_damaged_checkpoints(source):
    run_cases(source, 0, 40)


@linux
@pytest.mark.slow
def test_two_thousand_damaged_checkpoints(source):
    run_cases(source, 0, 2000)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
