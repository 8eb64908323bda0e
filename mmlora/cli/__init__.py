"""The `mmlora` command line."""

from mmlora.cli.commands import main

__all__ = ["main"]
