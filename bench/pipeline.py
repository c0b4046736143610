"""One step of whole denoisers with random weights: packed 4-bit against torch in bfloat16 and float32.

    python bench/pipeline.py                    # minutes; an idle machine
    python bench/pipeline.py --smoke            # does it run
    python bench/pipeline.py --json out.json

`halfbyte bench pipeline` is the same.
"""

import sys

from halfbyte.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "pipeline"]
    main()
