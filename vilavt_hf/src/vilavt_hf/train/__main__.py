"""``torchrun … -m vilavt_hf.train CONFIG.yaml [key=value …]``: the same as ``vilavt sft``."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["sft"]
    main()
