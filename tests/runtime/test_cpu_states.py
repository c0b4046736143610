"""What else is done with packed layers that the C++ engine runs: copied, saved, moved, compiled, called from threads."""

import copy
import threading

import pytest
import torch
from torch import nn

from halfbyte.errors import PackedError
from halfbyte.layers import FAKE_QUANT
from halfbyte.presets import PRESETS
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime import engine
from halfbyte.runtime.layers import PACKED
from halfbyte.runtime.ops import quantized_forward
from halfbyte.runtime.weights import pack_layer

pytestmark = [
    pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}"),
    pytest.mark.usefixtures("cpu_backend"),
]
QUARTZ = PRESETS["quartz-w4a4"].inner


def pack(layer, spec=QUARTZ):
    return pack_layer(FAKE_QUANT[type(layer)].from_float(layer.requires_grad_(False), spec))


def linear(seed=0, spec=QUARTZ):
    torch.manual_seed(seed)
    return pack(nn.Linear(70, 36), spec)


class Block(nn.Module):
    """Something of everything: convolutions with an image and without a batch axis in sight, linears, one that stays outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = pack(nn.Conv2d(8, 16, 3, padding=1))
        self.norm = nn.GroupNorm(4, 16)
        self.down = pack(nn.Conv2d(16, 16, 3, stride=2, padding=1), INT8)
        self.tokens = pack(nn.Conv1d(16, 24, 1))
        self.out = pack(nn.Linear(24, 10, bias=False), LayerSpec(WeightSpec("e2m1"), ActivationSpec("ue2m2", zero_point=True)))
        self.up = pack(nn.ConvTranspose2d(16, 4, 2))

    def forward(self, x):
        images = self.down(nn.functional.silu(self.norm(self.conv(x))))
        return self.out(self.tokens(images.flatten(2)).transpose(1, 2)), self.up(images)


def expect(packed, x):
    return quantized_forward(packed, x, packed.levels(), packed.weight_scale, packed.bias, packed.spec.activation)


def holds(packed):
    """Which form a layer's codes are in."""
    return {name for name in ("weight_codes", "weight_multiplier", "weight_tiles") if packed._buffers[name] is not None}


NEUTRAL, TILES = {"weight_codes", "weight_multiplier"}, {"weight_tiles"}
READS = {
    "weight_codes": lambda packed: packed.weight_codes,
    "weight_multiplier": lambda packed: packed.weight_multiplier,
    "state_dict": lambda packed: packed.state_dict(),
    "levels": lambda packed: packed.levels(),
    "a move": lambda packed: packed.to("cpu"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_codes_are_held_once(read):
    packed, x = linear(), torch.randn(3, 70)
    codes, shift = packed.weight_codes.clone(), packed.weight_multiplier.clone()
    expected = expect(packed, x)
    for _ in range(2):
        assert holds(packed) == NEUTRAL
        assert torch.equal(packed(x), expected)
        assert holds(packed) == TILES
        read(packed)
        assert holds(packed) == NEUTRAL
        assert torch.equal(packed.weight_codes, codes)
        assert torch.equal(packed.weight_multiplier, shift)


def test_what_is_looked_at_often_leaves_the_tiles_alone():
    packed, x = linear(), torch.randn(3, 70)
    packed(x)
    assert packed.weight.shape == (36, 70)
    assert packed.weight.device == packed.bias.device
    assert "lzs4" in repr(packed)
    assert list(packed.parameters())
    copy.deepcopy(packed)
    assert holds(packed) == TILES


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(640, 320), nn.Linear(1152, 1152), nn.Conv2d(320, 320, 3), nn.Conv2d(320, 640, 1), nn.Linear(320, 1280)],
    ids=str,
)
def test_weights_in_memory_take_at_most_28_percent_of_bf16(layer):
    packed = pack(layer, QUARTZ.replace(weight=QUARTZ.weight.replace(scale="absmax")))
    packed(torch.randn(1, 320, 4, 4)[:, : layer.in_channels] if isinstance(layer, nn.Conv2d) else torch.randn(1, layer.in_features))
    assert holds(packed) == TILES
    assert sum(buffer.nbytes for buffer in packed.buffers()) <= 0.28 * 2 * layer.weight.numel()


def assign(packed, other):
    packed.weight_codes = other.weight_codes.clone()
    packed.weight_multiplier = other.weight_multiplier.clone()
    packed.weight_scale = other.weight_scale.clone()


def write_into(packed, other):
    packed.weight_codes.copy_(other.weight_codes)
    packed.weight_multiplier.copy_(other.weight_multiplier)
    packed.weight_scale.copy_(other.weight_scale)


CHANGES = {
    "load": lambda packed, other: packed.load_state_dict(other.state_dict()),
    "load, assigned": lambda packed, other: packed.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "assignment": assign,
    "in place": write_into,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_new_codes_are_used(change):
    packed, other, x = linear(), linear(seed=1), torch.randn(3, 70)
    other.bias = packed.bias
    before, expected = packed(x), other(x)
    change(packed, other)
    assert not torch.equal(before, expected)
    assert torch.equal(packed(x), expected)


def test_one_new_tensor_keeps_the_other():
    packed, other, x = linear(), linear(seed=1), torch.randn(3, 70)
    packed(x)
    shift = packed.weight_multiplier.clone()
    packed(x)
    packed.weight_codes = other.weight_codes.clone()
    found = packed(x)
    assert torch.equal(packed.weight_codes, other.weight_codes)
    assert torch.equal(packed.weight_multiplier, shift)
    assert torch.equal(found, expect(packed, x))


def test_copies_are_of_their_own():
    packed, other, x = linear(), linear(seed=1), torch.randn(3, 70)
    expected = packed(x)
    twin = copy.deepcopy(packed)
    other.bias = packed.bias
    packed.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), expected)
    assert torch.equal(packed(x), other(x))


def test_to_meta_and_back():
    packed, x = linear(), torch.randn(3, 70)
    expected, state = packed(x), copy.deepcopy(packed.state_dict())
    packed(x)
    packed.to("meta")
    assert all(tensor.is_meta for tensor in packed.state_dict().values())
    with pytest.raises(PackedError, match="codes are on meta"):
        packed(x)
    packed.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(packed(x), expected)


def test_operators_on_meta_tensors_tell_shapes():
    x = torch.empty(2, 3, 70, device="meta", dtype=torch.bfloat16)
    scale = torch.empty(36, 1, device="meta")
    y = torch.ops.halfbyte.linear(x, scale, scale, None, [1, 4, 16, 112, 0, 0])
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 36), torch.bfloat16, "meta")


def test_inference_mode_makes_ordinary_tiles():
    packed, x = linear(), torch.randn(3, 70)
    with torch.inference_mode():
        expected = packed(x)
        assert torch.equal(packed(x), expected)
    assert not packed.weight_tiles.is_inference()
    assert torch.equal(packed(x.requires_grad_()), expected)
    with torch.inference_mode():
        assert not packed.weight_codes.is_inference()


def test_many_threads_at_once():
    packed, other = linear(), linear(seed=1)
    inputs = [torch.randn(rows, 70) for rows in range(1, 9)]
    expected = [packed(x) for x in inputs]
    codes, faults = packed.weight_codes.clone(), []
    start = threading.Barrier(len(inputs) + 1)

    def call(x, y):
        start.wait()
        for _ in range(60):
            if not torch.equal(packed(x), y):
                faults.append(x.shape)

    def read():
        start.wait()
        for _ in range(60):
            if not torch.equal(packed.weight_codes, codes) or packed.state_dict()["weight_multiplier"] is None:
                faults.append("codes")
            other(inputs[0])

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_threads_change_nothing():
    block, x = Block(), torch.randn(3, 8, 9, 9)
    before = torch.get_num_threads()
    expected = block(x)
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, block(x), expected))
    finally:
        torch.set_num_threads(before)


OPERATORS = {
    "linear": lambda tiles, scale: (
        torch.ops.halfbyte.linear.default,
        (torch.randn(3, 70), tiles, scale, torch.ones(36), [1, 4, 16, 112, 0, 0]),
    ),
    "bf16": lambda tiles, scale: (
        torch.ops.halfbyte.linear.default,
        (torch.randn(2, 2, 70).bfloat16(), tiles, scale, None, [8, 0, 16, 127, 0, 0]),
    ),
}


@pytest.mark.parametrize("arguments", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_registered_well(arguments):
    packed = linear()
    operator, given = arguments(packed.tiles(), packed.weight_scale)
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operator_of_convolutions_is_registered_well(layout):
    packed = pack(nn.Conv2d(8, 16, 3, padding=1, stride=2))
    x = torch.randn(2, 8, 7, 5).contiguous(memory_format=layout)
    given = (
        x,
        packed.plan.sizes,
        layout == torch.channels_last,
        packed.tiles(),
        packed.weight_scale,
        packed.bias,
        packed.plan.format,
    )
    torch.library.opcheck(torch.ops.halfbyte.conv2d.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "after a call"])
def test_a_model_compiles_into_one_graph(warm):
    block, x = Block(), torch.randn(2, 8, 9, 9)
    del block.up
    block.up = nn.Identity()
    expected = block(x)
    if not warm:
        block.state_dict()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert all(map(torch.allclose, compiled(x), expected))
    assert holds(block.conv) == TILES
    with torch.inference_mode():
        assert all(map(torch.allclose, compiled(x), expected))


def test_a_compiled_model_sees_new_codes():
    packed, other, x = linear(), linear(seed=1), torch.randn(3, 70)
    other.bias = packed.bias
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for change in CHANGES.values():
        packed.load_state_dict(linear().state_dict())
        assert torch.equal(compiled(x), linear()(x))
        change(packed, other)
        assert torch.equal(compiled(x), other(x))


def test_equal_blocks_share_a_graph():
    """Regional compilation: the tiles are inputs of the graph, not constants in it."""
    blocks = nn.ModuleList(pack(nn.Linear(32, 32)) for _ in range(6))
    frames = []

    def count(graph, _):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(2, 32)
    with torch.no_grad():
        for block in blocks:
            block.compile(backend=count, fullgraph=True)
            assert torch.equal(block(x), expect(block, x))
    assert len(frames) <= 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does that
def test_a_backward_is_refused_when_compiled_too():
    packed, x = linear(), torch.randn(3, 70, requires_grad=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="pass no gradients"):
        torch.compile(packed, backend="aot_eager")(x).sum().backward()


def test_empty_layers_are_ready_for_a_loader():
    made = PACKED[nn.Linear].empty(nn.Linear(70, 36), QUARTZ)
    source, x = linear(), torch.randn(2, 70)
    expected = source(x)
    made.load_state_dict(source.state_dict())
    assert torch.equal(made(x), expected)
