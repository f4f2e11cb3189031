"""Damaged and malicious files: checkpoints with a flipped bit, pickles that run code, names that lead outside."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from PIL import Image
from test_data_shards import tar

from ldm.commands.cli import run_command
from ldm.data import DataConfig, open_dataset
from ldm.metrics.features import feature_extractor
from ldm.model_io import read_json, write_json
from ldm.pipeline_io import load_parts
from soak import common
from soak.common import Child, Row, Work, checkpoints, encoded, finish, trained, training, watched

CONFIG = replace(tiny.TRAIN, save_every=2, ema_decay=0.9)
TIMES = 100
Case = tuple[str, Work, tuple[int, ...]]  # description, its work, exit codes allowed
REFUSED, EITHER = (2,), (0, 2)


def damage(folder: Path, seed: int) -> list[Row]:
    """Flips a bit in, or cuts, one file of the newest checkpoint: it is detected, and the one before is used."""
    rows, whole = [Row("bit flips in checkpoint files"), Row("checkpoint files cut short")], folder / "whole"
    finish(rows[0], tiny.Toy, CONFIG, whole, folder / "log")
    before, last = (int(c.name[-8:]) for c in checkpoints(whole))
    names = sorted(p.relative_to(whole) for p in checkpoints(whole)[-1].rglob("*") if p.is_file())
    for row in rows:
        draw = random.Random(f"{seed} {row.name}")
        for number in range(TIMES):
            out, name = folder / "copy", names[number % len(names)]
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            data, bit = bytearray((whole / name).read_bytes()), draw.randrange(8 * (whole / name).stat().st_size)
            if row is rows[0]:
                data[bit // 8] ^= 1 << bit % 8
            else:
                del data[bit // 8 :]
            (out / name).write_bytes(data)
            child = finish(row, watched(tiny.Toy), replace(CONFIG, steps=last + 1), out, folder / "damaged")
            detected = child.steps()[0] == before and child.error().count("warning: the checkpoint") == 1
            harmless = child.steps()[0] == last and _json(bytes(data)) == _json((whole / name).read_bytes()) is not None
            row.expect(detected or harmless, f"{name}: not detected: {child.error()[-200:]}")
            row.count += 1
        row.notes.append(f"all detected, in {', '.join(sorted({name.name for name in names}))}")
    return rows


def _json(data: bytes) -> Any:
    """The value of JSON, None for other bytes."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def payloads(folder: Path, seed: int) -> list[Row]:
    """All cases, each in a child that may write only within its own folder, `fence`."""
    rows = [Row(f"malicious {kind}") for kind in ("pickles", "JSON", "archives and names of pictures")]
    trained(rows[0], folder)
    finish(rows[0], tiny.Toy, CONFIG, folder / "toy", folder / "toy-log")
    mark, fence = folder / "mark", folder / "fence"
    for row, cases in zip(rows, (_pickles(folder, mark), _configs(folder, mark), _archives(folder)), strict=True):
        refused = 0
        for name, work, codes in cases:
            before = _outside(folder)

            def inside(work: Work = work) -> None:
                os.chdir(fence)
                run_command(work)

            child = Child(inside, folder / "logs" / "case")
            code, error = child.end(), child.error()
            row.count += 1
            refused += code == 2
            right = code in codes and "Traceback" not in error and common.one_error(error) == (code == 2)
            row.expect(right, f"{name}: exit code {code}: {error[-400:]}")
            changed = sorted(_outside(folder) ^ before)
            row.expect(not changed, f"{name}: ran or wrote {changed[:3]}")
            mark.unlink(missing_ok=True)
        row.notes.append(f"{refused} refused in one line, {row.count - refused} read without harm; nothing ran")
    return rows


def _outside(folder: Path) -> set[str]:
    parts = {path.relative_to(folder) for path in folder.rglob("*")}
    return {str(part) for part in parts if part.parts[0] not in ("fence", "logs")}


def _copy(folder: Path, run: str) -> Path:
    """A copy of a run, alone within the fence."""
    shutil.rmtree(folder / "fence", ignore_errors=True)
    return Path(shutil.copytree(folder / run, folder / "fence" / "copy"))


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def _payloads(mark: Path) -> dict[str, bytes]:
    """Files that create `mark` when they are unpickled without care."""

    def saved(value: Any, **options: bool) -> bytes:
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    call, code = Call(os.system, f"touch {mark}"), Call(exec, f"open({str(mark)!r}, 'w').close()")
    return {
        "os.system in a plain pickle": pickle.dumps(call),
        "exec in a plain pickle": pickle.dumps(code),
        "os.system in torch's zip": saved({"state": {0: {"step": call}}, "param_groups": []}),
        "exec in torch's old format": saved({"w": code}, _use_new_zipfile_serialization=False),
        "a whole module": saved(torch.nn.Linear(2, 2)),
        "tensors, then os.system": saved({"a": torch.zeros(2)}) + pickle.dumps(call),
    }


def _pickles(folder: Path, mark: Path) -> Iterator[Case]:
    """In a checkpoint whose manifest fits them, and as the weights of models."""
    weights = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}
    toy = sorted(p.name for p in (checkpoints(folder / "toy")[-1] / "state").iterdir())
    for kind, data in _payloads(mark).items():
        for name in [*toy, "more.pkl"]:
            out = _copy(folder, "toy")
            for checkpoint in checkpoints(out):
                (checkpoint / "state" / name).write_bytes(data)
                entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                table = read_json(checkpoint / "manifest.json")
                table["files"][f"state/{name}"] = entry
                write_json(checkpoint / "manifest.json", table)
            work, codes = training(tiny.Toy, replace(CONFIG, steps=6), out), EITHER if name == "more.pkl" else REFUSED
            yield f"{kind} as {name} of a checkpoint", work, codes
        for part, suffix in ((p, s) for p in weights for s in (".bin", ".safetensors", ".fp16.bin")):
            model = _copy(folder, "diffusion")
            for old in (model / part).glob("*.safetensors"):
                old.unlink()
            (model / part / (weights[part] + suffix)).write_bytes(data)
            yield f"{kind} as {part}{suffix}", partial(load_parts, model), REFUSED
        for name, network in (("pytorch_model.bin", "clip"), ("model.safetensors", "dinov2"), ("a.pth", "inception")):
            model = _copy(folder, "clip") / "clip"
            for old in model.glob("*.safetensors"):
                old.unlink()
            (model / name).write_bytes(data)
            path = f"{network}:{model / name if network == 'inception' else model}"
            yield f"{kind} as {name} of {network}", partial(feature_extractor, path), REFUSED


NAMES = ("../outside", "/etc/passwd", "evil.Evil", "a\x00b", None, ["../x"])
KEYS = {
    "model_index.json": ("_class_name", "vae", "unet", "tokenizer", "_name_or_path"),
    "unet/config.json": ("_class_name", "_name_or_path", "down_block_types", "act_fn"),
    "vae/config.json": ("_class_name", "block_out_channels"),
    "text_encoder/config.json": ("architectures", "model_type", "auto_map", "_name_or_path"),
    "tokenizer/tokenizer_config.json": ("tokenizer_class", "auto_map", "bos_token", "added_tokens_decoder"),
    "scheduler/scheduler_config.json": ("_class_name", "prediction_type", "sampler"),
}


def _configs(folder: Path, mark: Path) -> Iterator[Case]:
    """Names that lead outside, or to code beside the config, wherever a config holds a name."""
    for file, key, value in ((f, k, v) for f, keys in KEYS.items() for k in keys for v in NAMES):
        model = _copy(folder, "diffusion")
        (model / Path(file).parent / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
        write_json(model / file, read_json(model / file) | {key: {"AutoModel": value} if key == "auto_map" else value})
        yield f"{file} {key} {value!r}", partial(load_parts, model), EITHER
    for value in ("../outside.bin", "/etc/passwd", "a/../../b.bin", "", "..", ".", "con\x00.bin", 3, None):
        model = _copy(folder, "diffusion")
        (model / "unet/diffusion_pytorch_model.safetensors").rename(folder / "fence" / "outside.bin")
        write_json(model / "unet/diffusion_pytorch_model.bin.index.json", {"weight_map": {"conv_in.weight": value}})
        yield f"weight_map {value!r}", partial(load_parts, model), REFUSED
    for value in ("../../outside", "/etc/passwd", "state/../../../x", "a\\..\\b"):
        out = _copy(folder, "toy")
        for checkpoint in checkpoints(out):
            table = read_json(checkpoint / "manifest.json")
            table["files"][value] = {"bytes": 1, "sha256": "0"}
            write_json(checkpoint / "manifest.json", table)
        yield f"manifest names {value!r}", training(tiny.Toy, replace(CONFIG, steps=6), out), REFUSED


def _archives(folder: Path) -> Iterator[Case]:
    """Members and links of shards, and metadata of folders, that lead outside."""
    secret, shards, pictures = folder / "secret.png", folder / "fence/shards", folder / "fence/pictures"
    black = encoded(Image.new("RGB", (32, 32)))
    secret.write_bytes(encoded(Image.new("RGB", (32, 32), "white")))
    good = {f"good-{i}": black for i in range(40)}
    targets = (str(secret), "../../secret.png", "/etc/passwd", "good-0.png")
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    names = ("../../escape.png", "/tmp/escape.png", "a/../../../escape.png", "..\\escape.png", "./../escape.png")
    members = [(name, tarfile.REGTYPE, "") for name in names] + [("bad.png", k, t) for k in kinds for t in targets]
    for name, kind, target in members:
        shards.mkdir(parents=True, exist_ok=True)
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, target
        files = [(key + suffix, data) for key in good for suffix, data in ((".png", black), (".txt", b"a dog"))]
        tar(shards / "train-0.tar", [*files, (bad, black), (name.removesuffix("png") + "txt", b"a dog")])
        config = DataConfig(name="shards", path=str(shards), max_broken=0.5)
        yield f"member {name!r}, {kind!r} to {target!r}", partial(_read, config, set(good)), EITHER
    for name in ("../secret.png", "../../secret.png", str(secret), "/etc/passwd", "good.png/../../x", "a\x00b.png"):
        (pictures / "train").mkdir(parents=True, exist_ok=True)
        (pictures / "train/good.png").write_bytes(black)
        lines = [json.dumps({"file_name": n, "text": "a cat"}) + "\n" for n in ("good.png", name)]
        (pictures / "train/metadata.jsonl").write_text("".join(lines))
        config = DataConfig(name="folder", path=str(pictures), max_broken=0.5)
        yield f"metadata names {name!r}", partial(_read, config, {"train/good.png"}), EITHER


def _read(config: DataConfig, good: set[str]) -> None:
    """Reads every sample; fails where one is from outside."""
    dataset = open_dataset(config, "train")
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample["key"] in good and not sample["image"].any(), f"{sample['key']} was read"
