"""Shards laid out in advance have the bytes that safetensors writes."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from halfbyte.streaming.shards import Shards
from halfbyte.streaming.source import DTYPES, bytes_of

names = st.lists(st.text(min_size=1, max_size=6).filter(lambda name: "\0" not in name), unique=True, min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from(list(DTYPES.values()))
counter = itertools.count()


@settings(max_examples=40, deadline=None)
@given(names, st.lists(st.tuples(shapes, dtypes), min_size=6, max_size=6), st.randoms(use_true_random=False))
def test_any_tensors_in_any_order(tmp_path_factory, names, kinds, draw):
    tensors = {}
    for name, (shape, dtype) in zip(names, kinds, strict=False):
        tensors[name] = torch.tensor(draw.choices(range(2), k=int(torch.Size(shape).numel()))).view(shape).to(dtype)
    folder = tmp_path_factory.getbasetemp() / f"shards-{next(counter)}"
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    shards = Shards(folder, meta, "model{suffix}.safetensors", "5GB")
    shards.create()
    for name in draw.sample(sorted(tensors), len(tensors)):
        content = bytes_of(tensors[name].contiguous())
        cut = draw.randint(0, len(content))
        shards.write(name, cut, content[cut:])
        shards.write(name, 0, content[:cut])
        assert shards.read(name, 0, len(content)) == bytes(content)
    assert (folder / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})
