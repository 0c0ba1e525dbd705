"""The command line: words in, text or JSON out, exit codes; no decisions."""

from vmnet.cli.main import main

__all__ = ["main"]
