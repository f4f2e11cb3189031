"""The record of a training run: metrics.jsonl and tensorboard, left_out.jsonl, lines above the progress bar."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import all_gather_objects


class Log:
    """Means of the logged values over steps and processes; they stay on the device until a line is written."""

    def __init__(self, accelerator: Accelerator, out: Path, datasets: list[Any]) -> None:
        self.accelerator, self.out = accelerator, out
        self.sums: dict[str, Tensor] = {}  # (total, count) since the last line
        self.skipped = 0  # steps since the last line
        self.faults = [d.faults for d in datasets if getattr(d, "faults", None) is not None]
        self.listed = 0  # samples in left_out.jsonl

    def state(self) -> dict[str, Any]:
        """The values since the last line, averaged over processes, for a checkpoint."""
        if self.sums:
            rows = self.accelerator.reduce(torch.stack(list(self.sums.values())), "mean")
            self.sums = dict(zip(self.sums, rows, strict=True))
        return {"sums": {name: row.tolist() for name, row in self.sums.items()}, "skipped_since_log": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        device = self.accelerator.device
        self.sums = {name: torch.tensor(row, device=device) for name, row in state["sums"].items()}
        self.skipped = state["skipped_since_log"]

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def add(self, tables: list[dict[str, Tensor]]) -> None:
        """Adds the values of a step to the means."""
        for name, value in (item for table in tables for item in table.items()):
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value, torch.ones_like(value)])

    def write_means(self, step: int) -> str:
        """Writes the means since the last line; returns the losses for the progress bar."""
        means = {name: total / count for name, (total, count) in self.state()["sums"].items()}
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

    def note_faults(self, faults: dict[str, str]) -> None:
        """Counts samples {name: reason} that could not be read. Raises UserError for too many."""
        for name, reason in faults.items():
            self.faults[0].add(name, reason)

    def list_left_out(self) -> None:
        """Lists the samples that any process has left out in left_out.jsonl, beside those listed before."""
        mine = {name: reason for faults in self.faults for name, reason in faults.reasons.items()}
        reasons = {name: reason for table in all_gather_objects(mine) for name, reason in table.items()}
        self.note_faults(reasons)  # so that they become too many in all processes at once
        if self.accelerator.is_main_process and len(reasons) > self.listed:
            self.listed, file = len(reasons), self.out / "left_out.jsonl"
            lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
            entries = [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may leave half a line
            reasons = {entry["sample"]: entry["why"] for entry in entries} | reasons
            entries = [json.dumps({"sample": name, "why": reason}) for name, reason in reasons.items()]
            file.write_text("\n".join(entries) + "\n")
            self.say(f"{len(reasons)} samples are left out, listed in {file}")
