"""What several processes draw together is what one draws for all of their samples."""

import pytest
import torch

from ldm.data import choose_captions, flip_half
from ldm.diffusion import sample_timesteps
from ldm.distributed import Together, draw_for_all, mean_over_processes
from ldm.train.diffusion import drop_captions
from ldm.vae import DiagonalGaussian

WORLD, ROWS = 3, 4
MOMENTS = torch.randn(WORLD * ROWS, 6, 5, 5, generator=torch.Generator().manual_seed(1))
CAPTIONS = [[f"{i} {j}" for j in range(1 + i % 4)] for i in range(WORLD * ROWS)]
DRAWS = {
    "rand": lambda own: torch.rand(len(own), 7),
    "rand of a size": lambda own: torch.rand((len(own), 2, 3), dtype=torch.float64),
    "randn": lambda own: torch.randn(len(own), 3, device="cpu"),
    "randint": lambda own: torch.randint(1000, (len(own),)),
    "randint from": lambda own: torch.randint(5, 9, (len(own), 2)),
    "randn_like": lambda own: torch.randn_like(MOMENTS[own]),
    "rand_like, channels last": lambda own: torch.rand_like(MOMENTS[own].contiguous(memory_format=torch.channels_last)),
    "posterior": lambda own: DiagonalGaussian(MOMENTS[own]).sample(),
    "mirrored": lambda own: flip_half(MOMENTS[own], torch.rand(len(own))),
    "captions": lambda own: drop_captions(choose_captions([CAPTIONS[i] for i in own], torch.rand(len(own))), 0.5),
    "timesteps": lambda own: draw_for_all(lambda n: sample_timesteps(n, 1000), len(own)),
    "stratified": lambda own: draw_for_all(lambda n: sample_timesteps(n, 1000, "stratified"), len(own)),
    "logit normal": lambda own: draw_for_all(lambda n: sample_timesteps(n, 1000, "logit_normal", mean=0.7), len(own)),
}


@pytest.mark.parametrize("rows", [ROWS, 1])
@pytest.mark.parametrize("name", DRAWS)
def test_processes_draw_what_one_draws_for_all_their_samples(name, rows):
    """And are at the same place of the stream afterwards."""
    draw, samples = DRAWS[name], list(range(WORLD * rows))
    torch.manual_seed(7)
    whole = [*draw(samples), torch.rand(()), *draw(samples)]
    parts = []
    for rank in range(WORLD):
        torch.manual_seed(7)
        with Together(rows, rank, WORLD):
            own = samples[rank * rows : (rank + 1) * rows]
            parts.append((list(draw(own)), torch.rand(()), list(draw(own))))
    together = [row for first, _, _ in parts for row in first] + [parts[0][1]]
    together += [row for _, _, second in parts for row in second]
    assert len(together) == len(whole)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) if torch.is_tensor(a) else a == b
        for a, b in zip(together, whole, strict=True)
    )


def test_a_draw_of_another_size_or_with_its_own_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(5), torch.rand(()), torch.randn_like(torch.zeros(5, 2))
    own = torch.rand(4, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    with Together(4, 1, 2):
        found = torch.rand(5), torch.rand(()), torch.randn_like(torch.zeros(5, 2))
        assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(3)), own)
    assert all(map(torch.equal, found, expected))


def test_outside_of_a_step_taken_together_a_mean_is_the_value_itself():
    x = torch.tensor(3.0, requires_grad=True)
    assert mean_over_processes(x) == 3.0 and not mean_over_processes(x).requires_grad
    with pytest.raises(RuntimeError, match="inside"), Together(4, 0, 2):
        raise RuntimeError("inside")
    assert Together.current is None and draw_for_all(torch.arange, 4).tolist() == [0, 1, 2, 3]
