"""GloReDi: learning to distill a global representation for sparse-view CT (Li et al., ICCV 2023, arXiv 2308.08463).

A sparse-view FBP image is covered by streaks that run across the whole field, so a local convolution sees a small part
of each. GloReDi (1) encodes the image with Fourier convolutions, where every feature sees the whole image: the *global
representation* (GloRe); (2) lets a teacher encode an FBP of *twice* the views and pulls the student's representation
towards the teacher's, in direction (RDD) and in a frequency band (BPC).

Sources: [code] read in the released code (MIT, commit 3ba2872); [guess] ours, where neither abstract nor code says. The
paper's equation numbers were not at hand.

symbol   name here            shape            unit and meaning
I_V      sparse               [B, 1, H, W]     FBP image of V views; attenuation in 1/cm, so that it lies in (0, 1)
I_2V     intermediate         [B, 1, H, W]     FBP image of 2V views, the teacher's input
I_720    target               [B, 1, H, W]     FBP image of all 720 views: the target, not the true image
E1, E2   student_encoder, teacher_encoder      z = E(I), the GloRe
D, D2    student_decoder, teacher_decoder      I_hat = D(z)
z_s, z_t student_z, teacher_z [B, C, H/4, W/4] C = 4 width channels, the local ones first
alpha    global_ratio                          share of channels in the global branch, 0.75
w_d, w_c w_distill, w_contrast                 weights of L_RDD and L_BPC
tau      temperature                           of the contrastive loss, 0.07
m        momentum                              D2 <- m D2 + (1 - m) D before every step
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.ffc import FFC, FFCBlock

CHANNEL_GROWTH = 4  # two stride-2 stages, each doubling the channels [code]
BATCH_NORM_BIAS = 1e-4  # start of the batch norms' shift in the authors' initialiser [code]
SCHEDULE_EPOCHS, HALVE_EVERY, FINETUNE_FROM = 150, 45, 141  # epochs of the authors' schedule [code]


@dataclass(frozen=True)
class Variant:
    """The places where the released code and the described method part. Each field is one of them.

    `overlapping_split`  the decoder takes channels 0..191 as "global" and 0..63 as "local" (of 256): the local channels
                         arrive twice, the last 64 never. Intended: 64..255 and 0..63.
    `distilled_share`    the losses on z see only this first share of the channels: 0.5 released; all of them [guess].
    `contrast`           L_BPC is off unless a flag is given, and the example command does not give it.
    `clamp_is_constant`  an outlier loss is replaced by a *number*, so it has no gradient. Intended [guess]: rescaled.
    `momentum`           m = 0, so D2 is a plain copy of D; its help text says 0.9.
    `stale_momentum`     one Adam holds E1, E2 and D; under the pinned torch 1.7 `zero_grad` leaves zeros, not None, so
                         the teacher's step also moves E1 and D along their old momentum, and the student's step E2.
    `kaiming_init`       the initialiser is called on the whole network, whose class name matches no case: it does
                         nothing and torch's default stays. Intended: Kaiming-normal convolutions.
    `finetune`           from epoch 141 of 150 the student trains alone; the released stage calls a function that does
                         not exist, so training ends there.
    """

    overlapping_split: bool = False
    distilled_share: float = 1.0
    contrast: bool = True
    clamp_is_constant: bool = False
    momentum: float = 0.9
    stale_momentum: bool = False
    kaiming_init: bool = True
    finetune: bool = True


AS_INTENDED = Variant()
AS_RELEASED = Variant(
    overlapping_split=True,
    distilled_share=0.5,
    contrast=False,
    clamp_is_constant=True,
    momentum=0.0,
    stale_momentum=True,
    kaiming_init=False,
    finetune=False,
)
VARIANTS = {"as_intended": AS_INTENDED, "as_released": AS_RELEASED}


# ---------------------------------------------------------------------------------------------------- the two networks


class Encoder(nn.Module):
    """E: image [B, 1, H, W] -> GloRe z [B, C, H/4, W/4], local channels first. H and W must be multiples of 4.

    `global_ratio=0` makes every layer a plain convolution; `bottleneck` (C) then sets its size.
    """

    def __init__(self, *, width: int, blocks: int, global_ratio: float, bottleneck: int | None = None):
        super().__init__()
        channels = bottleneck or CHANNEL_GROWTH * width
        self.stem = nn.Sequential(
            FFC((1, width), (0, 0), kernel=7),
            FFC((width, 2 * width), (0, 0), stride=2),
            FFC((2 * width, channels), (0, global_ratio), stride=2),  # here the global branch opens
        )
        self.blocks = nn.Sequential(*(FFCBlock(channels, global_ratio) for _ in range(blocks)))

    def forward(self, image: Tensor) -> Tensor:
        pair = self.blocks(self.stem((image, None)))
        return torch.cat([x for x in pair if x is not None], dim=1)  # [B, C, H/4, W/4]


class Decoder(nn.Module):
    """D: z [B, C, H/4, W/4] -> image [B, 1, H, W] in (0, 1). There is no skip from the FBP image: it is drawn anew."""

    def __init__(
        self,
        *,
        width: int,
        blocks: int,
        global_ratio: float,
        overlapping_split: bool = False,
        bottleneck: int | None = None,
    ):
        super().__init__()
        channels = bottleneck or CHANNEL_GROWTH * width
        self.global_channels, self.overlapping_split = int(global_ratio * channels), overlapping_split
        self.blocks = nn.Sequential(*(FFCBlock(channels, global_ratio) for _ in range(blocks)))
        self.up = nn.Sequential(*self._double(channels, 2 * width), *self._double(2 * width, width))
        self.head = nn.Conv2d(width, 1, 7, padding=3, padding_mode="reflect")

    def forward(self, z: Tensor) -> Tensor:
        pair = self.blocks(split_channels(z, self.global_channels, overlapping=self.overlapping_split))
        x = torch.cat([x for x in pair if x is not None], dim=1)  # [B, C, H/4, W/4]
        return torch.sigmoid(self.head(self.up(x)))  # [B, 1, H, W]

    @staticmethod
    def _double(channels_in: int, channels_out: int) -> list[nn.Module]:
        up = nn.ConvTranspose2d(channels_in, channels_out, 3, stride=2, padding=1, output_padding=1)
        return [up, nn.BatchNorm2d(channels_out), nn.ReLU()]


def split_channels(z: Tensor, global_channels: int, *, overlapping: bool) -> tuple[Tensor, Tensor | None]:
    """z [B, C, h, w] -> (local [B, C-G, h, w], global [B, G, h, w] or None where G = 0).

    `overlapping=True` is the released code: "global" starts at channel 0 too, so the last C-G channels are never read.
    """
    local_channels = z.shape[1] - global_channels
    if not global_channels:
        return z, None
    return z[:, :local_channels], z[:, :global_channels] if overlapping else z[:, local_channels:]


class GloReDi(nn.Module):
    """Student and teacher. `forward` is inference: the student alone, I_V [B, 1, H, W] -> I_hat [B, 1, H, W]."""

    def __init__(
        self,
        variant: Variant,
        *,
        width: int = 64,
        encoder_blocks: int = 7,
        decoder_blocks: int = 2,
        global_ratio: float = 0.75,
        bottleneck: int | None = None,
    ):
        super().__init__()
        self.variant = variant
        shared = {"width": width, "global_ratio": global_ratio, "bottleneck": bottleneck}
        split = {"overlapping_split": variant.overlapping_split}
        self.student_encoder = Encoder(blocks=encoder_blocks, **shared)
        self.student_decoder = Decoder(blocks=decoder_blocks, **shared, **split)
        if variant.kaiming_init:
            initialise(self)
        self.teacher_encoder = Encoder(blocks=encoder_blocks, **shared)  # equal start [code]
        self.teacher_encoder.load_state_dict(self.student_encoder.state_dict())
        self.teacher_decoder = Decoder(blocks=decoder_blocks, **shared, **split).requires_grad_(False)
        self.teacher_decoder.load_state_dict(self.student_decoder.state_dict())

    def forward(self, sparse: Tensor) -> Tensor:
        return self.student_decoder(self.student_encoder(sparse))

    @torch.no_grad()
    def follow_decoder(self) -> None:
        """D2 <- m D2 + (1-m) D, parameters only: D2 keeps batch statistics of its own [code]."""
        for ours, theirs in zip(self.teacher_decoder.parameters(), self.student_decoder.parameters(), strict=True):
            ours.lerp_(theirs, 1 - self.variant.momentum)

    def trained_parameters(self) -> list[nn.Parameter]:
        """E1, E2 and D. D2 only follows D."""
        return [p for p in self.parameters() if p.requires_grad]


def initialise(network: nn.Module) -> None:
    """Kaiming-normal convolutions; batch norms start at weight 1 and shift 1e-4 [code]."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, BATCH_NORM_BIAS)


# ---------------------------------------------------------------------------------------------------------- the losses


def directional_distillation(student_z: Tensor, teacher_z: Tensor, *, share: float = 1.0) -> Tensor:
    """L_RDD = mean over pixels of 1 - cos(z_s, z_t), along the first `share` of the channels; the teacher is fixed."""
    channels = int(share * student_z.shape[1])
    return (1 - F.cosine_similarity(student_z[:, :channels], teacher_z[:, :channels].detach(), dim=1)).mean()


def dct2(x: Tensor) -> Tensor:
    """Unnormalised type-II DCT of the last two axes: X_k = 2 sum_n x_n cos(pi (2n+1) k / 2N). [..., H, W] -> same."""

    def basis(size: int) -> Tensor:
        n = torch.arange(size, dtype=torch.float64)
        return (2 * torch.cos(torch.pi * (2 * n + 1) * n[:, None] / (2 * size))).to(x)  # [k, n]

    return basis(x.shape[-2]) @ x @ basis(x.shape[-1]).T


def band_mask(height: int, width: int, low: float, high: float) -> Tensor:
    """Square band of DCT indices: max(row/H, column/W) in (low, high]. [H, W] bool."""
    row, column = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
    frequency = torch.maximum(row, column)
    return (frequency > low) & (frequency <= high)


def band_features(z: Tensor, band: tuple[float, float]) -> Tensor:
    """z [B, C, h, w] -> its DCT inside the band, flattened and of unit length: [B, C * (indices in the band)]."""
    inside = band_mask(*z.shape[-2:], *band).to(z.device)
    return F.normalize(dct2(z)[..., inside].flatten(1), dim=1)


def contrastive(student: Tensor, teacher: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss with one positive an anchor: the same image seen by the other network.

    student, teacher [B, F], negatives [N, F], all of unit length. Anchors are students and teachers; everything else is
    a negative: other images of the batch and the memory bank. (The released loss, off by default, also takes bank
    entries as anchors and as positives of each other.)
    """
    batch = len(student)
    anchors = torch.cat([student, teacher])  # [2B, F]
    logits = anchors @ torch.cat([anchors, negatives]).T / temperature  # [2B, 2B + N]
    itself = torch.eye(2 * batch, logits.shape[1], dtype=torch.bool, device=logits.device)
    positive = torch.arange(2 * batch, device=logits.device).roll(batch)  # i <-> i + B
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), positive)


class MemoryBank:
    """First in, first out store of the student's band features: the negatives of L_BPC."""

    def __init__(self, capacity: int):
        self.entries: deque[Tensor] = deque(maxlen=capacity)

    @property
    def full(self) -> bool:
        return len(self.entries) == self.entries.maxlen

    def push(self, features: Tensor) -> None:
        """features [B, F]; the gradient is cut."""
        self.entries.extend(features.detach())

    def tensor(self) -> Tensor:
        """[N, F], oldest first."""
        return torch.stack(list(self.entries))


class LossClamp:
    """Bound a loss by `factor` x the smallest of the last `window`, this one included [code].

    `constant=True` (released): an outlier becomes a number without gradient. Otherwise it is scaled down and keeps its
    direction.
    """

    def __init__(self, *, window: int = 50, factor: float = 3.0, constant: bool):
        self.recent: deque[float] = deque(maxlen=window)
        self.factor, self.constant = factor, constant

    def __call__(self, loss: Tensor) -> Tensor:
        self.recent.append(loss.item())
        limit = self.factor * min(self.recent)
        if loss.item() <= limit:
            return loss
        return torch.full_like(loss, limit) if self.constant else loss * (limit / loss.detach())


# -------------------------------------------------------------------------------------------------------- one iteration


class Distillation:
    """The training step of both networks. Holds what lasts between steps: loss histories and the memory bank."""

    def __init__(
        self,
        model: GloReDi,
        *,
        w_distill: float,
        w_contrast: float,
        temperature: float,
        bank: int,
        band: tuple[float, float],
        clamp: bool,
    ):
        self.model, self.w_distill, self.temperature, self.band = model, w_distill, temperature, band
        self.w_contrast = w_contrast if model.variant.contrast else 0.0
        self.bank = MemoryBank(bank)
        constant = model.variant.clamp_is_constant
        self.clamp_teacher, self.clamp_student = (
            LossClamp(constant=constant) if clamp else nn.Identity() for _ in range(2)
        )

    def step(self, sparse: Tensor, intermediate: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> dict:
        """(1) teach the teacher, (2) pull the student. All images [B, 1, H, W]; returns the losses as numbers."""
        model = self.model
        model.follow_decoder()
        drawn = model.teacher_decoder(model.teacher_encoder(intermediate))
        teacher_loss = self.clamp_teacher(F.smooth_l1_loss(drawn, target))
        self._update(teacher_loss, optimizer)
        with torch.no_grad():
            teacher_z = model.teacher_encoder(intermediate)  # again: E2 has just moved [code]
        student_z = model.student_encoder(sparse)
        pixel = F.smooth_l1_loss(model.student_decoder(student_z), target)
        rdd, bpc = self.representation_losses(student_z, teacher_z)
        self._update(self.clamp_student(pixel) + self.w_distill * rdd + self.w_contrast * bpc, optimizer)
        return {"pixel": pixel.item(), "teacher": teacher_loss.item(), "rdd": rdd.item(), "bpc": bpc.item()}

    def finetune(self, sparse: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> dict:
        """The last epochs: the student alone, on the pixel loss."""
        pixel = F.smooth_l1_loss(self.model(sparse), target)
        self._update(self.clamp_student(pixel), optimizer)
        return {"pixel": pixel.item()}

    def representation_losses(self, student_z: Tensor, teacher_z: Tensor) -> tuple[Tensor, Tensor]:
        """L_RDD and L_BPC of z [B, C, h, w]; L_BPC is zero until the bank is full, and where it is switched off."""
        channels = int(self.model.variant.distilled_share * student_z.shape[1])
        student_z, teacher_z = student_z[:, :channels], teacher_z[:, :channels].detach()
        rdd, bpc = directional_distillation(student_z, teacher_z), student_z.new_zeros(())
        if self.w_contrast:
            student, teacher = band_features(student_z, self.band), band_features(teacher_z, self.band)
            if self.bank.full:
                bpc = contrastive(student, teacher, self.bank.tensor(), self.temperature)
            self.bank.push(student)
        return rdd, bpc

    def _update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self.model.variant.stale_momentum)
        if (
            loss.requires_grad
        ):  # torch refuses the constant that a clamped teacher loss is, here as in the released code
            loss.backward()
        optimizer.step()


def learning_rate(progress: float, start: float) -> float:
    """Halved every 45 of 150 epochs [code]; `progress` in [0, 1) of the schedule."""
    return start * 0.5 ** int(progress * SCHEDULE_EPOCHS / HALVE_EVERY)


def in_finetuning(progress: float) -> bool:
    """Whether the schedule has reached the last stage, epoch 141 of 150 [code]."""
    return progress * SCHEDULE_EPOCHS >= FINETUNE_FROM
