"""Models in the layout that ComfyUI loads: its names, and its quantized layers where they hold ours exactly (docs/comfyui.md)."""

from halfbyte.comfyui.verb import Exported as Exported
from halfbyte.comfyui.verb import export as export
