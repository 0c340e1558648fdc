"""`python -m fedipfs`: the same as the `fedipfs` command."""

import sys

from fedipfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
