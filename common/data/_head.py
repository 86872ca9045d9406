"""Axial slices of head-like phantoms, from the skull base (level 0) to near the vertex (level 1).

Anatomy in mm and HU after common radiology values: air -1000, fat -90, fluid 5, white matter 28, grey matter 38,
blood 65, cortical bone 900..1500, diploe 350..700. Image left is the patient's right; the nose is up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.data._canvas import Canvas, Draws

FOV_MM = 240.0
CSF_HU = 6.0


def slices(draws: Draws, size: int) -> Tensor:
    """[N, size, size] in HU."""
    canvas = Canvas(draws, size, FOV_MM, -1000.0, warp_mm=1.2)
    level = draws.uniform(0, 1)
    _headrest(canvas)
    canvas.place(draws.uniform(-0.15, 0.15), draws.uniform(-6, 6), draws.uniform(-6, 6))
    # the skull narrows towards the vertex like a dome
    dome = torch.sqrt(1 - (0.75 * level) ** 2)
    a, b = draws.uniform(64, 73) * dome, draws.uniform(80, 93) * dome
    wobble = [
        (2, draws.uniform(-0.015, 0.015), draws.uniform(0, math.tau)),
        (3, draws.uniform(0, 0.025), draws.uniform(-2.0, -1.2)),
    ]
    inner = _scalp_and_skull(canvas, a, b, wobble)
    brain = _brain(canvas, a, b, wobble, inner)
    _fluid_spaces(canvas, a, b, level, brain)
    _findings(canvas, a, b, brain)
    _skull_base(canvas, a, b, level)
    canvas.hu = canvas.hu + 3.0 * canvas.noise(2.5) * (canvas.hu > -700)
    return canvas.hu.clamp(-1024, 2500)


def _headrest(canvas: Canvas) -> None:
    """A thin carbon shell with light foam in it, under most heads."""
    draws = canvas.draws
    there, y = draws.chance(0.6), draws.uniform(-20, -8)
    outer = canvas.ellipse(0, y, 102, 98, power=2.6)
    inner = canvas.ellipse(0, y, 99, 95, power=2.6)
    below = ((-40.0 - canvas.y) / canvas.pixel_mm).clamp(0, 1) * there[:, None, None]
    canvas.paint(inner * below, -970.0)
    canvas.paint(canvas.ring_of(outer, inner) * below, -650.0)


def _scalp_and_skull(canvas: Canvas, a: Tensor, b: Tensor, wobble: list) -> Tensor:
    """Skin, fat, outer table, diploe, inner table; returns the coverage of the cavity."""
    draws = canvas.draws
    scalp_mm, bone_mm = draws.uniform(4, 8), draws.uniform(5.5, 9)
    table_mm = bone_mm * draws.uniform(0.25, 0.38)
    diploe_hu = draws.uniform(350, 650)[:, None, None] + 90 * canvas.noise(6)
    layers = [
        (scalp_mm, 25.0),
        (scalp_mm - 1.8, -85.0),
        (torch.full_like(a, 1.5), 45.0),
        (torch.zeros_like(a), draws.uniform(1000, 1450)),
        (-table_mm, diploe_hu),
        (table_mm - bone_mm, draws.uniform(950, 1350)),
        (-bone_mm, CSF_HU),
    ]
    cavity = canvas.hu
    for extra_mm, hu in layers:
        # bone is thicker at the back than at the temples: let the inner layers sit a little forward
        forward = torch.clamp(-extra_mm, min=0) * 0.12
        cavity = canvas.ellipse(0, forward, a + extra_mm, b + extra_mm, power=2.15, wobble=wobble)
        canvas.paint(cavity, hu)
    return cavity


def _brain(canvas: Canvas, a: Tensor, b: Tensor, wobble: list, cavity: Tensor) -> Tensor:
    """Cortex with sulci, white matter, deep grey nuclei; returns the coverage of the brain."""
    draws = canvas.draws
    gap_mm = draws.uniform(8.5, 11)  # bone and the fluid under it
    gyri = canvas.noise(11)
    atrophy = draws.uniform(0.1, 0.32)
    brain = canvas.ellipse(0, 1, a - gap_mm, b - gap_mm, power=2.15, wobble=wobble) * cavity
    depth = canvas.ellipse(0, 1, a - gap_mm - 14, b - gap_mm - 14, wobble=wobble)
    grey, white = draws.uniform(35, 41), draws.uniform(24, 29)
    canvas.paint(brain, grey)
    # the grey ribbon follows the folds: white matter ends where the same noise that cuts the sulci says so
    folded = (depth * 1.2 + brain * (0.22 * gyri - 0.32)).clamp(0, 1)
    for order, extra in ((0, -10.0), (1, -16.0)):
        core = canvas.ellipse(0, 1, a - gap_mm + extra, b - gap_mm + extra, wobble=wobble)
        folded = torch.maximum(folded, core * (0.35 + 0.4 * order + 0.35 * gyri).clamp(0, 1))
    canvas.paint(folded * brain, white)
    rim = (brain - canvas.ellipse(0, 1, a - gap_mm - 17, b - gap_mm - 17, wobble=wobble)).clamp(0, 1)
    canvas.paint(canvas.band(gyri, atrophy) * rim * 0.9, CSF_HU + 4)
    canvas.paint(brain * 0.999, canvas.hu + 1.5 * canvas.noise(9))
    return brain


def _fluid_spaces(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor, brain: Tensor) -> None:
    """Falx and fissures, ventricles with the nuclei beside them, calcified pineal and choroid."""
    draws = canvas.draws
    middle = ((level > 0.3) & (level < 0.72)).float()
    wide = draws.uniform(0.7, 1.5)
    deep_grey = draws.uniform(36, 41)
    for side in (-1, 1):
        for x, y, half_a, half_b, tilt in ((17, 8, 6, 13, 0.25), (27, 3, 4.5, 15, 0.15), (11, -10, 8, 11, -0.3)):
            nucleus = canvas.ellipse(side * x, y, half_a * middle, half_b * middle, angle_rad=side * tilt)
            canvas.paint(nucleus * brain, deep_grey)
        frontal = canvas.ellipse(side * 8.5 * wide**0.3, 24, 4.2 * wide, 13, angle_rad=-side * 0.38)
        occipital = canvas.ellipse(side * 24, -32, 4.5 * wide, 15, angle_rad=side * 0.35)
        body = canvas.ellipse(side * 12, -2, 4.5 * wide, 34, angle_rad=side * 0.12)
        canvas.paint((frontal + occipital).clamp(0, 1) * (middle * (level < 0.55))[:, None, None], CSF_HU)
        canvas.paint(body * (middle * (level >= 0.55))[:, None, None], CSF_HU)
        insula = canvas.ellipse(side * (a - 27), draws.uniform(2, 12), 1.6 * wide, 15, angle_rad=side * 0.2)
        canvas.paint(insula * brain * (middle * (level < 0.6))[:, None, None], CSF_HU + 2)
        choroid = canvas.ellipse(side * 23, -28, 2.2, 3.5) * (middle * draws.chance(0.5))[:, None, None]
        canvas.paint(choroid, draws.uniform(90, 260))
    canvas.paint(canvas.ellipse(0, 0, 2.2 * wide * middle, 12) * (level < 0.5)[:, None, None], CSF_HU)
    canvas.paint(
        canvas.ellipse(0, -17, 2.2, 2.8) * (middle * draws.chance(0.6))[:, None, None], draws.uniform(100, 350)
    )
    # the falx splits the hemispheres in front and behind, and over the whole length near the vertex
    reach = torch.where(level > 0.72, b - 10, torch.full_like(b, 26))
    for side in (-1, 1):
        middle_y = side * (b - 9 - reach / 2)
        fissure = canvas.ellipse(0, middle_y, 2.0 * wide, reach / 2 + 3, power=3)
        canvas.paint(fissure * brain, CSF_HU + 4)
        canvas.paint(canvas.ellipse(0, middle_y, 0.8, reach / 2 + 4, power=4) * brain, 60.0)
    canvas.paint(canvas.ellipse(0, -(b - 9.5), 4, 3.5), draws.uniform(50, 65))  # the venous sinus in the falx's foot


def _findings(canvas: Canvas, a: Tensor, b: Tensor, brain: Tensor) -> None:
    """In about half the slices a bleed, an old infarct or a calcified meningioma; small dense inserts in some."""
    draws = canvas.draws
    for chance, low_hu, high_hu, low_mm, high_mm in (
        (0.22, 55, 80, 5, 15),
        (0.2, 12, 20, 9, 22),
        (0.12, 60, 220, 5, 11),
    ):
        distance, angle = draws.uniform(0.25, 0.72), draws.uniform(0, math.tau)
        wobble = [
            (2, draws.uniform(0, 0.2), draws.uniform(0, math.tau)),
            (3, draws.uniform(0, 0.15), draws.uniform(0, math.tau)),
        ]
        spot = canvas.ellipse(
            distance * (a - 12) * torch.cos(angle),
            distance * (b - 12) * torch.sin(angle),
            draws.uniform(low_mm, high_mm),
            draws.uniform(low_mm, high_mm),
            angle_rad=angle,
            wobble=wobble,
        )
        canvas.paint(spot * brain * draws.chance(chance)[:, None, None], draws.uniform(low_hu, high_hu))
    for _ in range(3):
        distance, angle = draws.uniform(0.1, 0.8), draws.uniform(0, math.tau)
        insert = canvas.ellipse(
            distance * (a - 12) * torch.cos(angle), distance * (b - 12) * torch.sin(angle), draws.uniform(0.8, 2.2), 1.5
        )
        canvas.paint(insert * brain * draws.chance(0.25)[:, None, None], draws.uniform(80, 600))


def _skull_base(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor) -> None:
    """Below level 0.3: petrous bones with air cells, orbits, nose and sinuses, brain stem. Frontal sinus up to 0.4."""
    draws = canvas.draws
    low = (level < 0.3).float()
    bone_hu = draws.uniform(700, 1150)[:, None, None] + 150 * canvas.noise(4)
    for side in (-1, 1):
        petrous = canvas.ellipse(side * a * 0.55, -12, a * 0.42 * low, 9, angle_rad=side * 0.55, power=1.7)
        canvas.paint(petrous, bone_hu)
        sphenoid = canvas.ellipse(side * a * 0.5, b * 0.4, a * 0.45 * low, 4, angle_rad=-side * 0.45)
        canvas.paint(sphenoid, bone_hu)
        for _ in range(14):
            cell = canvas.ellipse(
                side * (a * draws.uniform(0.62, 0.93)),
                draws.uniform(-34, -10),
                draws.uniform(1.0, 3.6) * low,
                draws.uniform(1.0, 3.2),
            )
            canvas.paint(cell, draws.uniform(-950, -500))
        _orbit(canvas, side, a, b, low)
    canvas.paint(canvas.ellipse(0, -14, 13 * low, 12), 32.0)
    canvas.paint(canvas.ellipse(0, -29, 6 * low, 4), CSF_HU)
    canvas.paint(canvas.ellipse(0, b * 0.66, 13 * low, b * 0.3, power=3), 550.0)
    for _ in range(9):
        sinus = canvas.ellipse(
            draws.uniform(-9, 9), b * draws.uniform(0.42, 0.9), draws.uniform(2, 4) * low, draws.uniform(4, 8), power=3
        )
        canvas.paint(sinus, -980.0)
    frontal = (level < 0.4).float() * draws.chance(0.8)
    for side in (-1, 1):
        width = draws.uniform(5, 13) * frontal
        canvas.paint(canvas.ellipse(side * draws.uniform(5, 11), b - 4.2, width + 2 * frontal, 5), 1100.0)
        canvas.paint(canvas.ellipse(side * draws.uniform(5, 11), b - 4.2, width, 3.4), -980.0)


def _orbit(canvas: Canvas, side: int, a: Tensor, b: Tensor, low: Tensor) -> None:
    """Bony rim, fat, muscles, globe and lens."""
    x, y = side * a * 0.46, b * 0.68
    canvas.paint(canvas.ellipse(x, y, 20 * low, 22, power=2.3), 900.0)
    canvas.paint(canvas.ellipse(x, y + 3, 17.5 * low, 21, power=2.3), -75.0)
    canvas.paint(canvas.ellipse(x - side * 3, y - 8, 2.2 * low, 10, angle_rad=-side * 0.25), 35.0)
    canvas.paint(canvas.ellipse(x + side * 12, y - 2, 1.8 * low, 12, angle_rad=side * 0.2), 50.0)
    canvas.paint(canvas.ellipse(x, y + 10, 11.5 * low, 11.5), 45.0)
    canvas.paint(canvas.ellipse(x, y + 10, 10.3 * low, 10.3), 8.0)
    canvas.paint(canvas.ellipse(x, y + 18, 4.5 * low, 2), 95.0)
