"""Feature networks and judges by name, each against the library it comes from."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip import TOKENS, text_config, vision_config
from tiny_models import randomize

from ldm.clip import CLIP
from ldm.config import UserError
from ldm.images import to_uint8
from ldm.metrics import features
from ldm.metrics.features import feature_extractor
from ldm.metrics.judges import image_text_model
from ldm.metrics.preprocess import resized
from ldm.tokenizer import Tokenizer


def pictures(count: int = 2, size: int = 40) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(count, 3, size, size) * 2 - 1


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge as train_clip leaves it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(["a red circle", "two blue stars"], 540, context_length=16)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = text_config(
        vocab_size=len(tokenizer), max_position_embeddings=16, pad_token_id=tokenizer.pad_token_id, **ends
    )
    randomize(CLIP(text, vision_config())).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return folder


def test_pictures_are_resized_as_pillow_does():
    """Antialiased, unlike torch's default, which is far off."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    ours = to_uint8(resized(32, torch.zeros(3), torch.ones(3))(x))[0].permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2
    same = resized(96, torch.zeros(3), torch.full((3,), 0.5))(x)
    assert torch.equal(same, 2 * x)


def test_judge_is_the_clip_of_the_folder(judge):
    model = image_text_model(str(judge))
    assert model.name == f"judge:{judge}" and len(model.sha256) == 64 and model.size == 16
    assert model.learned_val and model.about["resize"] == "16 px, bicubic, antialiased"
    clip, tokenizer = CLIP.from_pretrained(judge / "judge"), Tokenizer.from_pretrained(judge / "judge")
    x = pictures(size=16)
    assert torch.allclose(model.images(x), clip.encode_image(x))
    captions = ["a red circle", "two blue stars " * 20]  # the second is cut, without a word
    assert torch.allclose(model.texts(captions), clip.encode_text(tokenizer(captions, warn=False)))
    extractor = feature_extractor(f"judge:{judge}")
    assert torch.allclose(extractor(x), model.images(x)) and extractor.sha256 == model.sha256
    assert extractor.about["resize"] == "16 px, bicubic, antialiased"
    assert extractor.probabilities(extractor(x)) is None


def test_transformers_opens_a_judge_and_scores_the_same(judge):
    """The other way of reading the folder: transformers' model, tokenizer and image processor."""
    ours, theirs = image_text_model(str(judge)), image_text_model(f"clip:{judge / 'judge'}")
    x, captions = pictures(), ["a red circle", "two blue stars"]
    assert torch.allclose(ours.images(x), theirs.images(x), atol=1e-5)
    assert torch.allclose(ours.texts(captions), theirs.texts(captions), atol=1e-5)


def test_clip_of_others_is_transformers_own(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"text_config": text_config().to_dict(), "vision_config": vision_config().to_dict()}
    model = randomize(CLIPModel(CLIPConfig(**sizes, projection_dim=20))).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor.save_pretrained(tmp_path)
    Tokenizer.train(["a red circle"], 514, context_length=9).save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    values = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    expected = model(input_ids=TOKENS, pixel_values=values).image_embeds
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(image_text_model(f"clip:{tmp_path}").images(x), expected, atol=1e-5)
    assert torch.allclose(feature_extractor(f"clip:{tmp_path}")(x), expected, atol=1e-5)


def test_missing_weights_are_not_drawn_anew_in_silence(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "layernorm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not all weights of a Dinov2Model: 'layernorm.weight' is missing"):
        feature_extractor(f"dinov2:{tmp_path}")
    save_file(tensors, tmp_path / "model.safetensors")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=None, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="names no square crop_size"):
        feature_extractor(f"dinov2:{tmp_path}")


def test_dinov2_is_transformers_own(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = randomize(Dinov2Model(Dinov2Config(**sizes))).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    expected = model(processor(Image.fromarray(pixels), return_tensors="pt").pixel_values).pooler_output
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    extractor = feature_extractor(f"dinov2:{tmp_path}")
    assert torch.allclose(extractor(x), expected, atol=1e-5)
    assert extractor.about["extractor"] == f"dinov2:{tmp_path}" and len(extractor.sha256) == 64


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
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256)
    ours = feature_extractor(f"inception:{inception_file}")
    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(inception_file))
    x = pictures()
    pooled, logits = theirs(to_uint8(x))
    assert torch.allclose(ours(x), pooled) and pooled.std() > 0
    assert torch.allclose(ours.probabilities(ours(x)), logits.softmax(1), atol=1e-6)
    assert (ours.name, ours.sha256, ours.size) == ("inception", sha256, 299) and "TensorFlow" in ours.about["resize"]


def test_inception_with_other_weights_or_none_is_refused(inception_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="SHA-256 .* expected 6726825d"):
        feature_extractor(f"inception:{inception_file}")
    with pytest.raises(UserError, match="nowhere.pth' does not exist; put the file there"):
        feature_extractor(f"inception:{tmp_path}/nowhere.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="weights-inception-2015-12-05-6726825d.pth is not in .*effnet-lite0"):
        feature_extractor("inception")


@pytest.mark.parametrize("name", ["clip:{}", "dinov2:{}", "clip:", "dinov2:", "judge:{}", "resnet:{}"])
def test_what_does_not_open_is_one_line(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        feature_extractor(name.format(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_one_line(file, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match="cannot be opened") as error:
        feature_extractor(f"dinov2:{tmp_path}")
    assert "\n" not in str(error.value)


def test_effnet_lite0_knows_classes():
    extractor = feature_extractor("effnet-lite0")
    found = extractor.probabilities(extractor(pictures()))
    assert found.shape == (2, 1000) and torch.allclose(found.sum(1), torch.ones(2), atol=1e-5)
