"""Feature networks and judges by name, each against the library it comes from."""

import hashlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip import TOKENS, text_config, vision_config
from tiny_models import randomize

from ldm.clip import CLIP
from ldm.config import UserError
from ldm.images import to_uint8
from ldm.metrics.features import feature_extractor
from ldm.metrics.inputs import resized
from ldm.metrics.judges import image_text_model
from ldm.tokenizer import Tokenizer


def pictures(count: int = 2, size: int = 40) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(count, 3, size, size) * 2 - 1


def picture_and_pixels(size: int) -> tuple[torch.Tensor, np.ndarray]:
    """A picture (1, 3, size, size) in [-1, 1], and as uint8 (size, size, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1, pixels


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge as train_clip saves it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(["a red circle", "two blue stars"], 540, context_length=16)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": tokenizer.pad_token_id}
    randomize(CLIP(text_config(**sizes, **ends), vision_config())).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return folder


def test_pictures_are_resized_as_pillow_does():
    """Antialiased, unlike torch's default, which is far off."""
    x, pixels = picture_and_pixels(96)
    ours = to_uint8(resized(32, torch.zeros(3), torch.ones(3))(x))[0].permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2
    assert torch.equal(resized(96, torch.zeros(3), torch.full((3,), 0.5))(x), 2 * x)


@pytest.mark.parametrize("version, size, digest", [(0, 224, "57934424"), (1, 240, "77cc7160")])
def test_effnet_lite_has_features_of_any_size_and_names_a_cat(version, size, digest):
    from skimage import data

    effnet = feature_extractor(f"effnet-lite{version}")
    cat = torch.from_numpy(data.chelsea()[:, 75:375]).permute(2, 0, 1)[None] / 127.5 - 1
    rows = effnet(cat)
    assert rows.shape == (1, 1280) and rows.dtype == torch.float32
    assert (effnet.name, effnet.size) == (f"effnet-lite{version}", size)
    assert effnet.sha256.startswith(digest) and len(effnet.sha256) == 64
    classes = effnet.probabilities(rows)
    assert classes.shape == (1, 1000) and classes.sum().item() == pytest.approx(1, abs=1e-5)
    assert classes.argmax().item() in (281, 282, 285)  # tabby, tiger and Egyptian cat
    assert effnet(pictures(size=32)).shape == (2, 1280)


def test_judge_is_the_clip_of_the_folder_and_opens_in_transformers(judge):
    model = image_text_model(str(judge))
    assert model.name == f"judge:{judge}" and len(model.sha256) == 64 and model.size == 16
    assert model.learned_val and model.metadata["resize"] == "16 px, bicubic, antialiased"
    clip, tokenizer = CLIP.from_pretrained(judge / "judge"), Tokenizer.from_pretrained(judge / "judge")
    x = pictures(size=16)
    assert torch.allclose(model.images(x), clip.encode_image(x))
    with pytest.raises(ValueError, match="not torch.uint8; ldm.images.to_float"):
        model.images(x.byte())
    captions = ["a red circle", "two blue stars " * 20]  # the second is cut, without a warning
    assert torch.allclose(model.texts(captions), clip.encode_text(tokenizer(captions, warn=False)))
    extractor = feature_extractor(f"judge:{judge}")
    assert torch.allclose(extractor(x), model.images(x)) and extractor.metadata == model.metadata
    assert extractor.probabilities(extractor(x)) is None
    theirs = image_text_model(f"clip:{judge / 'judge'}")  # by transformers' model, tokenizer and image processor
    assert torch.allclose(model.images(x), theirs.images(x), atol=1e-5)
    assert torch.allclose(model.texts(captions[:1]), theirs.texts(captions[:1]), atol=1e-5)


def test_published_clip_is_transformers_own(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"text_config": asdict(text_config()), "vision_config": asdict(vision_config())}
    model = randomize(CLIPModel(CLIPConfig(**sizes, projection_dim=20))).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor.save_pretrained(tmp_path)
    Tokenizer.train(["a red circle"], 514, context_length=9).save_pretrained(tmp_path)
    x, pixels = picture_and_pixels(16)
    values = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    expected = model(input_ids=TOKENS, pixel_values=values).image_embeds
    assert torch.allclose(image_text_model(f"clip:{tmp_path}").images(x), expected, atol=1e-5)
    assert torch.allclose(feature_extractor(f"clip:{tmp_path}")(x), expected, atol=1e-5)


def test_dinov2_is_transformers_own_and_missing_weights_are_not_initialized_in_silence(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoImageProcessor, BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    randomize(Dinov2Model(Dinov2Config(**sizes))).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    x, pixels = picture_and_pixels(28)
    values = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels), return_tensors="pt").pixel_values
    extractor = feature_extractor(f"dinov2:{tmp_path}")
    expected = Dinov2Model.from_pretrained(tmp_path).eval()(values).pooler_output
    assert torch.allclose(extractor(x), expected, atol=1e-5)
    assert extractor.metadata["extractor"] == f"dinov2:{tmp_path}" and len(extractor.sha256) == 64

    BitImageProcessor(size={"shortest_edge": 28}, crop_size=None, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="names no square crop_size"):
        feature_extractor(f"dinov2:{tmp_path}")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "layernorm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not all weights of a Dinov2Model: 'layernorm.weight' is missing"):
        feature_extractor(f"dinov2:{tmp_path}")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """FID's network with random weights, in a file as it is released."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3("inception", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(net.state_dict(), file)
    return file


def test_inception_is_torch_fidelitys(inception_file, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    sha256 = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr("ldm.metrics.features.INCEPTION_SHA256", sha256)
    ours = feature_extractor(f"inception:{inception_file}")
    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(inception_file))
    x = pictures()
    pooled, logits = theirs(to_uint8(x))
    assert torch.allclose(ours(x), pooled) and pooled.std() > 0
    assert torch.allclose(ours.probabilities(ours(x)), logits.softmax(1), atol=1e-6)
    assert (ours.name, ours.sha256, ours.size) == ("inception", sha256, 299) and "TensorFlow" in ours.metadata["resize"]


def test_inception_with_other_weights_or_none_is_refused(inception_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="SHA-256 .* expected 6726825d"):
        feature_extractor(f"inception:{inception_file}")
    with pytest.raises(UserError, match="nowhere.pth' does not exist; put the file there"):
        feature_extractor(f"inception:{tmp_path}/nowhere.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="weights-inception-2015-12-05-6726825d.pth is not in .*effnet-lite1"):
        feature_extractor("inception")


@pytest.mark.parametrize("file", ["", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("name", ["clip:{}", "dinov2:{}", "clip:", "judge:{}", "resnet:{}", "effnet-lite0:x"])
def test_models_that_do_not_open_are_one_line(name, file, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    if file:
        (tmp_path / file).write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError) as error:
        feature_extractor(name.format(tmp_path))
    assert "\n" not in str(error.value)
