"""The small video transformer: its sampler inverts what its loss defines, and bad input is refused."""

from __future__ import annotations

import pytest
import torch

from common.models.stable_diffusion import MissingWeights
from common.models.video import VideoTransformer, pretrained_pipeline, sample, velocity_loss

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves


class Exact(torch.nn.Module):
    """Knows the one video there is: x_s = (1 - s) video + s noise, so noise - video = (x_s - video) / s."""

    def __init__(self, video):
        super().__init__()
        self.video, self.times = video, []

    def forward(self, x, s, text, present):
        self.times.append(s[0].item())
        return (x - self.video) / s[:, None, None, None, None]


def test_the_exact_velocity_has_no_loss_and_leads_to_the_video():
    draw = torch.Generator().manual_seed(0)
    video, text, present = torch.randn(2, 3, 2, 4, 4, generator=draw), torch.zeros(2, 1, 8), torch.ones(2, 1).bool()
    network, noise = Exact(video), torch.randn(2, 3, 2, 4, 4, generator=draw)
    assert velocity_loss(network, video, text, present, draw).item() < 1e-9
    for steps, shift in ((1, 1.0), (7, 1.0), (7, 5.0)):
        network.times, seen = [], []

        def note(done, _, seen=seen):
            seen.append(done)

        out = sample(network, noise, text, present, steps=steps, shift=shift, after_step=note)
        assert (out - video).abs().max() < 1e-5
        assert len(network.times) == steps and seen == list(range(1, steps + 1)) and network.times[0] == 1.0
    assert network.times[3] > 0.8  # of seven steps at shift 5 most lie near the noise
    with pytest.raises(ValueError, match="at least 1"):
        sample(network, noise, text, present, steps=0)


def test_the_transformer_sees_time_text_and_its_absence():
    torch.manual_seed(0)
    network = VideoTransformer(heads=2, head_dim=32, double=1, single=1, channels=3, patch=4, text_width=8).eval()
    x, text = torch.randn(1, 3, 2, 8, 8), torch.randn(1, 4, 8)
    present = torch.tensor([[True, True, False, False]])

    def velocity(at=0.5, words=text, there=present):
        with torch.no_grad():
            return network(x, torch.tensor([at]), words, there)

    first = velocity()
    assert first.shape == x.shape
    assert not torch.allclose(first, velocity(at=0.9)) and not torch.allclose(first, velocity(words=2 * text))
    assert not torch.allclose(first, velocity(there=torch.ones_like(present)))


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(MissingWeights, match="layout of diffusers"):
        pretrained_pipeline(str(tmp_path / "nothing"), device="cpu")
