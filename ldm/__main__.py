"""`ldm COMMAND ...`, also as `python -m ldm`. A command's module is imported only when the command runs."""

import sys
from importlib import import_module

from ldm.commands.cli import run_command
from ldm.config import UserError

COMMANDS = {
    "train autoencoder": ("train:autoencoder", "train the VAE on images"),
    "train clip": ("train:clip", "train the text encoder on captioned images"),
    "train diffusion": ("train:diffusion", "train the U-Net on latents and captions"),
    "sample": ("sample:main", "make pictures from prompts"),
    "evaluate": ("evaluate:main", "measure a model, an autoencoder or a folder of pictures"),
    "app": ("app:main", "serve the page on this machine"),
    "data": ("data:main", "build a data set: ldm data emoji"),
    "compare": ("compare:main", "compare a model folder with diffusers, part by part"),
    "benchmark": ("benchmark:main", "measure speed and memory beside diffusers"),
    "plan": ("plan:main", "project the time and cost of a training run"),
    "plot": ("plot:main", "draw the curves of runs and evaluations"),
    "results": ("plot:results", "draw and print the results that a family of configs keeps"),
}


def main() -> None:
    """The console command `ldm`."""
    run_command(_run)


def _run() -> None:
    words = sys.argv[1:]
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            module, _, function = COMMANDS[name][0].partition(":")
            sys.argv = [f"ldm {name}", *words[count:]]
            return getattr(import_module(f"ldm.commands.{module}"), function)()
    if words and words[0] not in ("-h", "--help"):
        raise UserError(f"unknown command {words[0]!r}; known: {', '.join(COMMANDS)}")
    print("usage: ldm COMMAND [options]; ldm COMMAND --help lists the options\n")
    print("\n".join(f"  {name:20}{text}" for name, (_, text) in COMMANDS.items()))


if __name__ == "__main__":
    main()
