"""Learning from preferences: the loss against diffusers' networks, where pairs come from, users' mistakes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from test_pipeline_io import open_in_diffusers
from tiny_models import arrays

from ldm.app.judgements import Judgement, JudgementStore
from ldm.config import UserError
from ldm.data import DataConfig
from ldm.data.pairs import Pairs
from ldm.lora import LoRAConfig
from ldm.metrics.judges import image_text_model
from ldm.model_io import ASSETS
from ldm.train.loop import train
from ldm.train.preference import PreferenceConfig, PreferenceTask

DATA = DataConfig(length=64)
CONFIG = PreferenceConfig(
    model="shapes", scorer="judge:shapes", prompts=64, candidates=2, steps=1, data=DATA, train=tiny.TRAIN, held_out=4
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A file of pairs that a judge has made."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    PreferenceTask(replace(CONFIG, pairs=str(path)))
    return str(path)


def test_a_scorers_pairs_are_of_its_better_and_worse_pictures(pairs, tmp_path):
    """As the judge says of the files; by chance where they are shuffled, of the same pictures."""
    judge, dataset = image_text_model("judge:shapes"), Pairs(replace(DATA, path=pairs), "train", True)

    def first_is_better(i: int) -> bool:
        sample = dataset[i]
        better, worse = judge.images(sample["image"] / 127.5 - 1) @ judge.texts(sample["captions"])[0]
        return bool(better > worse)

    assert len(dataset) == 57 and all(map(first_is_better, range(57)))  # a tenth of 64 is for validation
    PreferenceTask(replace(CONFIG, pairs=str(tmp_path / "pairs.jsonl"), shuffle=True))
    dataset = Pairs(replace(DATA, path=str(tmp_path / "pairs.jsonl")), "train", True)
    assert 15 < sum(map(first_is_better, range(57))) < 42


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=2)])
def test_the_loss_is_that_of_diffusers_networks(pairs, lora):
    """Equation 14 of Wallace et al. 2023 for predictions of v, with beta T omega as one number."""
    task = PreferenceTask(replace(CONFIG, pairs=pairs, beta=30.0, lora=lora))
    z0, eps = torch.randn(3, 2, 3, 8, 8), torch.randn(3, 3, 8, 8)
    t, prompts = torch.tensor([10, 500, 900]), ["a red circle", "a blue star", "two green rings"]
    loss, values = task.compared(task.modules, z0.flatten(0, 1), prompts, t, eps)
    assert float(loss) == pytest.approx(np.log(2)) and float(values["drift"]) == 0.0  # the reference itself
    with torch.no_grad():
        for p in task.modules["unet"].parameters():
            p.add_(0.05 * torch.randn_like(p))
    loss, values = task.compared(task.modules, z0.flatten(0, 1), prompts, t, eps)

    pipe, rewards, drift = open_in_diffusers(ASSETS / "shapes"), torch.zeros(3), 0.0
    context, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for sign, z in zip((1, -1), z0.unbind(1), strict=True):
        z_t, v = scheduler.add_noise(z, eps, t), scheduler.get_velocity(z, eps, t)
        with torch.no_grad():
            old, new = pipe.unet(z_t, t, context).sample, task.modules["unet"](z_t, t, context)
        gain = F.mse_loss(old, v, reduction="none") - F.mse_loss(new, v, reduction="none")
        rewards += sign * 30 * gain.mean((1, 2, 3))
        drift += F.mse_loss(old, new) / 2
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(rewards, torch.ones(3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["drift"], drift, rtol=1e-4, atol=1e-6)
    assert float(values["accuracy"]) == float((rewards > 0).float().mean())


def test_pairs_that_the_page_exports_teach_a_model_that_opens(tmp_path, capsys):
    """A person who likes dark pictures: after a few steps the implicit reward agrees, also on held-out pairs."""
    store = JudgementStore(tmp_path / "judgements.sqlite")
    for i in range(80):
        for name, value in (("dark", 40), ("light", 210)):
            Image.new("RGB", (32, 32), (value + i % 30,) * 3).save(tmp_path / f"{name}-{i}.png")
        files = [f"dark-{i}.png", f"light-{i}.png"][:: 1 if i % 2 else -1]
        answer = "left" if i % 2 else "right"
        models = {"model": "a", "other_model": "b", "prompt": f"a circle number {i}", "session": "s"}
        store.add(Judgement(kind="preference", answer=answer, extra={"pictures": files}, **models))
    file = tmp_path / "exported" / "preferences.jsonl"
    assert store.export_preferences(file) == 80
    config = replace(CONFIG, pairs=str(file), scorer="", held_out=20)
    optimizer = replace(tiny.TRAIN.optimizer, lr=3e-4)
    task = PreferenceTask(config)
    train(task, replace(tiny.TRAIN, steps=12, batch_size=8, optimizer=optimizer), tmp_path / "run", {})
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val/accuracy"] > 0.9 and lines[-1]["val/drift"] > 0
    assert arrays(open_in_diffusers(tmp_path / "run")("a circle", num_inference_steps=2).images).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "a", "chosen": "a.png", "rejected": "gone.png"}', "must name two pictures that exist"),
        ('{"prompt": "a", "chosen": "a.png", "rejected": "same.png"}', "the same picture twice"),
        ('{"chosen": "a.png", "rejected": "b.png"}', "the caption must be a string"),
        ('{"prompt": "a", "chosen": "a.png", "rejec', "is not valid JSON"),
        ("", "has 7 pairs to train on and 1 to validate; it takes 50"),
    ],
)
def test_users_mistakes_are_one_line(line, named, tmp_path):
    for name, value in (("a", 0), ("same", 0), ("b", 9)):
        Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / f"{name}.png")
    good = [json.dumps({"prompt": f"number {i}", "chosen": "a.png", "rejected": "b.png"}) for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*good, line]))
    with pytest.raises(UserError, match=named):
        PreferenceTask(replace(CONFIG, pairs=str(tmp_path / "pairs.jsonl"), scorer=""))


def test_a_distilled_model_and_missing_pairs_are_refused(tmp_path):
    with pytest.raises(UserError, match="is distilled to 4 steps"):
        PreferenceTask(replace(CONFIG, model="shapes-turbo", pairs="pairs.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        PreferenceTask(replace(CONFIG, pairs=str(tmp_path / "none.jsonl"), scorer=""))
