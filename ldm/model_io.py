"""Model folders: `config.json` and safetensors in the layout of diffusers and transformers, strict both ways."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config import UserError, build, require

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_FILE = "model.safetensors"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers', transformers', and its older one
LARGEST = 2**20  # of all numbers in the config of a model
ASSETS = Path(__file__).parent / "assets" / "models"

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it into place, so that the file is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError when it is missing or broken."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} does not exist; is {str(path.parent)!r} a model folder?") from None
    except (ValueError, RecursionError) as error:  # of its text, or a number of too many digits, or too deep
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(table).__name__}; it must be an object")
    return table


def find_part(folder: str | Path, part: str) -> Path:
    """The folder of one part (`vae`, `unet`, `text_encoder`, ...): `folder` itself, `folder/part`, that of a
    shipped model's name, or that of the newest checkpoint of a run. UserError when there is none."""
    root = find_root(folder)
    for candidate in (root / part, root):
        if _holds_model(candidate):
            return candidate
    raise UserError(f"no {part} in {str(folder)!r}: neither {part}/config.json nor a model's config.json is there")


def _holds_model(folder: Path) -> bool:
    """Whether `config.json` is there and is a model's: a run folder has that of its training."""
    path = folder / "config.json"
    return path.is_file() and any(key in read_json(path) for key in ("_class_name", "model_type", "architectures"))


def find_root(folder: str | Path) -> Path:
    """A model folder from its path, a shipped model's name, or a run whose newest checkpoint it then is."""
    shipped = sorted(p.name for p in ASSETS.iterdir() if p.is_dir()) if ASSETS.is_dir() else []
    root = ASSETS / str(folder) if str(folder) in shipped and not Path(folder).exists() else Path(folder)
    if not root.is_dir():
        raise UserError(
            f"unknown model {str(folder)!r}: neither a folder nor a shipped one ({', '.join(shipped) or 'none'})"
        )
    checkpoints = sorted((root / "checkpoints").glob("step-????????"))  # one being written is hidden
    return checkpoints[-1] if checkpoints and not is_finished(root, checkpoints[-1]) else root


def is_finished(run: Path, checkpoint: Path) -> bool:
    """Whether a run folder holds all files of a model that its newest checkpoint holds, as after the last export."""
    parts = [path.relative_to(checkpoint) for path in checkpoint.glob("*/**/*.json") if path.parent.name != "state"]
    parts += [path.relative_to(checkpoint) for path in checkpoint.glob("*.json") if path.name != "manifest.json"]
    return bool(parts) and all((run / part).is_file() for part in parts)


def module_hash(module: nn.Module) -> str:
    """SHA-256 (hexadecimal) over the names, types, shapes and bytes of a module's sorted state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def to_json(config: Any, class_name: str) -> dict:
    """A dataclass as the config.json that diffusers writes for `class_name`."""
    return {"_class_name": class_name} | dataclasses.asdict(config)


def read_config(folder: Path, cls: type[Config], class_name: str, supported: dict[str, tuple]) -> Config:
    """`config.json` of diffusers' `class_name` as the dataclass `cls`; keys beside its fields must have a value
    listed in `supported`, or be switched off. UserError names what is not supported."""
    table, names = read_json(folder / "config.json"), {f.name for f in dataclasses.fields(cls)}
    if table.get("_class_name", class_name) != class_name:
        raise UserError(f"{str(folder)!r} holds a {table['_class_name']}; supported here: {class_name}")
    for key, value in table.items():
        if key not in names and not key.startswith("_"):
            check_supported(key, value, supported, folder / "config.json")
    return build(cls, {k: v for k, v in table.items() if k in names}, f"{folder}/config.json: ")


def check_supported(key: str, value: Any, supported: dict[str, tuple], path: Path) -> None:
    """UserError unless `value` (of a list, each entry) is one of `supported[key]`; None or False without that."""
    allowed = supported.get(key, (None, False))
    for entry in value if isinstance(value, list) else [value]:
        # To Python, 0 is False; to a config it is not.
        if not any(entry == a and isinstance(entry, bool) == isinstance(a, bool) for a in allowed):
            names = ", ".join(map(repr, allowed))
            raise UserError(f"{path}: {key} = {value!r} is not supported (supported: {names})")


def save_model(folder: str | Path, model: nn.Module, config: dict, file: str) -> None:
    """Writes the weights of one model and then its `config.json`, without which the folder is no model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / file, model.state_dict())
    write_json(folder / "config.json", config)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes safetensors (contiguous, from any device) beside `path` and renames them into place. OSError where the
    disk is full, as from other files."""
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as of other files; some safetensors versions let only their owner read theirs
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
    except safetensors.SafetensorError as error:
        temporary.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error) from None
    os.replace(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a `.bin` that torch opens without running what is pickled in it;
    UserError when the file is missing, damaged, or holds anything else."""
    try:
        if path.suffix == ".bin":
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = safetensors.torch.load_file(path)
    # Broken bytes make the unpickler raise nearly anything: struct.error, IndexError, UnicodeDecodeError, ...
    except Exception as error:
        reason = (str(error).splitlines() or ["it is cut short"])[0]
        raise UserError(f"{str(path)!r} is missing or damaged, or holds more than tensors: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{str(path)!r} is no table of named tensors, which a model's weights are")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a model folder, of one file or of several that an index names (UserError)."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        tensors |= load_tensors(path)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """What holds a folder's weights: safetensors before `.bin`, full precision before `fp16`, one file before shards.

    UserError when there are none."""
    for kind, variant, stem in itertools.product(("safetensors", "bin"), ("", ".fp16"), STEMS):
        single = folder / f"{stem}{variant}.{kind}"
        if single.is_file():
            return [single]
        for name in (f"{stem}.{kind}.index{variant}.json", f"{stem}{variant}.{kind}.index.json"):
            if (folder / name).is_file():
                return _shards(folder / name)
    names = ", ".join(f"{stem}.safetensors" for stem in STEMS[:2])
    raise UserError(
        f"no weights in {str(folder)!r}: none of {names}, their shards with an index, their fp16 variants, or .bin"
    )


def _shards(index: Path) -> list[Path]:
    """The files beside an index that its `weight_map` names (UserError)."""
    table = read_json(index).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise UserError(f"{str(index)!r} has no weight_map from tensors to files beside it")
    return [index.with_name(name) for name in sorted(set(names))]


def load_model(make: Callable[[], Model], folder: Path, tensors: dict[str, Tensor], *configs: Any) -> Model:
    """The model that `make` builds of `configs`, with a folder's weights, in evaluation mode (UserError).

    A config may name any sizes: it is built without memory first, and no further than there are weights.
    """
    for config in configs:
        for key, value in dataclasses.asdict(config).items():
            for entry in value if isinstance(value, tuple) else [value]:
                require(not isinstance(entry, int) or abs(entry) <= LARGEST, key, value, f"at most {LARGEST}")
    count = itertools.count(1)

    def counted(*parameter: Any) -> None:
        if next(count) > 2 * len(tensors) + 100:
            raise UserError(f"{str(folder / 'config.json')!r} is of a model with far more weights than the folder has")

    hook = nn.modules.module.register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"), _Undrawn():
            _check_fit(make().state_dict(), folder, tensors)
    except UserError:
        raise
    except Exception as error:  # sizes that no model has raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{str(folder / 'config.json')!r} describes no model that can be built ({reason})") from None
    finally:
        hook.remove()
    with _Undrawn():
        model = make()
    return load_weights(model, folder, tensors).eval()


class _Undrawn(TorchFunctionMode):
    """Within it, new weights stay as they were allocated, to be loaded: drawing them takes time, and on the meta
    device it imports torch's compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_weights(model: Model, folder: Path, tensors: dict[str, Tensor] | None = None) -> Model:
    """Loads a folder's weights (or `tensors`, already read from it) as float32, every name and shape exactly as
    the model has them; otherwise UserError, and the model stays as it was."""
    tensors = read_tensors(folder) if tensors is None else tensors
    _check_fit(model.state_dict(), folder, tensors)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, strict=True)
    return model


def _check_fit(expected: dict[str, Tensor], folder: Path, tensors: dict[str, Tensor]) -> None:
    """UserError unless names and shapes are the expected ones."""
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = {name: (tuple(tensors[name].shape), tuple(e.shape)) for name, e in expected.items() if name in tensors}
    wrong = [f"{name} is {found}, not {wanted}" for name, (found, wanted) in shapes.items() if found != wanted]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the weights in {str(folder)!r} do not fit its config.json: {problem}: {names[0]}{more}")
