"""Which backend executes packed layers, chosen once, with the reason in words."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, listed
from halfbyte.runtime import cpu, engine

VARIABLE = "HALFBYTE_BACKEND"
NAMES = ("cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """A way to execute packed layers."""

    name: str
    reason: str


@cache
def backend() -> Backend:
    """The backend of this process: what HALFBYTE_BACKEND asks for, else the fastest that works here.

    `cpu` is the C++ engine. `reference` is plain torch; it also runs what the engine does not take (`cpu.plan_for`).

    Raises:
        HalfbyteError: when HALFBYTE_BACKEND names a backend that does not exist or cannot run.
    """
    asked, missing = os.environ.get(VARIABLE), engine.MISSING
    if asked is not None and asked not in NAMES:
        raise HalfbyteError(f"{VARIABLE}={asked!r} names no backend; the backends are {listed(NAMES)}")
    if asked == "cpu" and missing:
        raise HalfbyteError(f"{VARIABLE} asks for the C++ engine, which cannot run: {missing}")
    if not missing:
        engine.check()
    if asked is not None:
        return Backend(asked, f"{VARIABLE} asks for it")
    if missing:
        return Backend("reference", f"plain torch, exact integers, slow; the C++ engine cannot run: {missing}")
    return Backend("cpu", "the C++ engine, the fastest that works here")


def engine_plan(layer: Any, x: Tensor) -> cpu.Plan | None:
    """How the C++ engine runs a packed layer on an input; None where the reference backend does."""
    plan = layer.plan
    if isinstance(plan, str) or not cpu.takes(x):
        return None
    return plan if _engine_chosen() else None


@torch.compiler.assume_constant_result
def _engine_chosen() -> bool:
    return backend().name == "cpu"


def integer_limit() -> float | None:
    """Integer operations a second that this machine can reach with all threads; None where the C++ engine does not run."""
    return engine.integer_limit() if backend().name == "cpu" else None


def describe() -> str:
    """The backend, why it was chosen, and how it runs."""
    chosen = backend()
    details = f"; {engine.describe()}" if chosen.name == "cpu" else ""
    return f"{chosen.name} ({chosen.reason}{details})"
