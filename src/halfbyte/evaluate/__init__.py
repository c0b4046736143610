"""Float against quantized: the same noise through both, and what came out different.

`pairs.py` compares two models' predictions and layers; `images.py` reads and writes sets of images; `sampling.py` samples them into
folders and can be killed at any moment; `measure.py` takes their features and distances; `figures.py` makes figures with intervals.
"""

from halfbyte.evaluate.pairs import (
    Progress,
    States,
    float_states,
    layer_sqnr,
    predict,
    prediction_sqnr,
    sample_batch,
    sample_images,
)

__all__ = ["Progress", "States", "float_states", "layer_sqnr", "predict", "prediction_sqnr", "sample_batch", "sample_images"]
