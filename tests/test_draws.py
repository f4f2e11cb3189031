"""Random numbers of several processes together are those that one draws for all their samples."""

import pytest
import torch

from ldm.data import choose_captions, flip_half
from ldm.diffusion import sample_timesteps
from ldm.distributed import Draws

WORLD, ROWS = 3, 4
IMAGES = torch.randn(WORLD * ROWS, 3, 5, 5, generator=torch.Generator().manual_seed(1))
CAPTIONS = [[f"{i} {j}" for j in range(1 + i % 4)] for i in range(WORLD * ROWS)]


def timesteps(density: str):
    return lambda draws, rows: draws.rows(lambda n, g: sample_timesteps(n, 1000, density, generator=g), len(rows))


KINDS = {
    "rand": lambda draws, rows: draws.rand(len(rows), 7),
    "randn": lambda draws, rows: draws.randn(len(rows), 3, 2),
    "flip": lambda draws, rows: flip_half(IMAGES[rows], draws.rand(len(rows))),
    "captions": lambda draws, rows: choose_captions([CAPTIONS[i] for i in rows], draws.rand(len(rows))),
    "stratified": timesteps("stratified"),
    "logit normal": timesteps("logit_normal"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_processes_draw_what_one_draws_for_all_their_samples(kind):
    """Twice in turn, so that they are at the same position of the stream afterwards."""
    draw, samples = KINDS[kind], list(range(WORLD * ROWS))
    one = Draws(7, 3)
    both = [list(draw(one, samples)) for _ in range(2)]
    many = [Draws(7, 3, rank, WORLD) for rank in range(WORLD)]
    for expected in both:
        parts = [row for d in many for row in draw(d, samples[d.rank * ROWS : (d.rank + 1) * ROWS])]
        assert all(a == b if isinstance(a, str) else torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    assert str(both[0]) != str(both[1])


def test_draws_depend_on_seed_and_step_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    values = [float(Draws(seed, step).rand(1)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(values)) == 4 and float(Draws(0, 0).rand(1)) == values[0]
    assert torch.equal(torch.get_rng_state(), state)
