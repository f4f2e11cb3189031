"""Serves the page: `ldm app`."""

from ldm.commands.app import main
from ldm.commands.cli import run_command

if __name__ == "__main__":
    run_command(main)
