"""The ablation of MSFP's paper on the demo model: signed FP4 and one LoRA, then mixed signs, TALoRA and DFA, one after the other.
And what halfbyte does by default beyond it: each LoRA has input scales of its own; norms and biases are learned; the loss is the
error of the sampler's next sample; one LoRA, unless asked for more.

    python bench/healing.py                              all rows, three seeds, the same number of steps each
    python bench/healing.py --steps 1500 --seeds 0 1 -o healing.json

Rows of the published table, Frechet (Inception) distance on a data set it does not name: 16.02, 9.60, 8.39, 7.69. Here: the demo's
own features, 512 images from the same noise for every row, and the SQNR of the predicted noise at the float model's own states.
Runs that are in the output file already are not made again.
"""

from halfbyte.bench.ablation import Row, main

ALONE = {"scale_rate": 0, "affine": False}  # the LoRAs alone, as the paper has them
LORA = {"method": "lora", "dfa": "off", **ALONE}
ROWS = {
    "signed FP4, not healed": Row("msfp-signed-w4a4"),
    "mixed signs, not healed": Row("msfp-w4a4"),
    "signed FP4 + one LoRA": Row("msfp-signed-w4a4", LORA, "16.02"),
    "+ mixed signs": Row("msfp-w4a4", LORA, "9.60"),
    "+ TALoRA": Row("msfp-w4a4", {"method": "talora", "dfa": "off", **ALONE}, "8.39"),
    "+ DFA": Row("msfp-w4a4", {"method": "talora", "dfa": "auto", **ALONE}, "7.69"),
    "+ input scales, norms, biases": Row("msfp-w4a4", {"method": "talora", "dfa": "auto"}),
    "by the next sample": Row("msfp-w4a4", {"method": "talora"}),
    "one LoRA, by the next sample": Row("msfp-w4a4", {"method": "lora"}),
}

if __name__ == "__main__":
    main(__doc__, {"components": ROWS}, "healing.json", smoke=("mixed signs, not healed", "+ DFA"))
