"""`ldm COMMAND ...`, also as `python -m ldm`. A command's module is imported only when the command runs."""

import sys
from importlib import import_module

from ldm.commands.cli import run_command
from ldm.config import UserError

# Each is `main` of its module in ldm.commands, or the function that the second word names.
COMMANDS = {
    "train autoencoder": "train the VAE on images",
    "train clip": "train the text encoder on captioned images",
    "train diffusion": "train the U-Net on latents and captions",
    "train distill": "distill a model into one that samples in a few steps",
    "train preference": "train a model on pairs of pictures of which one is preferred",
    "sample": "make pictures from prompts",
    "evaluate": "measure a model, an autoencoder or a folder of pictures",
    "export": "write a model as one file for ComfyUI, A1111 and others",
    "app": "serve the page on this machine",
    "data": "build a data set: ldm data emoji",
    "compare": "compare a model folder with diffusers, part by part",
    "benchmark": "measure speed and memory beside diffusers",
    "gpu-check": "check that a GPU computes what a CPU does",
    "plan": "project the time and cost of a training run",
    "plot": "draw the curves of runs and evaluations",
    "results": "draw and print the results that a family of configs keeps",
}


def main() -> None:
    """The console command `ldm`."""
    run_command(_run)


def _run() -> None:
    words = sys.argv[1:]
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            sys.argv = [f"ldm {name}", *words[count:]]
            module, _, function = name.replace("results", "plot results").partition(" ")
            return getattr(import_module(f"ldm.commands.{module.replace('-', '_')}"), function or "main")()
    if words and words[0] not in ("-h", "--help"):
        raise UserError(f"unknown command {words[0]!r}; known: {', '.join(COMMANDS)}")
    print("usage: ldm COMMAND [options]; ldm COMMAND --help lists the options\n")
    print("\n".join(f"  {name:20}{text}" for name, text in COMMANDS.items()))


if __name__ == "__main__":
    main()
