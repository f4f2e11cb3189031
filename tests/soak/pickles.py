"""Pickles that would leave a mark when they are opened carelessly, in all wrappings that torch reads."""

import io
import os
import pickle
import subprocess
from pathlib import Path

import torch


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function: object, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def payloads(mark: Path) -> dict[str, bytes]:
    """Name -> bytes that create the file `mark` where they are unpickled without care."""
    code = f"open({str(mark)!r}, 'w').close()"
    calls = {
        "os.system": Call(os.system, f"touch {mark}"),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(open, str(mark), "w"),
        "Popen": Call(subprocess.Popen, ["touch", str(mark)]),
    }
    found = {f"{name} in a plain pickle": pickle.dumps(call) for name, call in calls.items()}
    for name in ("os.system", "exec"):
        call = calls[name]
        state = {"state": {0: {"exp_avg": torch.zeros(2), "step": call}}, "param_groups": []}
        found[f"{name} in torch's zip"] = _saved(state)
        found[f"{name} in torch's old format"] = _saved({"weight": call}, _use_new_zipfile_serialization=False)
    found["a whole module"] = _saved(torch.nn.Linear(2, 2))
    found["tensors, then os.system"] = _saved({"a": torch.zeros(2)}) + pickle.dumps(calls["os.system"])
    return found


def _saved(value: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()
