"""Single parts: a layer cut anywhere, of every kind, is the layer packed whole."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from halfbyte.errors import CorruptError
from halfbyte.layers import FAKE_QUANT, matrix_shape, module_kind
from halfbyte.presets import PRESETS
from halfbyte.runtime.layers import PACKED
from halfbyte.runtime.weights import pack_layer
from halfbyte.streaming.plan import Part, row_bytes
from halfbyte.streaming.source import open_component
from halfbyte.streaming.work import make, read

KINDS = {
    "linear": lambda: nn.Linear(40, 12),
    "conv1d": lambda: nn.Conv1d(8, 12, 3),
    "conv2d": lambda: nn.Conv2d(8, 12, (3, 2), groups=2),
    "transposed1d": lambda: nn.ConvTranspose1d(8, 12, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(8, 12, 2, groups=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["quartz-w4a8", "int8-w8a8", "int4-w4a4"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_put_together_are_the_packed_layer(tmp_path, kind, recipe, dtype):
    torch.manual_seed(0)
    layer, spec = KINDS[kind]().to(dtype), PRESETS[recipe].inner
    save_file({"layer.weight": layer.weight.detach()}, tmp_path / "model.safetensors")
    stored = open_component(tmp_path)["layer.weight"]
    expected = pack_layer(FAKE_QUANT[module_kind(layer)].from_float(layer, spec))
    empty = PACKED[module_kind(layer)].empty(layer, spec)
    rows = matrix_shape(layer)[0]
    cuts = [0, rows] if kind.startswith("transposed") else [0, 1, 5, rows]
    found = {name: bytearray(size * rows) for name, size in row_bytes(empty).items()}
    for first, last in itertools.pairwise(cuts):
        part = Part(stored, "layer", first, last, empty)
        for piece in make(part, read(part)).pieces:
            found[piece.name.removeprefix("layer.")][piece.offset : piece.offset + len(piece.content)] = piece.content
    for name, content in found.items():
        assert bytes(content) == getattr(expected, name).numpy().tobytes(), name


def test_a_shard_that_became_shorter_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    stored = open_component(tmp_path)["a"]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptError, match=r"model\.safetensors was cut off while it was read"):
        stored.read(0, stored.nbytes)
    with pytest.raises(CorruptError, match="is truncated or not a safetensors file"):
        open_component(tmp_path)
