"""Files that would run something or reach outside their folder: none does, and each is refused in one line or read
as what it is. What would run leaves a mark; after each the mark and the files outside are looked for."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import tiny

from ldm.commands.cli import run_script
from ldm.metrics.features import feature_extractor
from ldm.model_io import read_json, write_json
from ldm.pipeline_io import load_parts
from ldm.train import manifest
from ldm.train import state as run_state
from soak import archives
from soak.common import Child, Row, training
from soak.models import CONFIG, finish, trained
from soak.pickles import payloads

Case = tuple[str, Callable[[], None], tuple[int, ...]]  # in words, what opens it, exit codes allowed
REFUSED, EITHER = (2,), (0, 2)


def run(folder: Path, seed: int) -> list[Row]:
    """All cases, each in a process of its own, in a folder that nothing may be written beside."""
    rows = [Row(f"malicious {what}") for what in ("pickles", "JSON", "archives and names of pictures")]
    trained(rows[0], folder)
    finish(rows[0], folder / "toy-log", tiny.Toy, CONFIG, folder / "toy")
    mark = folder / "canary"
    fence = folder / "fence"
    cases = (_pickles(folder, fence, mark), _json(folder, fence, mark), archives.cases(fence, folder))
    for row, found in zip(rows, cases, strict=True):
        refused = 0
        for what, work, codes in found:
            before = _listed(folder)
            child = Child(_script(work, fence), folder / "logs" / "case")
            code, error = child.end(), child.error()
            row.count += 1
            refused += code == 2
            row.expect(code in codes and "Traceback" not in error, f"{what}: exit code {code}: {error[-400:]}")
            lines = [line for line in error.splitlines() if line.startswith("error:")]
            row.expect(len(lines) == (code == 2), f"{what}: {len(lines)} lines of error")
            row.expect(not mark.exists(), f"{what}: it ran")
            row.expect(_listed(folder) == before, f"{what}: wrote {sorted(_listed(folder) ^ before)[:3]}")
            mark.unlink(missing_ok=True)
        row.notes.append(f"{refused} refused in one line, {row.count - refused} read without harm; nothing ran")
    return rows


def _script(work: Callable[[], None], fence: Path) -> Callable[[], None]:
    def inside() -> None:
        warnings.simplefilter("default")
        os.chdir(fence)
        run_script(work)

    return inside


def _listed(folder: Path) -> set[str]:
    """All files outside the fence, but for the logs."""
    parts = {path.relative_to(folder) for path in folder.rglob("*")}
    return {str(part) for part in parts if part.parts[0] not in ("fence", "logs")}


def _fresh(fence: Path, source: Path) -> Path:
    """A copy of a run within the fence, alone there."""
    shutil.rmtree(fence, ignore_errors=True)
    shutil.copytree(source, fence / "copy")
    return fence / "copy"


def _pickles(folder: Path, fence: Path, mark: Path) -> Iterator[Case]:
    """In a checkpoint whose manifest fits them, and in place of the weights of models."""
    for kind, data in payloads(mark).items():
        for file in ("first-optimizer.pt", "second.safetensors", "first-ema.safetensors", "state.json", "more.pkl"):
            out = _fresh(fence, folder / "toy")
            for checkpoint in run_state.checkpoints(out):
                (checkpoint / "state" / file).write_bytes(data)
                manifest.seal(checkpoint)
            work = training(tiny.Toy, replace(CONFIG, steps=6), out)
            yield f"{kind} as {file} of a checkpoint", work, EITHER if file == "more.pkl" else REFUSED
        for part, name in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "pytorch_model"),
        ):
            for suffix in (".bin", ".safetensors", ".fp16.bin"):
                model = _fresh(fence, folder / "diffusion")
                for old in (model / part).glob("*.safetensors"):
                    old.unlink()
                (model / part / (name + suffix)).write_bytes(data)
                yield f"{kind} as {part}/{name}{suffix}", lambda model=model: load_parts(model), REFUSED
        model = _fresh(fence, folder / "clip")
        for old in (model / "clip").glob("*.safetensors"):
            old.unlink()
        for name in ("pytorch_model.bin", "model.safetensors"):
            (model / "clip" / name).write_bytes(data)
            for network in (f"clip:{model}/clip", f"dinov2:{model}/clip"):
                yield f"{kind} as {name} of {network[:6]}", lambda n=network: feature_extractor(n), REFUSED
            (model / "clip" / name).unlink()
        (model / "net.pth").write_bytes(data)
        yield f"{kind} of inception", lambda m=model: feature_extractor(f"inception:{m}/net.pth"), REFUSED
        (model / "cache.safetensors").write_bytes(data)
        yield f"{kind} as latent cache", lambda m=model: _open_cache(folder, m / "cache.safetensors"), REFUSED


def _open_cache(folder: Path, cache: Path) -> None:
    from ldm.train.diffusion import DiffusionTask

    DiffusionTask(tiny.diffusion(folder / "autoencoder", folder / "clip", cache=str(cache)))


EVIL = "open({mark!r}, 'w').close()\nclass Evil:\n    pass\n"
NAMES = ("../outside", "../../outside", "/etc/passwd", "os.system", "evil.Evil", "a\x00b", "", None, 7, ["../x"])


def _json(folder: Path, fence: Path, mark: Path) -> Iterator[Case]:
    """Names that lead outside or to code beside the config, wherever a config may hold a name."""
    keys = {
        "model_index.json": ("_class_name", "vae", "unet", "tokenizer", "_name_or_path"),
        "unet/config.json": ("_class_name", "_name_or_path", "down_block_types", "act_fn"),
        "vae/config.json": ("_class_name", "block_out_channels"),
        "text_encoder/config.json": ("architectures", "model_type", "auto_map", "_name_or_path"),
        "tokenizer/tokenizer_config.json": ("tokenizer_class", "auto_map", "bos_token", "added_tokens_decoder"),
        "scheduler/scheduler_config.json": ("_class_name", "prediction_type", "sampler"),
    }
    for file, names in keys.items():
        for key in names:
            for value in NAMES:
                model = _fresh(fence, folder / "diffusion")
                (fence / "outside").mkdir()
                (model / Path(file).parent / "evil.py").write_text(EVIL.format(mark=str(mark)))
                wrong = {"AutoModel": value} if key == "auto_map" else value
                write_json(model / file, read_json(model / file) | {key: wrong})
                yield f"{file} {key} {value!r}", lambda m=model: load_parts(m), EITHER
    for value in ("../outside.bin", "/etc/passwd", "a/../../b.bin", "", "..", ".", "con\x00.bin", 3, None):
        model = _fresh(fence, folder / "diffusion")
        (model / "unet/diffusion_pytorch_model.safetensors").rename(fence / "outside.bin")
        write_json(model / "unet/diffusion_pytorch_model.bin.index.json", {"weight_map": {"conv_in.weight": value}})
        yield f"weight_map {value!r}", lambda m=model: load_parts(m), REFUSED
    for value in ("../../outside", "/etc/passwd", "state/../../../x", "a\\..\\b"):
        out = _fresh(fence, folder / "toy")
        for checkpoint in run_state.checkpoints(out):
            table = read_json(checkpoint / manifest.NAME)
            table["files"][value] = {"bytes": 1, "sha256": "0"}
            write_json(checkpoint / manifest.NAME, table)
        yield f"manifest names {value!r}", training(tiny.Toy, replace(CONFIG, steps=6), out), REFUSED
