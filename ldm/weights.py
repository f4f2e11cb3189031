"""Model folders: `config.json` and safetensors in the layout of diffusers and transformers, strict both ways."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ldm.config import UserError, build

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_FILE = "model.safetensors"
ASSETS = Path(__file__).parent / "assets" / "models"

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it into place, so that the file is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} does not exist; is {str(path.parent)!r} a model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from None


def find_part(folder: str | Path, part: str) -> Path:
    """The folder of one part (`vae`, `unet`, `text_encoder`, ...): `folder` itself, `folder/part`, that of a
    shipped model's name, or that of the newest checkpoint of a run. UserError when there is none."""
    root = find_root(folder)
    for candidate in (root / part, root):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"no {part} in {str(folder)!r}: neither {part}/config.json nor config.json is there")


def find_root(folder: str | Path) -> Path:
    """A model folder from its path, a shipped model's name, or a run whose newest checkpoint it then is."""
    shipped = sorted(p.name for p in ASSETS.iterdir() if p.is_dir()) if ASSETS.is_dir() else []
    root = ASSETS / str(folder) if str(folder) in shipped and not Path(folder).exists() else Path(folder)
    if not root.is_dir():
        raise UserError(
            f"unknown model {str(folder)!r}: neither a folder nor a shipped one ({', '.join(shipped) or 'none'})"
        )
    finished = (root / "model_index.json").exists() or any(root.glob("*/config.json"))
    checkpoints = sorted((root / "checkpoints").glob("step-*"))
    return checkpoints[-1] if checkpoints and not finished else root


def to_json(config: Any, class_name: str) -> dict:
    """A dataclass as the config.json that diffusers writes for `class_name`."""
    return {"_class_name": class_name} | dataclasses.asdict(config)


def read_config(folder: Path, cls: type[Config], supported: dict[str, tuple]) -> Config:
    """`config.json` as the dataclass `cls`; keys beside its fields must have a value listed in `supported`
    (each entry of a list must) or be switched off. UserError names what is not supported."""
    table, names = read_json(folder / "config.json"), {f.name for f in dataclasses.fields(cls)}
    for key, value in table.items():
        if key in names or key.startswith("_"):
            continue
        entries = value if isinstance(value, list) else [value]
        if not all(entry in supported.get(key, (None, False)) for entry in entries):
            allowed = ", ".join(map(repr, supported.get(key, (None, False))))
            raise UserError(f"{folder}/config.json: {key} = {value!r} is not supported (supported: {allowed})")
    return build(cls, {k: v for k, v in table.items() if k in names}, f"{folder}/config.json: ")


def save_model(folder: str | Path, model: nn.Module, config: dict, file: str) -> None:
    """Writes `config.json` and the weights (float32, contiguous) of one model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / file, model.state_dict())
    write_json(folder / "config.json", config)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes safetensors beside `path` and renames them into place."""
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; UserError when it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(path)!r} is missing or damaged: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a model folder, from diffusers' or transformers' file name (UserError when there are none)."""
    for name in (DIFFUSERS_FILE, TRANSFORMERS_FILE):
        if (folder / name).is_file():
            return load_tensors(folder / name)
    raise UserError(f"no weights in {str(folder)!r}: neither {DIFFUSERS_FILE} nor {TRANSFORMERS_FILE} is there")


def load_weights(model: Model, folder: Path) -> Model:
    """Loads a folder's weights, every name and shape exactly as the model has them (UserError otherwise)."""
    tensors = {name: tensor.to(torch.float32) for name, tensor in read_tensors(folder).items()}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the weights in {str(folder)!r} do not fit its config.json: {first}") from None
    return model
