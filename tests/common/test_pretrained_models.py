"""The loaders of pretrained networks, on tiny random networks in the same layouts, and their errors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from common.models import lora
from common.models.diffusion import epsilon_loss, sdedit, train
from common.splatting import View, intrinsics, look_at

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn about themselves

WORDS = ["a</w>", "yard</w>", "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a Stable Diffusion and a ControlNet with a few thousand random weights."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    unet.save_pretrained(root / "model/unet")
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    control.save_pretrained(root / "control")
    coder = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )
    coder.save_pretrained(root / "model/vae")
    diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        root / "model/scheduler"
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=8, eos_token_id=3, **shape))
    text.save_pretrained(root / "model/text_encoder")
    folder = root / "model/tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    named = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "unk_token": "<|endoftext|>"}
    named |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return str(root / "model"), str(root / "control")


@pytest.fixture
def network(weights: tuple[str, str]):
    from common.models.stable_diffusion import StableDiffusion

    return StableDiffusion.from_pretrained(*weights)


def test_stable_diffusion_repairs_in_latents(network):
    image = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, latents = network.encode_text("a yard"), network.encode(2 * image - 1)
        assert latents.shape == (1, 4, 8, 16) and text.shape == (1, 8, 16)
        draw = torch.Generator().manual_seed(1)
        options = {"strength": 0.2, "steps": 50, "eta": 1.0}
        found = sdedit(
            lambda x, t: network(x, t, text, image, 0.8), latents, network.schedule, generator=draw, **options
        )
        assert network.decode(found).shape == image.shape and torch.isfinite(found).all()
    assert network.schedule.steps == 1000 and float(network.schedule.signal[1]) == pytest.approx(1 - 0.00085, rel=1e-5)
    with pytest.raises(ValueError, match="multiples of 64"):
        network.encode(torch.zeros(1, 3, 40, 64))


def test_the_control_net_is_heard_and_can_be_silenced(network):
    x, t, image = torch.rand(1, 4, 8, 8), torch.tensor([100]), torch.rand(1, 3, 64, 64)
    for block in network.control.controlnet_down_blocks:  # they begin at zero
        torch.nn.init.normal_(block.weight)
    with torch.no_grad():
        text = network.encode_text("a yard")
        plain = network.unet(x, t - 1, encoder_hidden_states=text).sample
        assert torch.allclose(network(x, t, text, image, 0.0), plain, atol=1e-6)
        assert not torch.allclose(network(x, t, text, image), plain, atol=1e-3)


def test_adapting_trains_low_rank_parts_of_all_three_networks_alone(network):
    trained = network.adapt(rank=2)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in trained}
    for part in (network.unet, network.control, network.text):
        assert lora.state(part)
    image, latents = torch.rand(1, 3, 64, 64), torch.rand(1, 4, 8, 8)
    before = network.encode_text("a yard").detach()

    def loss(model, draw):
        text = network.encode_text("a yard")
        return epsilon_loss(lambda x, t: model(x, t, text, image), latents, network.schedule, draw)

    train(network, loss, steps=3, learning_rate=1e-2, seed=0, parameters=trained)
    assert not torch.equal(network.encode_text("a yard"), before)


def test_missing_weights_are_named_with_the_way_out(tmp_path: Path, weights: tuple[str, str]):
    from common.models.stable_diffusion import MissingWeights, StableDiffusion

    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match=r"empty cannot be loaded .* folder"):
        StableDiffusion.from_pretrained(weights[0], str(tmp_path / "empty"))


def test_marigold_names_missing_weights(tmp_path: Path):
    from common.models.marigold import Marigold
    from common.models.stable_diffusion import MissingWeights

    with pytest.raises(MissingWeights, match="cannot be loaded"):
        Marigold(str(tmp_path), str(tmp_path))


def test_marigolds_normals_arrive_in_world_axes(monkeypatch: pytest.MonkeyPatch):
    """A wall that faces the viewer has normals (0, 0, 1) in Marigold's axes; here the viewer looks along +y."""
    from common.models import marigold

    class Pipe:
        def __init__(self, answer):
            self.answer = answer

        def to(self, device):
            return self

        def set_progress_bar_config(self, **options):
            pass

        def __call__(self, image, **options):
            assert options["output_type"] == "pt" and image.shape == (1, 3, 6, 8)
            return types.SimpleNamespace(prediction=self.answer)

    normals = torch.tensor([0.0, 0.6, 0.8])[None, :, None, None].expand(1, 3, 6, 8)  # a little upwards
    answers = iter([Pipe(torch.full((1, 1, 6, 8), 0.25)), Pipe(normals)])
    monkeypatch.setattr(marigold, "_load", lambda kind, name: next(answers))
    K = intrinsics(8, 6, fov_x_rad=1.0)
    view = View("a", look_at((0, -3, 0), (0, 0, 0), (0, 0, 1), K, 8, 6), torch.rand(6, 8, 3))
    depth, found = marigold.Marigold("depth", "normals")(view)
    assert depth.shape == (6, 8) and float(depth.mean()) == 0.25
    torch.testing.assert_close(found[0, 0], torch.tensor([0.0, -0.8, 0.6]))  # towards the camera, and up


def test_dust3r_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    from common.models.dust3r import dust3r

    monkeypatch.setitem(sys.modules, "dust3r", None)
    with pytest.raises(ModuleNotFoundError, match=r"github\.com/naver/dust3r"):
        dust3r([], "weights")
