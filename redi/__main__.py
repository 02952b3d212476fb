"""`python -m redi` is `redi`."""

import sys

from redi.cli import main

if __name__ == "__main__":
    sys.exit(main())
