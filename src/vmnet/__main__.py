"""`python -m vmnet`: the command line."""

from vmnet.cli import main

main()
