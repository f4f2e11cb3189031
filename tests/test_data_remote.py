"""Shards and latents behind URLs, on loopback servers that fail by plan: the batches are those of local files."""

import gc
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import tiny
import torch
from test_data_latents import CPU, TinyVAE
from test_data_shards import BAD, open_shards, samples, tar, write_shards
from test_scripts import in_process

from ldm.config import UserError
from ldm.data import remote
from ldm.data.faults import SampleError
from ldm.data.latents import open_latents
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.model_io import shrink


class Server(ThreadingHTTPServer):
    """Serves a folder. The first answers for each part of a file go wrong by `plan`."""

    plan = ("cut", "error")

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url, self.seen = f"http://127.0.0.1:{self.server_port}", Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None  # noqa: E731

    def do_GET(self):
        path, part = self.translate_path(self.path), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if "secret" in path or not part or not os.path.exists(path):
            return self.send_error(403) if "secret" in path else super().do_GET()
        start, end = int(part[1]), int(part[2]) + 1
        turn = self.server.seen[self.path, start]
        self.server.seen[self.path, start] += 1
        wrong = self.server.plan[turn] if turn < len(self.server.plan) else ""
        if wrong == "error":
            return self.send_error(503)
        if wrong == "late":
            time.sleep(60)
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2 if wrong == "cut" else None])
        self.close_connection = wrong == "cut"

    def do_HEAD(self):
        return self.send_error(403) if "secret" in self.path else super().do_HEAD()


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp")
    server = Server(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["http", "s3"])
def storage(request, tmp_path, monkeypatch):
    """A function that makes a folder of files available, and returns its URL."""
    monkeypatch.setattr(remote, "WAIT", 1e-3)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    if request.param == "http":
        server = request.getfixturevalue("server")
        yield lambda folder: f"{server.url}/{folder.relative_to(tmp_path)}"
        return
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    s3, bucket = fsspec.filesystem("s3"), tmp_path.name.replace("_", "-")
    s3.mkdir(bucket)

    def upload(folder):
        s3.put(str(folder), f"{bucket}/{folder.name}", recursive=True)
        return f"s3://{bucket}/{folder.name}"

    yield upload
    server.stop()
    s3.clear_instance_cache()


def same(one, two):
    for (a, wrong), (b, faults) in zip(one, two, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["key"] == b["key"] and a["captions"] == b["captions"]
        assert wrong == faults


def test_the_batches_are_those_of_local_files(tmp_path, storage):
    write_shards(samples(40), tmp_path / "shards", "train", per_shard=9)
    tar(tmp_path / "shards" / "train-9.tar", [member for members, _ in BAD.values() for member in members])
    url = storage(tmp_path / "shards")
    here, there = (open_shards(path, max_broken=0.5) for path in (tmp_path / "shards", url))
    assert there.lengths == here.lengths and there.faults.reasons == here.faults.reasons
    order = partial(EpochBatches, len(here), seed=3, steps=12, blocks=here.lengths)
    local = [*load(here, order(batch_size=8), workers=0, pin_memory=False)]
    same(load(there, order(batch_size=8), workers=2, pin_memory=False), local)
    same(load(there, order(batch_size=8, start=7), workers=0, pin_memory=False), local[7:])


def test_blocks_are_fetched_once_and_bounded(tmp_path, storage, monkeypatch):
    write_shards(samples(40), tmp_path / "shards", "train", per_shard=9)
    url, blocks = storage(tmp_path / "shards"), tmp_path / "cache" / "blocks"
    monkeypatch.setattr(remote, "BLOCK", 9_000)  # a shard has three
    here, there = open_shards(tmp_path / "shards"), open_shards(url, cache_gb=1e-3)
    order = EpochBatches(40, 8, 3, steps=15, blocks=here.lengths)
    local = [*load(here, order, workers=0, pin_memory=False)]
    same(load(open_shards(url, cache_gb=5e-5), order, workers=2, pin_memory=False), local)
    assert 3e4 < sum(file.stat().st_size for file in blocks.iterdir()) <= 5e4
    same(load(there, order, workers=2, pin_memory=False), local)
    monkeypatch.setattr(remote, "ask", None)  # all is here by now
    same(load(there, order, workers=0, pin_memory=False), local)


def test_a_slow_answer_is_asked_for_again(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(99)))
    server.plan = ("late", "error", "cut", "late")
    monkeypatch.setattr(remote, "WAIT", 1e-3)
    monkeypatch.setattr(remote, "PATIENCE", 1)
    start = time.monotonic()
    assert remote.File.find(f"{server.url}/file").read(9, 80) == bytes(range(9, 89))
    assert time.monotonic() - start < 30 and sum(server.seen.values()) == 5


def test_forked_workers_leave_connections_alone(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(99)))
    server.plan = ()
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(remote, "PATIENCE", 5)
    file = remote.File.find(f"{server.url}/file")
    worker = multiprocessing.get_context("fork").Process(target=lambda: (file.read(0, 9), gc.collect()))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and file.read(9, 80) == bytes(range(9, 89))


def test_the_least_recently_used_blocks_are_removed(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}", (i, 9 - i))
    shrink(tmp_path.iterdir(), 550)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "2", "3", "4"]


def test_latents_lie_in_a_file_per_shard(tmp_path, storage):
    write_shards(samples(40), tmp_path / "shards", "train", per_shard=9)
    tar(tmp_path / "shards" / "train-9.tar", BAD["torn"][0])
    data, vae = open_shards(tmp_path / "shards", max_broken=0.1), TinyVAE()
    open_ = partial(open_latents, vae=vae, dataset=data, batch_size=4, device=CPU)
    single, many = open_(tmp_path / "single"), open_(f"{tmp_path}/many/")
    url = storage(tmp_path / "many")
    vae.count = 0
    far = open_(url)
    assert [path.rpartition("/")[2] for path in far.paths][4:] == ["train-000004.safetensors", "train-9.safetensors"]
    for i in range(40):
        assert len({*map(str, (each[i] for each in (single, many, far)))}) == 1
    for each in (many, far):
        with pytest.raises(SampleError, match="torn"):
            each[40]
    assert vae.count == 0 and data.faults.reasons.keys() == {"torn in train-9.tar"} and many.lengths == data.lengths
    with pytest.raises(UserError, match="made by another VAE; delete it"):
        open_(url, vae=TinyVAE(1))
    with pytest.raises(UserError, match="another data set, split or picture size; delete it"):
        open_(url, dataset=open_shards(tmp_path / "shards", 16, max_broken=0.1))
    folder = url if url.startswith("s3") else f"{tmp_path}/many"
    files, path = fsspec.core.url_to_fs(folder)
    files.rm(f"{path}/train-000001.safetensors")
    files.pipe_file(f"{path}/train-000003.safetensors", files.cat_file(f"{path}/train-000003.safetensors")[:-1])
    vae.count = 0
    again = open_(folder)
    assert vae.count == 1 + 9 + 9  # the first tells the shape
    assert all(torch.allclose(again[i]["mean"], single[i]["mean"], rtol=2**-9, atol=1e-5) for i in range(40))


WRONG = {
    "URL/gone/train-0.tar": "'[^']*/gone/train-0.tar' cannot be reached: [A-Z]\\w*Error: .*; check address.*",
    "URL/secret/train-0.tar": "'[^']*/train-0.tar' cannot be reached: ClientResponseError: 403.*; check address.*",
    "URL/shards/train-{000000..000001}.tar": "'[^']*train-000001.tar' is cut short; write it again",
    "URL/empty/": "shard folder '[^']*empty/' has no .*tar",
    "http://127.0.0.1:9/x.tar": "'[^']*x.tar' cannot be reached: ClientConnectorError: .*; check .* network",
    "az://container/x.tar": "'az:[^']*' cannot be reached: ImportError: .*adlfs.*; pip install 'ldm.remote.'",
    "ipx://x.tar": "'ipx:[^']*' cannot be reached: ValueError: Protocol not known: ipx;.*",
}


def test_a_wrong_address_ends_in_one_line(tmp_path, storage, capsys, monkeypatch):
    for folder in ("shards", "secret", "empty"):
        write_shards(samples(0 if folder == "empty" else 4), tmp_path / folder, "train", per_shard=2)
    cut = tmp_path / "shards" / "train-000001.tar"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-9000])
    url = storage(tmp_path / "shards").removesuffix("/shards")
    for path, message in WRONG.items():
        if url.startswith("http") or "secret" not in path:
            line = ["--out", "run", *tiny.EMPTY, "data.name=shards", f"data.path={path.replace('URL', url)}"]
            code, _, err = in_process(capsys, monkeypatch, "train_autoencoder.py", *line, cwd=tmp_path)
            assert (code, err.count("\n")) == (2, 1) and re.fullmatch(f"error: {message}\n", err), err
            assert not (tmp_path / "run").exists()
