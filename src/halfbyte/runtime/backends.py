"""Which backend executes packed layers, chosen once, with the reason in words."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, listed
from halfbyte.runtime import cpu, engine, gpu

VARIABLE = "HALFBYTE_BACKEND"
NAMES = ("cpu", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """A way to execute packed layers."""

    name: str
    reason: str


@cache
def backend(device: str = "cpu") -> Backend:
    """The backend of this process for tensors of a device: what HALFBYTE_BACKEND asks for, else the fastest that works there.

    `cpu` is the C++ engine, `triton` the GPU's. `reference` is plain torch on any device; it also runs what the two do not take
    (`cpu.plan_for`, `gpu.plan_for`). With TRITON_INTERPRET=1, HALFBYTE_BACKEND=triton runs the GPU's kernels on the CPU, slowly.

    Raises:
        HalfbyteError: when HALFBYTE_BACKEND names a backend that does not exist or cannot run.
    """
    asked = os.environ.get(VARIABLE)
    if asked is not None and asked not in NAMES:
        raise HalfbyteError(f"{VARIABLE}={asked!r} names no backend; the backends are {listed(NAMES)}")
    if asked == "triton" and gpu.missing():
        raise HalfbyteError(f"{VARIABLE} asks for the GPU engine, which cannot run: {gpu.missing()}")
    if asked == "reference" or (asked == "triton" and (device != "cpu" or gpu.interpreting())):
        return Backend(asked, f"{VARIABLE} asks for it")
    return _of_cpu(asked) if device == "cpu" else _of_gpu()


@torch.compiler.assume_constant_result
def has_engine() -> bool:
    """Whether the C++ engine runs what is on the CPU."""
    return backend("cpu").name == "cpu"


def _of_gpu() -> Backend:
    if gpu.missing():
        return Backend("reference", f"plain torch, exact integers, slow; the GPU engine cannot run: {gpu.missing()}")
    return Backend("triton", "the Triton kernels, the fastest that works here")


def _of_cpu(asked: str | None) -> Backend:
    missing = engine.MISSING
    if asked == "cpu" and missing:
        raise HalfbyteError(f"{VARIABLE} asks for the C++ engine, which cannot run: {missing}")
    if not missing:
        engine.check()
    if asked == "cpu":
        return Backend(asked, f"{VARIABLE} asks for it")
    if missing:
        return Backend("reference", f"plain torch, exact integers, slow; the C++ engine cannot run: {missing}")
    return Backend("cpu", "the C++ engine, the fastest that works here")


def engine_plan(layer: Any, x: Tensor) -> cpu.Plan | gpu.Plan | None:
    """How one of the engines runs a packed layer on an input; None where the reference backend does."""
    name = _chosen(x.device.type)
    if name == "cpu" and cpu.takes(x):
        return None if isinstance(layer.plan, str) else layer.plan
    if name == "triton" and gpu.takes(x):
        return None if isinstance(layer.gpu_plan, str) else layer.gpu_plan
    return None


@torch.compiler.assume_constant_result
def _chosen(device: str) -> str:
    return backend(device).name if device in ("cpu", "cuda") else "reference"


def integer_limit() -> float | None:
    """Integer operations a second that this machine can reach with all threads; None where the C++ engine does not run."""
    return engine.integer_limit() if backend().name == "cpu" else None


def describe() -> str:
    """The backend, why it was chosen, and how it runs."""
    chosen = backend()
    details = f"; {engine.describe()}" if chosen.name == "cpu" else ""
    told = f"{chosen.name} ({chosen.reason}{details})"
    if torch.cuda.is_available():
        told += f"; on {torch.cuda.get_device_name()}: {backend('cuda').name} ({backend('cuda').reason})"
    return told
