"""Training the text encoder: symmetric contrastive loss over image-caption pairs (Radford et al. 2021), and auxiliary
losses on the context (`ldm/train/auxiliary.py`) where they have a weight."""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather
from torch.utils.data import ConcatDataset

from ldm import losses, model_io
from ldm.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from ldm.config import UserError, require
from ldm.data import DataConfig, choose_captions, spread
from ldm.data.faults import all_captions
from ldm.data.minimal_pairs import alter
from ldm.distributed import Draws, gather_objects, mean_over_processes, upload
from ldm.metrics.alignment import retrieval, sharing
from ldm.tokenizer import Tokenizer
from ldm.train.auxiliary import Grounding, GroundingConfig
from ldm.train.config import TrainConfig, require_least
from ldm.train.loop import Losses, Modules, Task
from ldm.train.optim import freeze

BATCH = 32  # pairs in validation


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """All options of `train_clip`. Vocabulary and token ids in `text` are set from the tokenizer."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 2048  # largest vocabulary of the tokenizer that is trained on the captions
    tokenizer: str = ""  # folder of a tokenizer to use instead of training one
    text_encoder: str = ""  # start from this text tower and its tokenizer (run folder, model) instead of `text`
    frozen: tuple[str, ...] = ()  # name patterns of CLIP parameters that are not trained, e.g. "text_model.*"
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    held_out: int = 512  # validation pairs
    judge: bool = False  # train on the validation split too, and save a model that can judge but not condition a U-Net

    def __post_init__(self) -> None:
        require_least(self, "", 1, "held_out")
        if self.text_encoder and self.tokenizer:
            raise UserError("text_encoder comes with its own tokenizer: leave out tokenizer, or text_encoder")
        if self.text_encoder and self.judge:
            raise UserError(
                "a judge must not start from a model that conditions a U-Net: leave out text_encoder or judge"
            )


class CLIPTask(Task):
    """One step on a batch of pairs; with many processes the contrast is over the global batch."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        if config.judge:
            self.dataset = Joined([self.dataset, self.held_out])
        start = TextEncoder.from_pretrained(config.text_encoder) if config.text_encoder else None
        if config.tokenizer or start:
            self.tokenizer = Tokenizer.from_pretrained(config.tokenizer or config.text_encoder)
        else:
            captions = (caption for captions in all_captions(self.dataset) for caption in captions)
            self.tokenizer = Tokenizer.train(captions, config.vocab_size, config.text.max_position_embeddings)
        text = replace(start.config if start else config.text, projection_dim=config.text.projection_dim)
        t, size, patch = self.tokenizer, config.data.size, config.vision.patch_size
        ids = {"bos_token_id": t.bos_token_id, "eos_token_id": t.eos_token_id, "pad_token_id": t.pad_token_id}
        text = replace(text, vocab_size=text.vocab_size if start else len(t), **ids)
        require(size % patch == 0, "data.size", size, f"a multiple of vision.patch_size {patch}")
        vision, positions = replace(config.vision, image_size=size), text.max_position_embeddings
        allowed = f"{t.context_length} or more, the tokenizer's context"
        require(positions >= t.context_length, "text.max_position_embeddings", positions, allowed)
        clip = CLIP(text, vision)
        if start:
            clip.text_model.load_state_dict(start.text_model.state_dict())
        freeze(clip, config.frozen)
        self.modules = {"clip": clip}
        if config.grounding.words or config.grounding.picture:
            self.modules["grounding"] = Grounding(config.grounding, text, vision)

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The contrastive loss, where images that share a caption are not each other's negatives, and the auxiliary
        losses."""
        x, captions = self.images(batch, draws), batch["captions"]
        ids = self.tokenizer(choose_captions(captions, draws.rand(len(captions))), warn=False)
        tokens = upload(ids, self.device)
        images, texts, scale, context = modules["clip"](x, tokens)
        if distributed.is_initialized():
            images, texts = (torch.cat(all_gather(rows)) for rows in (images, texts))
            captions = [each for part in gather_objects(captions) for each in part]
        same = upload(sharing(captions), x.device)
        loss, values = losses.contrastive(images, texts, scale, same), {"scale": scale}
        if "grounding" in modules:
            values["contrastive"] = loss
            places = self.modules["grounding"].places(ids)
            places = places if places is None else upload(places, self.device)
            for name, (total, count) in modules["grounding"](context, tokens, x, draws, places).items():
                values[name] = total / mean_over_processes(count).clamp(min=1)
                loss = loss + getattr(self.config.grounding, name) * values[name]
        yield "clip", loss, values

    def tokens(self, captions: list[str]) -> Tensor:
        """Token ids (B, L) on the device; captions that are too long are cut."""
        return self.tokenizer(captions, warn=False).to(self.device)

    def after_step(self) -> None:
        """Clamps the temperature."""
        self.modules["clip"].clamp_scale()

    def validate(self, modules: Modules) -> dict[str, float]:
        """R@1 and R@5 both ways among validation pairs (the first caption of each; a judge has learned them), beside
        chance; how often a caption is preferred to itself with one word wrong (chance 0.5); the auxiliary losses."""
        clip, indices, altered = modules["clip"], spread(self.held_out, self.config.held_out), []
        captions = [self.held_out.captions(i) for i in indices]
        first = [texts[0] for texts in captions]
        for start in range(0, len(first), BATCH):
            altered += alter(first[start : start + BATCH], captions[start : start + BATCH])

        def measure(rows: slice, x: Tensor) -> tuple[Tensor, dict[str, float]]:
            tokens = self.tokens(first[rows])
            image, text, _, context = clip(x, tokens)
            embeddings = torch.stack([image, text, clip.encode_text(self.tokens(altered[rows]))])
            sums = modules["grounding"](context, tokens, x, Draws(0, rows.start + len(x))) if len(modules) > 1 else {}
            return embeddings.cpu(), {name: float(total / count) * len(x) for name, (total, count) in sums.items()}

        embeddings, auxiliary = zip(*self.share(measure, self.held_out, indices, BATCH), strict=True)
        image, text, other = torch.cat(embeddings, 1)
        preferred = ((image * text).sum(-1) > (image * other).sum(-1)).float().mean()
        values = retrieval(image, text, same=sharing(captions)) | {"one_word_wrong": float(preferred)}
        return values | {name: sum(part[name] for part in auxiliary) / len(captions) for name in auxiliary[0]}

    def export(self, modules: Modules, folder: Path, measured: None) -> None:
        """Writes `folder/clip` (both towers), `folder/text_encoder` and `folder/tokenizer`; of a judge `folder/judge`
        alone, as the model that conditions a U-Net must not judge it."""
        clip, both = modules["clip"], folder / ("judge" if self.config.judge else "clip")
        for part in (clip, self.tokenizer):
            part.save_pretrained(both)
        if not self.config.judge:
            clip.text_encoder().save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(folder / "tokenizer")

    def check_export(self, folder: Path) -> None:
        """Raises UserError where the run has another vocabulary, as after a change of the captions: its weights are
        those of other tokens."""
        for file in folder.glob("*/vocab.json"):
            if model_io.read_json(file) != self.tokenizer.vocab:
                raise UserError(
                    f"the captions, and with them the vocabulary, have changed since this run was started; to go on"
                    f" give --force tokenizer=COPY, a copy of {str(file.parent)!r}, to start anew another --out"
                )


class Joined(ConcatDataset):
    """Data sets one after the other, with the captions of each."""

    def __init__(self, datasets: list[Any]) -> None:
        super().__init__(datasets)
        self.faults = getattr(datasets[0], "faults", None)

    def captions(self, index: int) -> list[str]:
        """The captions of image `index`, without decoding it."""
        which = bisect_right(self.cumulative_sizes, index)
        return self.datasets[which].captions(index - [0, *self.cumulative_sizes][which])
