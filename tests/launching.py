"""Scripts in two processes through `accelerate launch`, as a user starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "accelerate"
TWO_CPUS = EXAMPLES / "two-cpus.yaml"


def launch(script: str, *arguments: object, cwd: Path, options: tuple = ("--config_file", str(TWO_CPUS))):
    """`accelerate launch` with the example file for two processes on CPU cores, or other options; to its end."""
    started = start(script, *arguments, cwd=cwd, options=(*options, "--main_process_port", "0"))
    out, error = started.communicate(timeout=1800)
    return subprocess.CompletedProcess(started.args, started.returncode, out, error)


def start(script: str, *arguments: object, cwd: Path, options: tuple) -> subprocess.Popen:
    """The same, without waiting for it."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += [str(ROOT / script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
