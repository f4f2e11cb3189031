"""Training the text encoder: symmetric contrastive loss over image-caption pairs (Radford et al. 2021), and readers
of the context (`ldm/grounding.py`) where asked for."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, distributed, nn
from torch.utils.data import ConcatDataset

from ldm import losses
from ldm import model_io as weights
from ldm.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from ldm.config import UserError, require
from ldm.data import DataConfig, batches, choose_captions, flip_half, open_dataset, spread, stack_images
from ldm.data.faults import Faults, all_captions
from ldm.data.minimal_pairs import alter
from ldm.images import to_float
from ldm.metrics import retrieval
from ldm.tokenizer import Tokenizer
from ldm.train.loop import TrainConfig
from ldm.train.readers import Grounding, GroundingConfig
from ldm.train.task import freeze

AT_ONCE = 32  # pairs in validation, where what is hidden from a reader is drawn for each batch


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Everything `train_clip` can be told. Vocabulary and token ids in `text` are set from the tokenizer."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 2048  # at most; of the tokenizer trained on the captions
    tokenizer: str = ""  # a folder with a tokenizer to use in place of training one
    text_encoder: str = ""  # a text tower to start from, with its tokenizer, in place of `text`; as in train_diffusion
    frozen: tuple[str, ...] = ()  # name patterns of CLIP parameters to leave as they are, e.g. "text_model.*"
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    held_out: int = 512  # validation pairs that retrieval is measured on
    judge: bool = False  # trains on the validation split too, and saves what can judge but not condition a U-Net

    def __post_init__(self) -> None:
        require(self.held_out >= 1, "held_out", self.held_out, "1 or more")
        if self.text_encoder and self.tokenizer:
            raise UserError("text_encoder comes with its own tokenizer: leave out tokenizer, or text_encoder")
        if self.text_encoder and self.judge:
            raise UserError("a judge must not begin as what conditions a U-Net: leave out text_encoder, or judge")


class CLIPTask:
    """One step on a batch of pairs; with many processes the contrast is over the global batch."""

    contrasts = True  # the samples of a batch are compared with each other

    def __init__(self, config: CLIPConfig):
        self.config = config
        self.held_out = open_dataset(config.data, "val")
        self.dataset = open_dataset(config.data, "train")
        if config.judge:
            self.dataset = Joined([self.dataset, self.held_out])
        start = TextEncoder.from_pretrained(config.text_encoder) if config.text_encoder else None
        if config.tokenizer or start:
            self.tokenizer = Tokenizer.from_pretrained(config.tokenizer or weights.find_root(config.text_encoder))
        else:
            captions = (caption for captions in all_captions(self.dataset) for caption in captions)
            self.tokenizer = Tokenizer.train(captions, config.vocab_size, config.text.max_position_embeddings)
        torch.manual_seed(config.train.seed)
        text = replace(
            replace(start.config, projection_dim=config.text.projection_dim) if start else config.text,
            vocab_size=start.config.vocab_size if start else len(self.tokenizer),
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.check_sizes(text)
        vision = replace(config.vision, image_size=config.data.size)
        clip = CLIP(text, vision)
        if start:
            clip.text_model.load_state_dict(start.text_model.state_dict())
        freeze(clip, config.frozen)
        self.modules: dict[str, nn.Module] = {"clip": clip}
        if config.grounding.words or config.grounding.picture:
            self.modules["grounding"] = Grounding(config.grounding, text, vision)
        self.collate = stack_images

    def check_sizes(self, text: TextConfig) -> None:
        """UserError where the patches do not tile the pictures or the tokens do not fit the text tower."""
        size, patch = self.config.data.size, self.config.vision.patch_size
        if size % patch:
            raise UserError(f"data.size {size} must be a multiple of vision.patch_size {patch}")
        have, want = text.max_position_embeddings, self.tokenizer.context_length
        if have < want:
            raise UserError(f"text.max_position_embeddings {have} is less than the tokenizer's context, {want}")

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """The contrastive loss, where pictures that share a caption are not each other's negatives, and those of the
        readers of the context."""
        x = to_float(batch["image"])
        x = flip_half(x, torch.rand(len(x), device=x.device)) if self.config.data.flip else x
        captions = batch["captions"]
        said = choose_captions(captions, torch.rand(len(captions)))
        tokens = self.tokenizer(said, warn=False).to(x.device)
        images, texts, scale, context = modules["clip"](x, tokens)
        if distributed.is_initialized():
            images, texts = Gather.apply(images), Gather.apply(texts)
            captions = gather_object(captions)
        same = sharing(captions).to(x.device)
        loss, values = losses.contrastive(images, texts, scale, same), {"scale": scale}
        if "grounding" in modules:
            reading, parts = modules["grounding"](context, tokens, x)
            loss, values = loss + reading, values | {"contrastive": loss} | parts
        yield "clip", loss, values

    def after_step(self) -> None:
        """Clamps the temperature."""
        self.modules["clip"].clamp_scale()

    def validate(self, device: torch.device) -> dict[str, float]:
        """R@1 and R@5 both ways among validation pairs (the first caption of each; a judge has learned them), beside
        chance; how often a caption is preferred to itself with one word wrong (chance 0.5); the readers' losses."""
        clip, images, texts, wrong, captions = self.modules["clip"], [], [], [], []
        read: dict[str, float] = defaultdict(float)  # sums over the pictures
        for batch in batches(self.held_out, spread(self.held_out, self.config.held_out), AT_ONCE):
            captions += batch["captions"]
            said = [c[0] for c in batch["captions"]]
            x, tokens = to_float(batch["image"].to(device)), self.tokenizer(said, warn=False).to(device)
            context = clip.text_model(tokens)
            images.append(clip.encode_image(x))
            texts.append(clip.embed(context, tokens))
            altered = self.tokenizer(alter(said, batch["captions"]), warn=False).to(device)
            wrong.append(clip.encode_text(altered))
            if "grounding" in self.modules:
                for name, value in self.modules["grounding"](context, tokens, x)[1].items():
                    read[name] += float(value) * len(x)
        image, text, other = (torch.cat(found).cpu() for found in (images, texts, wrong))
        preferred = ((image * text).sum(-1) > (image * other).sum(-1)).float().mean()
        found = retrieval(image, text, same=sharing(captions)) | {"one_word_wrong": float(preferred)}
        return found | {name: value / len(captions) for name, value in read.items()}

    def preview(self, device: torch.device) -> Image.Image | None:
        """Retrieval has no picture."""
        return None

    def export(self, folder: Path, device: torch.device, final: bool) -> None:
        """Writes `folder/clip` (the whole model), `folder/text_encoder` and `folder/tokenizer`; of a judge
        `folder/judge` alone, as what conditions a U-Net must not judge it."""
        clip: Any = self.modules["clip"]
        whole = folder / ("judge" if self.config.judge else "clip")
        clip.save_pretrained(whole)
        self.tokenizer.save_pretrained(whole)
        if self.config.judge:
            return
        clip.text_encoder().save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


class Joined(ConcatDataset):
    """Data sets one after the other, with the captions of each; what is left out counts against all of them."""

    def __init__(self, datasets: list[Any]) -> None:
        super().__init__(datasets)
        parts = [d.faults for d in datasets if hasattr(d, "faults")]
        totals = {(faults.total, *faults.reasons): faults.total for faults in parts}
        self.faults = Faults(parts[0].share, sum(totals.values())) if parts else None
        for faults in parts:
            self.faults.reasons |= faults.reasons
            self.faults.uncounted |= faults.uncounted
        if any(hasattr(d, "lengths") for d in datasets):  # of shards, to be read one after the other
            self.lengths = [n for d in datasets for n in getattr(d, "lengths", [len(d)])]

    def captions(self, index: int) -> list[str]:
        """The captions of picture `index`, without decoding it."""
        which = bisect_right(self.cumulative_sizes, index)
        return self.datasets[which].captions(index - (self.cumulative_sizes[which - 1] if which else 0))


class Gather(torch.autograd.Function):
    """The rows of all processes in order of rank, (B, D) -> (B * world, D); each gets the gradient that all found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Collects; `x` has the same shape everywhere."""
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The sum over processes, of which this one's rows are its own."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size())[distributed.get_rank()]


def sharing(captions: list[list[str]]) -> Tensor:
    """(B, B) bool: whether two of B pictures have a caption in common, each with itself too.

    Over all captions, not those chosen for this step: another wording of the same picture is no negative.
    """
    rows = defaultdict(list)
    for row, own in enumerate(captions):
        for caption in set(own):
            rows[caption].append(row)
    same = torch.eye(len(captions), dtype=torch.bool)
    for shared in rows.values():
        if len(shared) > 1:
            place = torch.tensor(shared)
            same[place[:, None], place] = True
    return same
