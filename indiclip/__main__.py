"""`python -m indiclip`."""

import sys

from indiclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
