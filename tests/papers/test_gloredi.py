"""GloReDi's method: sizes against the published counts, laws of its layers and losses, and each released difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from papers.gloredi import method
from papers.gloredi.method import AS_INTENDED as INTENDED
from papers.gloredi.method import AS_RELEASED as RELEASED
from papers.gloredi.method import Decoder, Encoder, GloReDi, LossClamp, MemoryBank

SMALL = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1}


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def small_model(variant: method.Variant, seed: int = 0) -> GloReDi:
    torch.manual_seed(seed)
    return GloReDi(variant, **SMALL)


def distillation(model: GloReDi, **changes) -> method.Distillation:
    settings = {
        "w_distill": 0.1,
        "w_contrast": 0.1,
        "temperature": 0.07,
        "bank": 4,
        "band": (0.1, 0.6),
        "clamp": True,
    }
    return method.Distillation(model, **(settings | changes))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- networks


def test_parameter_counts_are_those_of_the_released_networks():
    assert count(Encoder(width=64, blocks=7, global_ratio=0.75)) == pytest.approx(5.03e6, abs=5e3)
    assert count(Decoder(width=64, blocks=2, global_ratio=0.75)) == pytest.approx(1.70e6, abs=5e3)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (36, 20)])
def test_networks_keep_the_size_and_stay_inside_the_sigmoid(size):
    model = small_model(INTENDED)
    z = model.student_encoder(images(2, 1, *size))
    assert z.shape == (2, 32, size[0] // 4, size[1] // 4)
    drawn = model(images(2, 1, *size))
    assert drawn.shape == (2, 1, *size)
    assert drawn.min() > 0 and drawn.max() < 1


def test_one_pixel_reaches_all_of_the_global_features_but_few_of_the_plain_ones():
    """The claim in the paper's title: every element of GloRe sees the whole image."""
    torch.manual_seed(0)
    image = images(1, 1, 64, 64)
    reached = {}
    for name, ratio in (("fourier", 0.75), ("plain", 0.0)):
        encoder = Encoder(width=8, blocks=1, global_ratio=ratio).eval()
        changed = image.clone()
        changed[0, 0, 32, 32] += 1
        difference = (encoder(changed) - encoder(image)).abs().amax(dim=1)
        reached[name] = (difference > 1e-9).float().mean().item()
    assert reached["fourier"] == 1.0
    assert reached["plain"] < 0.2


def test_teacher_starts_as_the_student():
    model = small_model(INTENDED)
    x = images(2, 1, 16, 16)
    torch.testing.assert_close(model.teacher_decoder(model.teacher_encoder(x)), model(x))


# -------------------------------------------------------------------------------------- released against intended


def test_the_released_split_never_reads_the_last_quarter_of_the_encoder():
    for variant, reads_all in ((RELEASED, False), (INTENDED, True)):
        z = small_model(variant).student_encoder(images(2, 1, 16, 16)).detach().requires_grad_()
        small_model(variant).student_decoder(z).square().sum().backward()
        read = z.grad.abs().sum(dim=(0, 2, 3)) > 0
        assert read[:24].all()
        assert read[24:].any().item() is reads_all
    local, global_ = method.split_channels(torch.arange(8.0)[None, :, None, None], 6, overlapping=True)
    assert local.flatten().tolist() == [0, 1]
    assert global_.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_momentum_is_a_copy_as_released_and_an_average_as_intended():
    for variant, share in ((RELEASED, 1.0), (INTENDED, 0.1)):
        model = small_model(variant)
        before = model.teacher_decoder.head.weight.clone()
        with torch.no_grad():
            model.student_decoder.head.weight.add_(1)
        model.follow_decoder()
        torch.testing.assert_close(model.teacher_decoder.head.weight, before + share)


def test_the_released_optimiser_moves_the_teacher_with_the_students_gradient_step():
    """Zeros in place of None: Adam's old momentum moves parameters that the loss does not reach."""
    for variant, moves in ((RELEASED, True), (INTENDED, False)):
        model = small_model(variant)
        training = distillation(model)
        optimizer = torch.optim.Adam(model.trained_parameters(), lr=1e-3)
        batch = images(2, 1, 16, 16), images(2, 1, 16, 16, seed=1), images(2, 1, 16, 16, seed=2)
        training.step(*batch, optimizer)
        weight = model.teacher_encoder.stem[0].local_to_local.weight
        before = weight.detach().clone()
        training._update(F.smooth_l1_loss(model(batch[0]), batch[2]), optimizer)
        assert (not torch.equal(weight, before)) is moves


def test_initialisation_is_torchs_default_as_released():
    def spread(variant: method.Variant) -> float:
        weight = small_model(variant).student_encoder.blocks[0].first.local_to_global.weight
        return weight.std().item() * (weight[0].numel() / 2) ** 0.5  # 1 for Kaiming-normal with ReLU's gain

    assert spread(INTENDED) == pytest.approx(1, abs=0.1)
    assert spread(RELEASED) == pytest.approx(1 / 6**0.5, abs=0.05)  # torch: uniform with variance 1/(3 fan_in)


def test_contrast_is_off_as_released():
    for variant, on in ((RELEASED, False), (INTENDED, True)):
        training = distillation(small_model(variant), bank=2)
        z = images(2, 32, 8, 8), images(2, 32, 8, 8, seed=1)
        training.representation_losses(*z)
        assert (training.representation_losses(*z)[1].item() > 0) is on


def test_the_released_losses_see_the_first_half_of_the_channels():
    z = images(2, 32, 8, 8)
    other = z.clone()
    other[:, 16:] = images(2, 16, 8, 8, seed=9)
    for variant, blind in ((RELEASED, True), (INTENDED, False)):
        rdd, _ = distillation(small_model(variant)).representation_losses(z, other)
        assert (abs(rdd.item()) < 1e-6) is blind


# ------------------------------------------------------------------------------------------------------------ losses


def test_rdd_is_zero_for_one_direction_one_for_orthogonal_and_two_for_opposite():
    z = images(2, 6, 4, 4) + 0.1
    assert method.directional_distillation(z, 3 * z).item() == pytest.approx(0, abs=1e-6)
    assert method.directional_distillation(z, -z).item() == pytest.approx(2, abs=1e-6)
    first, second = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    first[:, 0], second[:, 1] = 1, 1
    assert method.directional_distillation(first, second).item() == pytest.approx(1)


def test_rdd_teaches_the_student_alone():
    student, teacher = images(1, 6, 4, 4).requires_grad_(), images(1, 6, 4, 4, seed=1).requires_grad_()
    method.directional_distillation(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_dct_agrees_with_scipy():
    scipy_fft = pytest.importorskip("scipy.fft")
    x = images(2, 3, 6, 10)
    torch.testing.assert_close(
        method.dct2(x), torch.from_numpy(scipy_fft.dctn(x.numpy(), axes=(2, 3))), atol=1e-4, rtol=1e-5
    )


def test_band_is_a_square_ring_without_the_mean():
    mask = method.band_mask(20, 20, 0.1, 0.6)
    assert not mask[:3, :3].any()
    assert mask[3, 0] and mask[0, 12] and mask[12, 12]
    assert not mask[13, 0] and not mask[0, 13]
    flat = method.band_features(torch.ones(1, 2, 20, 20) + 0.0, (0.1, 0.6))
    assert flat.norm() < 1.001
    x = images(2, 3, 20, 20)
    torch.testing.assert_close(
        method.band_features(x, (0.1, 0.6)), method.band_features(2 * x + 5, (0.1, 0.6)), atol=1e-4, rtol=0
    )


def test_contrastive_matches_its_definition_term_by_term():
    student, teacher = (F.normalize(images(3, 5, seed=s) - 0.5, dim=1) for s in (0, 1))
    bank = F.normalize(images(4, 5, seed=2) - 0.5, dim=1)
    everything, temperature = torch.cat([student, teacher, bank]), 0.2
    terms = []
    for i in range(6):
        others = [j for j in range(10) if j != i]
        scores = torch.exp(everything[others] @ everything[i] / temperature)
        positive = torch.exp(everything[(i + 3) % 6] @ everything[i] / temperature)
        terms.append(-torch.log(positive / scores.sum()))
    torch.testing.assert_close(method.contrastive(student, teacher, bank, temperature), torch.stack(terms).mean())


def test_contrastive_falls_when_the_positives_meet_and_rises_with_close_negatives():
    student, bank = F.normalize(images(4, 16) - 0.5, dim=1), F.normalize(images(6, 16, seed=1) - 0.5, dim=1)
    stranger = F.normalize(images(4, 16, seed=2) - 0.5, dim=1)
    aligned = method.contrastive(student, student, bank, 0.1)
    assert aligned < method.contrastive(student, stranger, bank, 0.1)
    assert aligned < method.contrastive(student, student, student, 0.1)


def test_memory_bank_is_first_in_first_out_and_cuts_the_gradient():
    bank = MemoryBank(3)
    assert not bank.full
    for value in range(5):
        bank.push(torch.full((1, 2), float(value), requires_grad=True))
    assert bank.full
    assert bank.tensor()[:, 0].tolist() == [2, 3, 4]
    assert not bank.tensor().requires_grad


def test_clamp_leaves_ordinary_losses_and_bounds_outliers_with_or_without_a_gradient():
    for constant in (True, False):
        clamp, x = LossClamp(factor=3, constant=constant), torch.tensor(1.0, requires_grad=True)
        assert clamp(x * 1.0).item() == 1
        assert clamp(x * 3.0).item() == 3  # at the border: untouched
        bounded = clamp(x * 30.0)
        assert bounded.item() == pytest.approx(3)
        assert bounded.requires_grad is not constant
    clamp = LossClamp(window=2, constant=True)
    kept = [clamp(torch.tensor(v)).item() for v in (1.0, 10.0, 10.0)]
    assert kept == [1, 3, 10], "the smallest loss leaves the window and its bound with it"


def test_a_step_trains_student_and_teacher_and_needs_a_full_bank_for_contrast():
    model = small_model(INTENDED)
    training = distillation(model, bank=4)
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    batch = images(2, 1, 16, 16), images(2, 1, 16, 16, seed=1), images(2, 1, 16, 16, seed=2)
    contrast = [training.step(*batch, optimizer)["bpc"] for _ in range(3)]
    assert contrast[:2] == [0, 0] and contrast[2] > 0
    for part in ("student_encoder", "student_decoder", "teacher_encoder", "teacher_decoder"):
        name = next(n for n in before if n.startswith(part) and n.endswith("weight"))
        assert not torch.equal(before[name], model.state_dict()[name]), part


def test_training_fits_one_image():
    """The smallest end-to-end check: both networks can be trained at all."""
    model = small_model(INTENDED)
    training = distillation(model, w_distill=0.002, w_contrast=1e-6)
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=5e-3)
    target = torch.zeros(2, 1, 16, 16)
    target[:, :, 4:12, 4:12] = 0.4
    noisy = target + 0.05 * images(2, 1, 16, 16)
    losses = [training.step(noisy, target, target, optimizer) for _ in range(80)]
    assert losses[-1]["pixel"] < 0.05 * losses[0]["pixel"]
    assert losses[-1]["teacher"] < 0.05 * losses[0]["teacher"]


def test_schedule_halves_every_45_of_150_epochs_and_ends_in_finetuning():
    rates = [method.learning_rate(epoch / 150, 5e-4) for epoch in (0, 44, 45, 90, 149)]
    assert rates == pytest.approx([5e-4, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5])
    assert [method.in_finetuning(e / 150) for e in (140, 141)] == [False, True]
