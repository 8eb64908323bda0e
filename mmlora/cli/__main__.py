"""`python -m mmlora.cli`."""

import sys

from mmlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
