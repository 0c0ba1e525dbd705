"""`python -m vmnet`, or this file itself, which starts sooner: the client comes first, and imports next to nothing."""

import sys

if sys.flags.no_site and not __package__:
    sys.path.insert(0, __file__.rpartition("/vmnet/")[0])  # without site packages nobody else knows where vmnet is

from vmnet.client import main

if __name__ == "__main__":
    main()
