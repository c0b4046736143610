"""Healing: fine-tunes that win back what rounding to 4 bits cost."""
