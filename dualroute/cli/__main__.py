"""``python -m dualroute.cli``, the same as ``python -m dualroute``."""

import sys

from dualroute.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
