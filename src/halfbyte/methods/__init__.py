"""Quantization methods by name: what each paper adds on top of the shared grids, scales and layers."""
