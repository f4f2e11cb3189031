"""Models compiled by OpenVINO against the models themselves, and what it keeps on disk."""

import ctypes
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_models import arrays, randomize, tiny_parts

from ldm import compilation
from ldm.commands import sample
from ldm.config import UserError
from ldm.images import read_metadata
from ldm.pipeline import Pipeline

PROMPTS = ["a red circle", "a blue square", "circle", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")


@openvino
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_pictures_are_those_of_the_models_and_compiled_once(sampler, cache, capsys):
    plain, compiled = Pipeline(tiny_parts()), Pipeline(tiny_parts()).compile("openvino")
    for count in (4, 3):  # the second batch is padded to the first
        given = {"steps": 3, "sampler": sampler, "batch_size": count}
        assert np.abs(arrays(compiled(PROMPTS[:count], **given)) - arrays(plain(PROMPTS[:count], **given))).max() <= 1
    assert capsys.readouterr().err.count("compiling the") == len(list(cache.glob("*.bin"))) == 2  # U-Net and decoder
    Pipeline(tiny_parts()).compile("openvino")(PROMPTS, steps=1, sampler=sampler)
    assert "compiling" not in capsys.readouterr().err


@openvino
def test_damaged_and_foreign_results_are_compiled_again(cache, capsys, monkeypatch):
    expected = arrays(Pipeline(tiny_parts()).compile("openvino")(PROMPTS, steps=1))
    for file in cache.glob("*.bin"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert np.array_equal(arrays(Pipeline(tiny_parts()).compile("openvino")(PROMPTS, steps=1)), expected)
    other = tiny_parts()
    randomize(other.unet, seed=9)
    assert not np.array_equal(arrays(Pipeline(other).compile("openvino")(PROMPTS, steps=1)), expected)
    assert capsys.readouterr().err.count("compiling the UNet") == 3
    monkeypatch.setattr(compilation, "LARGEST", 1)
    compilation.keep(cache / "new.bin", b"data")
    assert not list(cache.glob("*.bin"))


@openvino
def test_the_stack_of_signal_handlers_is_left_as_it_was(cache):
    """OpenVINO 2026.4 leaves a freed one behind: the next signal with a handler ended the program."""
    before, after = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    ctypes.CDLL(None).sigaltstack(None, before)
    Pipeline(tiny_parts()).compile("openvino")(PROMPTS, steps=1)
    ctypes.CDLL(None).sigaltstack(None, after)
    assert before.raw == after.raw


@openvino
def test_bfloat16_is_near(cache):
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 24)
    unet = tiny_parts().unet
    expected = unet(z, torch.tensor(7), context).detach()
    half = compilation.compiled(unet, unet.forward, "openvino", "bfloat16")(z, torch.tensor(7), context)
    assert float((half - expected).norm() / expected.norm()) < 0.05


@openvino
def test_the_command_compiles_where_that_saves_time(tmp_path, monkeypatch):
    Pipeline(tiny_parts()).save_pretrained(tmp_path / "model")
    call = ["sample", "--model", str(tmp_path / "model"), "--prompt", "circle", "--steps", "60", "--guidance", "1"]
    for compiling, recorded in ((1e9, None), (0, "float32"), (1e9, "float32")):  # the last finds it on disk
        monkeypatch.setattr(compilation, "COMPILING", compiling)
        monkeypatch.setattr(sys, "argv", [*call, "--out", str(tmp_path / "out")])
        sample.main()
        assert read_metadata(tmp_path / "out/0000-circle.png").get("compiled") == recorded


class Plain(torch.nn.Module):
    """Without parameters."""

    def forward(self, z, t, context):
        return (z + context[:, :1, :8, None]) * t


@openvino
@pytest.mark.parametrize("network", [tiny_parts().unet, Plain()], ids=["unet", "no-parameters"])
def test_a_network_is_compiled_once_that_saves_time(network, cache, monkeypatch):
    rows = []

    def run(z, context):
        rows.append(len(z))
        return network(z, torch.tensor(7), context)

    for compiling, third in ((1e9, [4]), (0, [])):
        monkeypatch.setattr(compilation, "COMPILING", compiling)
        function, inputs = compilation.WhereItSaves(network, run, 8), (torch.randn(4, 4, 8, 8), torch.randn(4, 12, 24))
        outputs = [function(*inputs) for _ in range(2)]  # the first prepares, the second is timed
        function(*inputs)
        assert function.compiled == (compiling == 0)
        rows.clear()
        outputs += [function(*inputs), function(*(x[:1] for x in inputs))]
        assert rows == [*third, 1]  # a lone row is not worth its own compilation
        assert all(torch.allclose(output, outputs[0][: len(output)], atol=1e-4) for output in outputs)


def test_without_openvino_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    for given in ({"backend": "openvino"}, {"precision": "bfloat16"}):
        with pytest.raises(UserError, match=r"OpenVINO.*pip install 'ldm\[openvino\]'"):
            Pipeline(tiny_parts()).compile(**given)
