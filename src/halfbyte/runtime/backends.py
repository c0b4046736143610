"""Which backend executes packed layers, chosen once, with the reason in words."""

import os
from dataclasses import dataclass
from functools import cache

from halfbyte.errors import HalfbyteError, listed

VARIABLE = "HALFBYTE_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A way to execute packed layers."""

    name: str
    reason: str


@cache
def backend() -> Backend:
    """The backend of this process: what HALFBYTE_BACKEND asks for, else the fastest that works here.

    Raises:
        HalfbyteError: when HALFBYTE_BACKEND names a backend that does not exist.
    """
    known = {"reference": "plain torch, exact integers; the only backend in this version"}
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return Backend("reference", known["reference"])
    if asked not in known:
        raise HalfbyteError(f"{VARIABLE}={asked!r} names no backend; the backends are {listed(known)}")
    return Backend(asked, f"{VARIABLE} asks for it")
