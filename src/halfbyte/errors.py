"""Every error halfbyte raises on purpose.

    HalfbyteError
    ├── RecipeError          an unknown recipe, grid or key; a combination no layer can hold
    ├── ModelError           what was given is not a model halfbyte can quantize
    │   ├── UnstreamableError   only the model's library, which renames or makes tensors while loading, can read its checkpoint
    │   └── NonFiniteError   a weight or a calibration value is NaN or infinite (the message names the tensor)
    ├── CalibrationError     statistics are missing, or were taken at other timesteps than needed
    ├── CheckpointError      a folder on disk cannot be written or read
    │   ├── OutputExistsError   the output folder is already there
    │   ├── CorruptError        a shard is truncated, altered, missing, or its tensors have the wrong shape
    │   └── VersionError        the checkpoint was written by a newer halfbyte
    ├── PackedError          an operation that packed 4-bit layers cannot do
    ├── RunError             a long run cannot start or go on as asked
    │   ├── HealError           a fine-tune cannot
    │   │   └── DivergedError      the loss became NaN or infinite (the message names layer and timestep)
    │   ├── EvaluationError     an evaluation cannot: its images, its extractor or its figures do not fit together
    │   ├── ResumeError         the run to continue was started with another model, recipe or setting (the message names it)
    │   └── StoppedError        a signal asked the run to stop; its state is saved
    └── MissingExtraError    an optional dependency is not installed (the message has the pip line)

Messages say what came, what is allowed and what to do next.
"""


class HalfbyteError(Exception):
    """Root of the tree; catch this one to catch every intended error of halfbyte."""


class RecipeError(HalfbyteError, ValueError):
    """An unknown recipe, grid or key, or a combination no layer can hold."""


class ModelError(HalfbyteError, ValueError):
    """What was given is not a model halfbyte can quantize."""


class UnstreamableError(ModelError):
    """Only the model's library, which renames or makes tensors while loading, can read its checkpoint."""


class NonFiniteError(ModelError):
    """A weight or a calibration value is NaN or infinite."""


class CalibrationError(HalfbyteError, RuntimeError):
    """Statistics are missing, or were taken at other timesteps than needed."""


class CheckpointError(HalfbyteError, OSError):
    """A folder on disk cannot be written or read."""


class OutputExistsError(CheckpointError):
    """The output folder is already there."""


class CorruptError(CheckpointError):
    """A shard is truncated, altered, missing, or its tensors have the wrong shape."""


class VersionError(CheckpointError):
    """The checkpoint was written by a newer halfbyte."""


class PackedError(HalfbyteError, RuntimeError):
    """An operation that packed 4-bit layers cannot do."""


class RunError(HalfbyteError, RuntimeError):
    """A long run cannot start or go on as asked."""


class HealError(RunError):
    """A fine-tune cannot start or go on as asked."""


class SamplerError(RunError):
    """A pipeline does not sample with the arguments it was given."""


class EvaluationError(RunError):
    """An evaluation cannot start or go on as asked: its images, its extractor or its figures do not fit together."""


class DivergedError(HealError):
    """The loss became NaN or infinite; what was saved last is kept."""


class ResumeError(RunError):
    """The run to continue was started with another model, recipe or setting."""


class StoppedError(RunError):
    """A signal asked the run to stop; its state is saved.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class MissingExtraError(HalfbyteError, ImportError):
    """An optional dependency is not installed."""


def listed(names: object) -> str:
    """The allowed names of an error message: sorted, quoted, joined by commas."""
    return ", ".join(repr(str(name)) for name in sorted(names, key=str))  # type: ignore[call-overload]
