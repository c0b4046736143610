"""Healing: fine-tunes that win back what rounding to 4 bits cost.

`halfbyte.heal` is both this folder and the verb: the module can be called. (Python binds a sub-module to its name in the package as
soon as anything in it is imported, so a function of the same name would be lost.)
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.heal.result import HealResult


class _Heal(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> "HealResult":
        """See `halfbyte.heal.verb.heal`."""
        from halfbyte.heal.verb import heal

        return heal(*args, **options)


sys.modules[__name__].__class__ = _Heal
