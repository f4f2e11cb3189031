"""`ldm results`: draws and prints the results that a family of configs keeps."""

from ldm.commands.cli import run_command
from ldm.commands.plot import results

if __name__ == "__main__":
    run_command(results)
