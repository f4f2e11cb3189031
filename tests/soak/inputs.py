"""The inputs that are fuzzed: where a valid one lies, how it is spoiled, and what opens it."""

import json
import random
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ldm.config import load
from ldm.data.latents import open_cache
from ldm.model_io import load_tensors, read_json
from ldm.pipeline_io import load_parts
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderConfig
from ldm.train.clip import CLIPConfig
from ldm.train.diffusion import DiffusionConfig
from soak import mutate

ROOT = Path(__file__).parents[2]
CONFIGS = {"autoencoder": AutoencoderConfig, "clip": CLIPConfig, "diffusion": DiffusionConfig}
PARTS = ("vae", "text_encoder", "unet")
Work = Callable[[], object]


class Inputs:
    """Draws spoiled inputs, written into `folder`, where trained models lie; each is what it is about and its work."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.number = folder, draw, 0
        self.model, self.copy = folder / "diffusion", folder / "copy"
        shutil.copytree(self.model, self.copy, ignore=shutil.ignore_patterns("checkpoints"))
        self.sample = runpy.run_path(str(ROOT / "scripts" / "sample.py"))["main"]
        self.kinds: dict[str, tuple[int, Callable[[], tuple[str, Work]]]] = {
            "safetensors": (400, self.tensors),
            "TOML configs": (300, self.toml),
            "overrides": (300, self.overrides),
            "tokenizer files": (300, self.tokenizer),
            "config.json of models": (300, self.config),
            "prompts and options of sampling": (250, self.prompts),
            "prompt files": (150, self.prompt_file),
        }

    def tensors(self) -> tuple[str, Work]:
        """A safetensors file with another header, or other bytes."""
        data = (self.model / "vae/diffusion_pytorch_model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        if self.draw.random() < 0.7:
            header = mutate.json_bytes(self.draw, json.loads(data[8 : 8 + size]))
            length = self.draw.choice((len(header),) * 4 + (len(header) + 1, 0, 2**31, 2**63 - 1, 2**64 - 1))
            data = length.to_bytes(8, "little") + header + data[8 + size :]
        else:
            data = mutate.spoiled_bytes(self.draw, data[: size + 300])
        path = self.folder / "fuzzed.safetensors"
        path.write_bytes(data)
        if self.draw.random() < 0.25:
            return "latent cache", lambda: open_cache(path)
        return "tensors", lambda: load_tensors(path)

    def toml(self) -> tuple[str, Work]:
        """A config that ships, spoiled."""
        path = self.draw.choice(sorted((ROOT / "configs").glob("*/*.toml")))
        kind = next((c for name, c in CONFIGS.items() if name in path.name), CLIPConfig)
        fuzzed = self.folder / "fuzzed.toml"
        lines = path.read_bytes().split(b"\n")
        if self.draw.random() < 0.5:
            self.draw.shuffle(lines)
        if self.draw.random() < 0.5:
            value = json.dumps(mutate.hostile(self.draw)).encode()
            lines = [line.split(b"=")[0] + b"= " + value if self.draw.random() < 0.1 else line for line in lines]
        data = b"\n".join(lines)
        data = mutate.spoiled_bytes(self.draw, data) if self.draw.random() < 0.6 else data
        fuzzed.write_bytes(data)
        return path.name, lambda: load(kind, fuzzed, [])

    def override(self) -> str:
        """`key=value` with a known key, or with anything."""
        names = ("train.steps", "train.optimizer.lr", "data.size", "model.block_out_channels", "text.hidden_size")
        names += (
            "train",
            "train.optimizer",
            "vae",
            "cache",
            "frozen",
            "preview.prompts",
            "schedule.beta_start",
            "a.b.c",
        )
        key = self.draw.choice(names) if self.draw.random() < 0.8 else mutate.text(self.draw)
        value = mutate.hostile(self.draw)
        texts = (
            json.dumps(value),
            str(value),
            mutate.text(self.draw),
            "[" * 3000,
            "9" * 5000,
            "{a=" * 500,
            "1979-13-40",
        )
        return key + self.draw.choice(("=", "=", "=", "", "==")) + self.draw.choice(texts)

    def overrides(self) -> tuple[str, Work]:
        """Some overrides at once."""
        items = [self.override() for _ in range(self.draw.choice((1, 1, 2, 4)))]
        kind = self.draw.choice(list(CONFIGS.values()))
        return " ".join(items), lambda: load(kind, None, items)

    def tokenizer(self) -> tuple[str, Work]:
        """One file of a tokenizer spoiled; it is opened and used."""
        folder = self.folder / "tokenizer"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.model / "tokenizer", folder)
        path = folder / self.draw.choice(sorted(p.name for p in folder.iterdir()))
        if path.suffix == ".json":
            path.write_bytes(mutate.json_bytes(self.draw, read_json(path)))
        else:
            path.write_bytes(mutate.spoiled_bytes(self.draw, path.read_bytes()))
        if self.draw.random() < 0.3:
            self._as_one_file(folder)
        texts = ["a red circle", mutate.text(self.draw)]

        def work() -> None:
            tokenizer = Tokenizer.from_pretrained(folder)
            tokenizer.decode(tokenizer(texts, warn=False)[0])

        return path.name, work

    def _as_one_file(self, folder: Path) -> None:
        """tokenizer.json in place of the vocabulary and the merges."""
        vocab, merges = (
            read_json(self.model / "tokenizer/vocab.json"),
            (self.model / "tokenizer/merges.txt").read_text(),
        )
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges.splitlines()[1:]}
        added = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True, "normalized": False}]
        table = {"model": model, "added_tokens": added, "normalizer": None}
        (folder / "tokenizer.json").write_bytes(mutate.json_bytes(self.draw, table))

    def config(self) -> tuple[str, Work]:
        """One config of a pipeline spoiled, its weights as they were."""
        names = [f"{part}/config.json" for part in PARTS] * 2 + ["scheduler/scheduler_config.json", "model_index.json"]
        name = self.draw.choice(names)
        data = mutate.json_bytes(self.draw, read_json(self.model / name))

        def work() -> None:
            try:
                (self.copy / name).write_bytes(data)
                load_parts(self.copy)
            finally:
                shutil.copyfile(self.model / name, self.copy / name)

        return f"{name} {data[:2000].decode(errors='replace')}", work

    def options(self) -> list[str]:
        """Further arguments of sample.py."""
        names = ("--seed", "--height", "--width", "--guidance", "--guidance-rescale", "--batch-size", "--sampler")
        names += ("--negative-prompt", "--strength", "--interpolate", "--seed-to", "--image", "--mask")
        found = []
        for name in self.draw.sample(names, self.draw.choice((0, 0, 1, 2))):
            values = (str(self.draw.choice(mutate.SIZES)), str(self.draw.choice((0.0, 0.5, -1.0, "nan", "inf", 1e308))))
            found += [f"{name}={self.draw.choice((*values, *values, mutate.text(self.draw)))}"]
        return found

    def sampling(self, *arguments: str) -> tuple[str, Work]:
        """The script within this process, one step of the small model."""
        line = ["sample.py", "--model", str(self.copy), "--steps", "1", "--out", str(self.folder / "out"), *arguments]

        def work() -> None:
            sys.argv = line
            self.sample()

        return " ".join(line[7:]), work

    def prompts(self) -> tuple[str, Work]:
        """One prompt or a few, and options."""
        texts = [mutate.text(self.draw) for _ in range(self.draw.choice((1, 1, 1, 3)))]
        return self.sampling(*(f"--prompt={text}" for text in texts), *self.options())

    def prompt_file(self) -> tuple[str, Work]:
        """A file of prompts in any bytes."""
        path = self.folder / "prompts.txt"
        lines = "\n".join(mutate.text(self.draw) for _ in range(self.draw.choice((1, 2, 6))))
        data = lines.encode(self.draw.choice(("utf-8", "utf-8", "utf-16")), errors="surrogatepass")
        path.write_bytes(mutate.spoiled_bytes(self.draw, data) if self.draw.random() < 0.4 else data)
        return self.sampling(f"--prompts={path}")

    def commands(self) -> list[list[str]]:
        """Twenty command lines of the scripts; what a shell cannot pass, a null byte, is left out."""
        found = []
        for _ in range(8):
            prompt = mutate.text(self.draw).replace("\x00", "")[:2000].encode(errors="replace").decode()
            options = ["--model", "copy", "--steps", "1", "--out", "out", f"--prompt={prompt}"]
            found.append(
                [
                    "sample.py",
                    *options,
                    *(o.replace("\x00", "").encode(errors="replace").decode() for o in self.options()),
                ]
            )
        for i in range(12):
            name = list(CONFIGS)[i % 3]
            path = self.folder / f"command-{i}.toml"
            data = (ROOT / "configs/shapes" / f"{name}.toml").read_bytes()
            path.write_bytes(mutate.spoiled_bytes(self.draw, data) if i % 2 else data)
            item = self.override().replace("\x00", "").encode(errors="replace").decode()
            # a step of nothing, so that what is valid ends too: without data it is refused after the config
            line = [f"train_{name}.py", "--config", path.name, "--out", "new", item, "data.name=folder", "data.path=no"]
            found.append(line)
        return found
