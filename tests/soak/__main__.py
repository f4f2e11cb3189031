"""Runs all groups, or the named ones, and prints a table.

PYTHONPATH=tests python -m soak [--seed N] [GROUP ...]
"""

import argparse
import pickle
import sys
import tempfile
import time
from pathlib import Path

from soak import files, fuzz, interrupts
from soak.common import Child, Row

LONGEST = 1200  # seconds per group
GROUPS = {
    "kill": interrupts.kill,
    "resume": interrupts.resume,
    "damage": files.damage,
    "disk": interrupts.disk,
    "stop": interrupts.stop,
    "fuzz": fuzz.run,
    "pair": interrupts.pair,
}


def run(name: str, folder: Path, seed: int) -> list[Row]:
    """The rows of one group, run in a process of its own."""
    (folder / "work").mkdir(parents=True)
    result = folder / "rows.pickle"
    child = Child(lambda: result.write_bytes(pickle.dumps(GROUPS[name](folder / "work", seed))), folder / "log")
    child.end(LONGEST)
    if result.is_file():
        return pickle.loads(result.read_bytes())
    row = Row(name)
    row.expect(False, f"the group broke off (exit code {child.process.exitcode}): {child.error()[-600:]}")
    return [row]


def main() -> int:
    """Returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: list[Row] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ldm-soak-") as root:
        for name in args.groups or GROUPS:
            start = time.monotonic()
            rows += (group := run(name, Path(root) / name, args.seed))
            print(f"{name}: {', '.join(row.status for row in group)}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nSeed {args.seed}, {(time.monotonic() - begin) / 60:.1f} minutes.\n")
    print("| case | count | outcome | details |\n|---|---|---|---|\n" + "\n".join(row.line() for row in rows))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
