"""Scripts in two processes through `accelerate launch`, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TWO_CPUS = ROOT / "configs" / "accelerate" / "two-cpus.yaml"


def launch(script: Path | str, *arguments: object, cwd: Path, options: tuple = ("--config_file", str(TWO_CPUS))):
    """`accelerate launch` with the example file for two processes on CPU cores, or other options."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [*accelerate, "--main_process_port", "0", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=1800)
