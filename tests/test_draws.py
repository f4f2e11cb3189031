"""Random numbers of several processes together are those that one draws for all their samples."""

import pytest
import torch

from ldm.diffusion import sample_timesteps
from ldm.distributed import Draws

WORLD, ROWS = 3, 4
KINDS = {
    "rand": lambda draws, rows: draws.rand(rows, 7),
    "randn": lambda draws, rows: draws.randn(rows, 3, 2),
    "stratified": lambda draws, rows: draws.rows(lambda n, g: sample_timesteps(n, 99, "stratified", generator=g), rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_processes_draw_what_one_draws_for_all_their_samples(kind):
    """Twice in turn, so that they are at the same position of the stream afterwards."""
    draw, one = KINDS[kind], Draws(7, 3)
    both = [draw(one, WORLD * ROWS) for _ in range(2)]
    many = [Draws(7, 3, rank, WORLD) for rank in range(WORLD)]
    for expected in both:
        assert torch.equal(torch.cat([draw(draws, ROWS) for draws in many]), expected)
    assert not torch.equal(*both)
