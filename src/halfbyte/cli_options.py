"""Options that several commands share: what a pipeline's sampler is told beside noise, steps and prompts."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

Guidance = Annotated[float | None, typer.Option(help="Guidance scale, where the model takes one.  \\[default: the pipeline's]")]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument",
        metavar="NAME=VALUE",
        help="A further argument of the pipeline's call, such as height=512; may be repeated.",
    ),
]


def call_arguments(guidance: float | None, given: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of a pipeline's call from the two options; values are read as YAML: 512, 0.5, true, [1, 2], text.

    Raises:
        SamplerError: for what is no NAME=VALUE, or a name given twice.
    """
    import yaml

    from halfbyte.errors import SamplerError

    found: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise SamplerError(f"--argument takes NAME=VALUE, such as height=512, got {text!r}")
        if name in found:
            raise SamplerError(f"{name} is given twice")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:  # such as a prompt with a colon in it
            found[name] = value
    return found
