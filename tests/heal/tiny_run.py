"""A small run of the loop as a process of its own, for tests that kill it or start several: tiny_run.py FOLDER [fsdp|quest]."""

import copy
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file

import halfbyte as hb
from halfbyte.heal.distill import _like, _whole, distill
from halfbyte.heal.routing import LoRASettings
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import PoolSettings, StatePool
from halfbyte.heal.talora import TALoRA
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

SETTINGS = Settings(steps=24, batch=8, sampler_steps=4, reuse=2.0, learning_rate=1e-2, log_every=1, ema=0.9, save_minutes=1e-9)


def tiny():
    """A pipeline, and the method on a student of it; always the same."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (16, 32)}
    unet = UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=8, **blocks).eval()
    pipe, student = DDIMPipeline(unet, DDIMScheduler()), copy.deepcopy(unet)
    hb.quantize(student, "int4-w4a4", simulate=True)
    return pipe, student, TALoRA(student, list(range(1000)), LoRASettings(rank=4))


def train(folder):
    pipe, student, method = tiny()
    print("ready", flush=True)
    distill(student, pipe, method, SETTINGS, folder=folder, resume=True)
    final = folder / "final.safetensors"
    if PartialState().is_main_process:
        save_file({name: parameter.detach().contiguous() for name, parameter in student.named_parameters()}, final)


def quest(folder):
    """Both stages of QuEST, with its log and what it left in the folder."""
    pipe, _, _ = tiny()
    student = copy.copy(pipe)
    student.register_modules(unet=copy.deepcopy(pipe.unet))
    spec = LayerSpec(WeightSpec("int4"), ActivationSpec("int4", scale="timestep"))
    hb.quantize(student, Recipe("timed", spec), calibration=2, steps=4, simulate=True)
    print("ready", flush=True)
    own = {key: value for key, value in vars(SETTINGS).items() if key not in ("depth", "weight_decay")}
    result = hb.heal(student, pipe, "quest", output=folder, resume=True, **own)
    if PartialState().is_main_process:
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result.log))
        save_file({name: value.contiguous() for name, value in student.unet.state_dict().items()}, folder / "final.safetensors")


def fsdp(folder):
    """Gradients of a student whose parameters are shared out among the processes, against those of a whole one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pipe, whole, expected = tiny()
    _, shared, method = tiny()
    method.before_step(0)
    expected.before_step(0)
    for model, one in ((whole, expected), (shared, method)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in one.trained())
    batch = StatePool(pipe, PoolSettings(batch=8, sampler_steps=4), range(8)).batch(0)
    expected.loss(whole, batch).mean().backward()
    for block in (*shared.down_blocks, shared.mid_block, *shared.up_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    method.loss(shared, batch).mean().backward()
    known = dict(whole.named_parameters())
    for name, parameter in shared.named_parameters():
        if parameter.requires_grad and known[name].grad is not None:
            assert torch.allclose(_whole(parameter.grad), known[name].grad, rtol=1e-3, atol=1e-5), name
            with torch.no_grad():  # as a continued run takes up its state
                parameter.copy_(_like(2 * known[name], parameter))
            assert torch.equal(_whole(parameter), 2 * known[name]), name
    if dist.get_rank() == 0:
        (folder / "fsdp").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"fsdp": fsdp, "quest": quest}.get(sys.argv[-1], train)(Path(sys.argv[1]))
