"""Linear layers: packed 4-bit against torch, oneDNN and OpenVINO, side by side in one process.

    python bench/linear.py                    # minutes; an idle machine
    python bench/linear.py --smoke            # does it run
    python bench/linear.py --json out.json

`halfbyte bench linear` is the same.
"""

import sys

from halfbyte.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "linear"]
    main()
