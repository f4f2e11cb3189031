"""What a training tells while it runs: metrics.jsonl and trackers, left_out.jsonl, lines above the progress bar."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ldm.train.state import LeftOut


class Log:
    """One process's part of it; values are gathered on the device and averaged over all processes."""

    def __init__(self, accelerator: Accelerator, out: Path, datasets: list[Any]):
        self.accelerator, self.out, self.main = accelerator, out, accelerator.is_main_process
        self.sums: dict[str, list[Tensor]] = {}  # values since the last line
        self.skipped = 0  # steps since then
        self.left_out = LeftOut(out, datasets)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, of all processes, to go on with after a resume."""
        mine = {name: torch.stack(values).tolist() for name, values in self.sums.items()}
        sums = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        return {"sums": sums, "skipped_since_log": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.skipped = state.get("skipped_since_log", 0)
        # those of this process; with more processes than before, the new ones have none and the means begin anew
        sums, a = state.get("sums", []), self.accelerator
        mine = sums[a.process_index] if len(sums) == a.num_processes else {}
        self.sums = {name: [torch.tensor(v, device=a.device) for v in values] for name, values in mine.items()}

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.main:
            tqdm.write(text)

    def note(self, values: list[dict[str, Tensor]]) -> None:
        """Keeps values for the next log line, which shows their mean; they stay on the device until then."""
        for table in values:
            for name, value in table.items():
                self.sums.setdefault(name, []).append(value)

    def means(self, done: int) -> str:
        """Writes the means since the last call to metrics.jsonl and the trackers; returns the losses in words."""
        means: dict[str, float] = {}
        if self.sums:
            stacked = torch.stack([torch.stack(values).mean() for values in self.sums.values()])
            means = dict(zip(self.sums, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        self.write(done, means | {"skipped": self.skipped})
        self.faults()
        self.sums, self.skipped = {}, 0
        return " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("_loss"))

    def write(self, done: int, values: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and tells the trackers."""
        if self.main:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": done} | values) + "\n")
        self.accelerator.log(values, step=done)

    def faults(self) -> None:
        """Lists samples that were left out for the first time, of all processes, in the run folder."""
        new = self.left_out.new()
        if self.accelerator.num_processes > 1:
            new = {name: why for table in gather_object([new]) for name, why in table.items()}
            self.left_out.add(new)  # so that they are too many in all processes at once
        if self.main and new:
            self.say(f"{self.left_out.write(new)} samples are left out, listed in {self.left_out.file}")
