"""Rows of whole fresh processes: imports, and from a cold start to the first picture."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm.bench import launch, stats
from ldm.bench.cases import Case
from ldm.bench.sides import WorkerFailed, alternate, environment


def timed(command: Sequence[str], threads: int) -> dict[str, float]:
    """Seconds and peak bytes of one Python process with these arguments. WorkerFailed where it fails."""
    line = [sys.executable, launch.__file__, sys.executable, *command]
    found = subprocess.run(line, capture_output=True, text=True, env=environment(threads), check=True)
    took = json.loads(found.stdout)
    if took["code"]:
        raise WorkerFailed(" ".join(took["error"].split())[:500])
    return took


def measure_processes(case: Case, rounds: int, threads: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """The raw times of a case's commands in alternation, after one round apart that also brings the files into the
    page cache. Commands that make a picture get a folder for it, and the pictures are compared."""
    draws = case.tolerance is not None
    found: dict[str, dict] = {name: {"seconds": [], "peaks": [], "about": {}} for name in case.commands}
    with tempfile.TemporaryDirectory() as root:
        for round_ in range(-1, case.rounds(rounds)):
            for name in alternate(list(case.commands), round_):
                folder = [str(Path(root) / name)] if draws else []
                try:
                    took = timed([*case.commands[name], *folder], threads)
                except WorkerFailed as error:
                    raise WorkerFailed(f"{name}: {error}") from None
                if round_ < 0:
                    found[name]["first"] = took["seconds"]
                    continue
                found[name]["seconds"].append(took["seconds"])
                found[name]["peaks"].append(took["peak"])
            if round_ >= 0:
                tick(case.name)
        pictures = [_picture(Path(root) / name) for name in case.commands] if draws and len(found) == 2 else None
    for side in found.values():
        side["memory"] = {"peak": max(side.pop("peaks"))}
    differs = stats.difference(*pictures, case.tolerance, relative=False) if pictures else None
    return {"sides": found, "repeats": 1, "rates": None, "difference": differs}


def _picture(folder: Path) -> dict:
    """The one picture that a process wrote, as a tensor of 0 to 255."""
    import numpy as np
    import torch
    from PIL import Image

    (path,) = (p for p in folder.glob("*.png") if p.name != "grid.png")
    with Image.open(path) as image:
        return {"picture": torch.from_numpy(np.array(image.convert("RGB"))).float()}
