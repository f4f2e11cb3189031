"""For all tests: trainings run on the CPU, where sums come out the same every time, and each test has its seeds."""

import multiprocessing
import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_parts

from ldm.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    """Not to be changed."""
    return Pipeline(tiny_parts())


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("LDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _no_process_stays():
    """What a test started ends with it; pytest would wait for it at its exit."""
    yield
    assert not multiprocessing.active_children()


@pytest.fixture
def one_thread():
    """As many as each process of a launch has: with others, sums differ in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
