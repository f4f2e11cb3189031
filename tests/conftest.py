"""For all tests: trainings run on the CPU, where sums come out the same every time."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _train_on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
