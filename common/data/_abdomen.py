"""Axial slices of abdomen-like phantoms, from the dome of the liver (level 0) to the lower kidneys (level 1).

Anatomy in mm and HU after common radiology values: lung -850, fat -105, water 5, muscle 55, liver 60..115, spleen
55..125, kidney cortex 40..200, contrast-filled vessels 40..280, cancellous bone 180, cortical bone 600..1100.
About two slices in three carry intravenous contrast. Image left is the patient's right; the spine is down.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.data._canvas import Canvas, Draws

FOV_MM = 370.0
FAT_HU = -105.0


def slices(draws: Draws, size: int) -> Tensor:
    """[N, size, size] in HU."""
    canvas = Canvas(draws, size, FOV_MM, -1000.0, warp_mm=2.2)
    level, contrast = draws.uniform(0, 1), draws.uniform(-0.5, 1).clamp_min(0)
    _couch(canvas)
    canvas.place(draws.uniform(-0.08, 0.08), draws.uniform(-8, 8), draws.uniform(-4, 10))
    a, b = draws.uniform(135, 168), draws.uniform(95, 122)
    cavity = _wall(canvas, a, b)
    _bowel(canvas, a, b, level, cavity)
    _liver(canvas, a, b, level, contrast, cavity)
    _stomach_and_spleen(canvas, a, b, level, contrast, cavity)
    _kidneys(canvas, a, b, level, contrast, cavity)
    _lung_bases(canvas, a, b, level, cavity)
    _spine(canvas, b, level)
    _great_vessels(canvas, b, contrast)
    _ribs(canvas, a, b, level)
    canvas.hu = canvas.hu + 6.0 * canvas.noise(3.5) * (canvas.hu > -700)
    return canvas.hu.clamp(-1024, 2500)


def _couch(canvas: Canvas) -> None:
    y = canvas.draws.uniform(-30, -15)
    outer = canvas.ellipse(0, y + 60, 235, 178, power=2.2)
    inner = canvas.ellipse(0, y + 60, 231, 174, power=2.2)
    below = ((-90.0 - canvas.y) / canvas.pixel_mm).clamp(0, 1)
    canvas.paint(canvas.ring_of(outer, inner) * below, -600.0)


def _wall(canvas: Canvas, a: Tensor, b: Tensor) -> Tensor:
    """Skin, subcutaneous fat, muscles, fat around the organs; returns the coverage of the cavity."""
    draws = canvas.draws
    fat_mm, muscle_mm = draws.uniform(6, 26), draws.uniform(7, 12)
    wobble = [(2, draws.uniform(-0.02, 0.02), 0.0), (4, draws.uniform(-0.02, 0.01), 0.0)]
    # a little more fat behind than in front, as in people lying on their back
    canvas.paint(canvas.ellipse(0, 0, a, b, power=2.4, wobble=wobble), 20.0)
    canvas.paint(canvas.ellipse(0, 0, a - 2, b - 2, power=2.4, wobble=wobble), FAT_HU + 6 * canvas.noise(8))
    lift = 0.2 * fat_mm
    canvas.paint(canvas.ellipse(0, lift, a - fat_mm, b - fat_mm, power=2.4, wobble=wobble), 52 + 9 * canvas.noise(5))
    for side in (-1, 1):
        seam = canvas.ellipse(side * 7, lift, a - fat_mm - 4, b - fat_mm - 3.2, power=2.4, wobble=wobble)
        core = canvas.ellipse(side * 7, lift, a - fat_mm - 5, b - fat_mm - 4.4, power=2.4, wobble=wobble)
        canvas.paint(canvas.ring_of(seam, core), -60.0)  # fat between the layers of the flank muscles
    depth = fat_mm + muscle_mm
    cavity = canvas.ellipse(0, lift + 8, a - depth, b - depth - 8, power=2.5, wobble=wobble)
    canvas.paint(cavity, FAT_HU + 8 * canvas.noise(7))
    return cavity


def _bowel(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor, cavity: Tensor) -> None:
    """Loops with a wall and fluid, gas or oral contrast, and strands of mesenteric vessels between them."""
    draws = canvas.draws
    strands = canvas.band(canvas.noise(15), 0.07) * cavity * 0.6
    canvas.paint(strands, 20.0)
    for _ in range(11):
        x, y = a * draws.uniform(-0.62, 0.62), b * draws.uniform(-0.05, 0.55)
        half_a, half_b = draws.uniform(9, 24), draws.uniform(8, 14)
        there = ((level > 0.3).float() * draws.chance(0.85))[:, None, None] * cavity
        angle, order = draws.uniform(0, math.pi), [(3, draws.uniform(0, 0.14), draws.uniform(0, math.tau))]
        content = 25 + draws.chance(0.2) * draws.uniform(100, 330)
        canvas.paint(canvas.ellipse(x, y, half_a, half_b, angle_rad=angle, wobble=order) * there, 48.0)
        lumen = canvas.ellipse(x, y, half_a - 2.5, half_b - 2.5, angle_rad=angle, wobble=order) * there
        canvas.paint(lumen, content)
        # gas rises to the front of the loop and ends in a level
        gas = lumen * ((canvas.y - y[:, None, None]) / canvas.pixel_mm).clamp(0, 1)
        canvas.paint(gas * draws.chance(0.35)[:, None, None], -880.0)
    for side in (-1, 1):
        x, y, half = side * (a - 46), draws.uniform(-25, 15), draws.uniform(15, 24)
        there = (level > 0.45).float()[:, None, None] * cavity
        wobble = [(5, 0.08, draws.uniform(0, math.tau))]
        canvas.paint(canvas.ellipse(x, y, half, half, wobble=wobble) * there, 45.0)
        stool = draws.uniform(-150, 40)[:, None, None] + 160 * canvas.noise(5)
        canvas.paint(canvas.ellipse(x, y, half - 2.5, half - 2.5, wobble=wobble) * there, stool.clamp(-900, 120))


def _liver(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor, contrast: Tensor, cavity: Tensor) -> None:
    """Right lobe, left lobe across the midline, vessels, gall bladder, cysts and metastases."""
    draws = canvas.draws
    shrink = (1.12 - level).clamp(0, 1) ** 0.4 * (level < 0.92)
    hu = 50 + draws.uniform(-8, 10) + 50 * contrast
    wobble = [(2, 0.08, draws.uniform(-0.5, 0.5)), (3, draws.uniform(0, 0.09), draws.uniform(0, math.tau))]
    right = canvas.ellipse(
        -a * 0.42, 4, a * 0.45 * shrink, b * 0.66 * shrink, angle_rad=-0.25, power=2.2, wobble=wobble
    )
    left_size = (1 - 1.5 * level).clamp_min(0)
    left = canvas.ellipse(-a * 0.05, b * 0.36, a * 0.46 * left_size, b * 0.27 * left_size, angle_rad=-0.15, power=2.1)
    liver = torch.maximum(right, left) * cavity
    canvas.paint(liver, hu[:, None, None] + 3.0 * canvas.noise(12))
    vessel_hu = hu + 4 + 55 * contrast
    for _ in range(9):
        x, y = -a * draws.uniform(0.05, 0.72), b * draws.uniform(-0.3, 0.42)
        vessel = canvas.ellipse(
            x, y, draws.uniform(2, 14), draws.uniform(1.2, 3.2), angle_rad=draws.uniform(0, math.pi)
        )
        canvas.paint(vessel * liver, vessel_hu)
    for low_hu, high_hu, chance in ((0, 15, 0.5), (25, 50, 0.5), (25, 50, 0.35)):
        x, y, radius = -a * draws.uniform(0.1, 0.7), b * draws.uniform(-0.3, 0.4), draws.uniform(2.5, 13)
        spot = canvas.ellipse(x, y, radius, radius * draws.uniform(0.7, 1.2)) * liver
        canvas.paint(spot * draws.chance(chance)[:, None, None], draws.uniform(low_hu, high_hu))
    bladder = draws.chance(0.5) * ((level > 0.3) & (level < 0.8)).float()
    canvas.paint(canvas.ellipse(-a * 0.3, b * 0.36, 12 * bladder, 17, angle_rad=0.4) * cavity, draws.uniform(2, 18))


def _stomach_and_spleen(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor, contrast: Tensor, cavity: Tensor) -> None:
    """Stomach with an air-fluid level, spleen, pancreas with its tail towards the spleen."""
    draws = canvas.draws
    upper = (level < 0.5).float()
    spleen_hu = 48 + 70 * contrast + draws.uniform(-5, 5)
    half = draws.uniform(24, 34) * (level < 0.62)
    spleen = canvas.ellipse(a * 0.58, -b * 0.3, half, 42, angle_rad=draws.uniform(0.2, 0.6), wobble=[(2, 0.1, 0.6)])
    canvas.paint(spleen * cavity, spleen_hu[:, None, None] + 4.0 * canvas.noise(10))
    x, y = a * draws.uniform(0.22, 0.36), b * draws.uniform(0.2, 0.34)
    half_a, half_b = draws.uniform(30, 46) * upper, draws.uniform(22, 34)
    wobble = [(2, 0.06, draws.uniform(0, math.tau)), (3, draws.uniform(0, 0.12), draws.uniform(0, math.tau))]
    canvas.paint(canvas.ellipse(x, y, half_a, half_b, angle_rad=0.5, wobble=wobble) * cavity, 55.0)
    lumen = canvas.ellipse(x, y, half_a - 4, half_b - 4, angle_rad=0.5, wobble=wobble) * cavity
    meal = draws.uniform(5, 45) + draws.chance(0.3) * draws.uniform(80, 280)
    canvas.paint(lumen, meal[:, None, None] + 12 * canvas.noise(6))
    surface = draws.uniform(-6, 16)
    air = lumen * ((canvas.y - (y + surface)[:, None, None]) / canvas.pixel_mm).clamp(0, 1)
    canvas.paint(air, -960.0)
    pancreas_there = ((level > 0.35) & (level < 0.75)).float()
    lobes = [(9, 0.12, draws.uniform(0, math.tau))]
    pancreas = canvas.ellipse(a * 0.14, b * 0.02, 48 * pancreas_there, 9, angle_rad=-0.35, wobble=lobes)
    canvas.paint(pancreas * cavity, 38 + 55 * contrast)


def _kidneys(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor, contrast: Tensor, cavity: Tensor) -> None:
    """Cortex, medulla, fat of the sinus, urine; sometimes a cyst or a stone."""
    draws = canvas.draws
    for side in (-1, 1):
        low = (level > draws.uniform(0.3, 0.45)).float()
        x, y = side * a * draws.uniform(0.4, 0.47), -b * draws.uniform(0.3, 0.42)
        half_a, half_b, tilt = draws.uniform(22, 28) * low, draws.uniform(26, 33), side * draws.uniform(0.5, 0.9)
        cortex_hu = 33 + 165 * contrast
        bed = canvas.ellipse(x, y, half_a + 12 * low, half_b + 10, angle_rad=tilt) * cavity
        canvas.paint(bed, FAT_HU)
        canvas.paint(canvas.ellipse(x, y, half_a, half_b, angle_rad=tilt) * cavity, cortex_hu)
        for step in range(7):
            angle = tilt + (1.57 - 1.57 * side) + (step - 3) * 0.62
            px, py = x + 0.62 * half_a * torch.cos(angle), y + 0.62 * half_b * torch.sin(angle)
            canvas.paint(canvas.ellipse(px, py, 6.0 * low, 4.2, angle_rad=angle) * cavity, 32 + 95 * contrast)
        inward = 0.5 * side
        sinus = canvas.ellipse(x - inward * half_a, y + 2, half_a * 0.5, half_b * 0.42, angle_rad=tilt)
        canvas.paint(sinus * cavity, FAT_HU + 20)
        pelvis = canvas.ellipse(x - inward * half_a, y + 2, half_a * 0.25, half_b * 0.2, angle_rad=tilt)
        canvas.paint(pelvis * cavity, 10 + 60 * contrast)
        stone = canvas.ellipse(x - inward * half_a, y + 5, 2.5 * low * draws.chance(0.12), 2.5)
        canvas.paint(stone, draws.uniform(400, 1100))
        cyst = canvas.ellipse(x + side * half_a * 0.8, y - 12, draws.uniform(4, 13) * low * draws.chance(0.3), 9)
        canvas.paint(cyst * cavity, draws.uniform(0, 15))


def _lung_bases(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor, cavity: Tensor) -> None:
    """Crescents of lung behind liver and spleen in the uppermost slices, with vessels."""
    draws = canvas.draws
    depth = (0.28 - level).clamp_min(0) / 0.28
    for side in (-1, 1):
        outer = canvas.ellipse(side * a * 0.38, -b * 0.3, a * 0.5 * (depth > 0), b * 0.52) * cavity
        dome = canvas.ellipse(side * a * 0.36, -b * 0.3 + 26 * depth + 6, a * 0.5, b * 0.54)
        lung = canvas.ring_of(outer, dome)
        canvas.paint(lung, draws.uniform(-880, -780)[:, None, None] + 30 * canvas.noise(9))
        canvas.paint(canvas.band(canvas.noise(9), 0.1) * lung * 0.45, -200.0)


def _spine(canvas: Canvas, b: Tensor, level: Tensor) -> None:
    """Muscles of the back, vertebra with canal and processes, psoas in the lower slices."""
    draws = canvas.draws
    y = -b * 0.42
    half_a, half_b = draws.uniform(20, 25), draws.uniform(15, 18)
    for side in (-1, 1):
        canvas.paint(
            canvas.ellipse(side * 34, y - 34, 30, 17, angle_rad=-side * 0.15, power=2.3), 50 + 12 * canvas.noise(4)
        )
        psoas = ((level - 0.45).clamp_min(0) * 55).clamp_max(19)
        canvas.paint(canvas.ellipse(side * (half_a + 12), y - 4, psoas, 19, angle_rad=side * 0.2), 56.0)
        crus = canvas.ellipse(side * 15, y + half_b + 4, 5 * (level < 0.6), 15, angle_rad=side * 0.35)
        canvas.paint(crus, 52.0)
        process = canvas.ellipse(side * 34, y - 24, 19, 4.2, angle_rad=-side * 0.2, power=2.5)
        canvas.paint(process, draws.uniform(420, 700))
        canvas.paint(canvas.ellipse(side * 14, y - 20, 5, 13, angle_rad=side * 0.2), draws.uniform(500, 800))
    canvas.paint(canvas.ellipse(0, y - 42, 4.5, 16, power=2.6), draws.uniform(450, 750))
    cortex, marrow = draws.uniform(480, 800), draws.uniform(120, 240)
    canvas.paint(canvas.ellipse(0, y, half_a, half_b, power=2.4), cortex)
    trabecular = marrow[:, None, None] + 35 * canvas.noise(3)
    disc = draws.chance(0.25)[:, None, None]  # a slice through the disc between two vertebrae
    canvas.paint(canvas.ellipse(0, y, half_a - 2, half_b - 2, power=2.4), disc * 85 + (1 - disc) * trabecular)
    canvas.paint(canvas.ellipse(0, y - half_b - 7, 13, 11), draws.uniform(500, 800))
    canvas.paint(canvas.ellipse(0, y - half_b - 6.5, 10, 8.5), 20.0)
    canvas.paint(canvas.ellipse(0, y - half_b - 6, 5.5, 5), 38.0)


def _great_vessels(canvas: Canvas, b: Tensor, contrast: Tensor) -> None:
    """Aorta (with wall calcification in some), vena cava, branches on the way to the organs."""
    draws = canvas.draws
    y, radius = -b * 0.42 + 28, draws.uniform(8.5, 13)
    aorta_hu = 40 + 235 * contrast * draws.uniform(0.8, 1)
    canvas.paint(canvas.ellipse(9, y, radius + 1.5, radius + 1.5), 45.0)
    canvas.paint(canvas.ellipse(9, y, radius, radius), aorta_hu)
    angle = draws.uniform(0, math.tau)
    plaque = canvas.ellipse(9 + radius * torch.cos(angle), y + radius * torch.sin(angle), 3.5 * draws.chance(0.35), 1.6)
    canvas.paint(plaque, draws.uniform(350, 900))
    cava_hu = 40 + 120 * contrast * draws.uniform(0.6, 1.1)
    canvas.paint(canvas.ellipse(-19, y + 4, draws.uniform(9, 14), draws.uniform(6.5, 11), angle_rad=0.3), cava_hu)
    for _ in range(3):
        x, up, reach = draws.uniform(-22, 30), draws.uniform(18, 40), draws.uniform(3, 18)
        branch = canvas.ellipse(x, y + up, reach, draws.uniform(2.2, 4), angle_rad=draws.uniform(-0.5, 0.5))
        canvas.paint(branch, 40 + 170 * contrast)


def _ribs(canvas: Canvas, a: Tensor, b: Tensor, level: Tensor) -> None:
    """Short oblique cuts through the ribs along the wall, fewer in the lower slices."""
    draws = canvas.draws
    for side in (-1, 1):
        for step in range(6):
            there = ((1.05 - level) * 6 > step).float()
            angle = torch.as_tensor(-1.05 + 0.4 * step) + draws.uniform(-0.12, 0.12)
            reach = 0.865 + 0.01 * draws.uniform(-1, 1)
            x, y = side * reach * a * torch.cos(angle), reach * b * torch.sin(angle)
            along = torch.atan2(b * torch.cos(angle), -side * a * torch.sin(angle))
            half = draws.uniform(7, 16) * there
            canvas.paint(canvas.ellipse(x, y, half, 4.5, angle_rad=along, power=2.3), draws.uniform(550, 950))
            canvas.paint(
                canvas.ellipse(x, y, half - 2.2 * there, 2.5, angle_rad=along, power=2.3), draws.uniform(120, 300)
            )
