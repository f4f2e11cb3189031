"""`ldm sample`: makes pictures from prompts."""

from ldm.commands.cli import run_command
from ldm.commands.sample import main

if __name__ == "__main__":
    run_command(main)
