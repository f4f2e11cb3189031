"""The record of a training run: metrics.jsonl and tensorboard, left_out.jsonl, lines above the progress bar."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import gather_objects
from ldm.model_io import atomic_write


class Log:
    """Means of the logged values over steps and processes; they stay on the device until a line is written."""

    def __init__(self, accelerator: Accelerator, out: Path, datasets: list[Any]) -> None:
        self.accelerator, self.out = accelerator, out
        self.sums: dict[str, Tensor] = {}  # (total, count) since the last line
        self.skipped = 0  # steps since the last line
        self.faults = [d.faults for d in datasets if getattr(d, "faults", None) is not None]
        self.listed: dict[str, str] = {}  # the samples in left_out.jsonl and why

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds values to the means."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value, torch.ones_like(value)])

    def write_means(self, step: int) -> str:
        """Writes the means since the last line; returns the losses for the progress bar."""
        means = {}
        if self.sums:
            totals, counts = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum").unbind(1)
            means = dict(zip(self.sums, (totals / counts).tolist(), strict=True))
        self.write(step, means | {"skipped": self.skipped})
        self.list_left_out()
        self.sums, self.skipped = {}, 0
        return " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("_loss"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and the trackers."""
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def list_left_out(self) -> None:
        """Lists the samples that any process has left out in left_out.jsonl, beside those listed before. Raises
        UserError, in all processes, where they are too many."""
        reasons: dict[str, str] = {}
        for faults in self.faults:
            for table in gather_objects(faults.reasons):
                for name, reason in table.items():
                    faults.add(name, reason)
            reasons |= faults.reasons
        if self.accelerator.is_main_process and reasons.keys() - self.listed.keys():
            file = self.out / "left_out.jsonl"
            lines = file.read_text().splitlines() if file.is_file() else []
            self.listed = {entry["sample"]: entry["why"] for entry in map(json.loads, lines)} | reasons
            entries = [json.dumps({"sample": name, "why": reason}) for name, reason in self.listed.items()]
            with atomic_write(file) as temporary:
                temporary.write_text("\n".join(entries) + "\n")
            self.say(f"{len(reasons)} samples are left out, listed in {file}")
