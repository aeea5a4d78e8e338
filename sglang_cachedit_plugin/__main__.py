"""``python -m sglang_cachedit_plugin`` is ``sglang-cachedit``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
