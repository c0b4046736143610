"""Convolutions: packed 4-bit against torch and oneDNN, channels-last, side by side in one process.

    python bench/conv.py                    # minutes; an idle machine
    python bench/conv.py --smoke            # does it run
    python bench/conv.py --json out.json

`halfbyte bench conv` is the same.
"""

import sys

from halfbyte.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "conv"]
    main()
