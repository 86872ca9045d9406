# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sparse3D: an object from two photographs
#
# *Sparse3D: Distilling Multiview-Consistent Diffusion for Object Reconstruction from Sparse Views*, Zou et al., AAAI
# 2024, [arXiv 2308.14078](https://arxiv.org/abs/2308.14078).
#
# Two photographs of a chair show less than half of it. Somebody who has seen many chairs still knows roughly how it
# goes on: four legs, the back as wide as the seat, the fabric the same on both sides. Sparse3D asks a diffusion model
# for this knowledge, tells it by an *epipolar controller* which chair is meant, and fits a scene to its answers. The
# usual way to do that, score distillation (SDS), blurs; the paper's own, **C-SDS**, is to blur less. Does it?
#
# (1) the problem, (2) the epipolar feature transformer, (3) a category's model and its controller, (4) two gradients
# that differ in one term, (5) the experiment with its controls, (6) a real chair, (7) the verdicts.
#
# The transformer is in `epipolar.py`, the method in `method.py`, the training of the networks in `priors.py`, the arms
# in `experiment.py`. The paper's text was not at hand: what is guessed is marked there and listed in `paper.yaml`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
category = None
subset = None
size = None
train_objects = None
train_views = None
tests = None
circle = None
real_arms = None
views = None
main_views = None
arms = None
side_arms = None
points = None
steps = None
bootstrap_steps = None
lr_means = None
lr_means_final = None
lr_scales = None
lr_quats = None
lr_opacities = None
lr_colors = None
w_silhouette = None
w_bootstrap = None
w_prior = None
w_opacity = None
ray_pixels = None
eft_width = None
eft_layers = None
eft_pixels = None
eft_samples = None
eft_steps = None
eft_objects = None
eft_rays = None
eft_rate = None
prior = None
stable_diffusion = None
base_width = None
base_steps = None
base_batch = None
base_rate = None
control_maps = None
control_steps = None
control_batch = None
control_rate = None
lpips = None
device = None
workers = None

# %%
import dataclasses
import statistics
from functools import partial

import matplotlib.pyplot as plt
import torch

from common import params as parameters
from common import plots
from common.record import Record
from common.splatting.model import Gaussians
from papers.sparse3d import data, evaluation, experiment, figures, priors
from papers.sparse3d.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "sparse3d", profile, given)
record = Record.open("sparse3d", profile, params)
plots.style()
main = params.main_views
seed = params.seeds[0]
workers = params.workers or None
label = {name: arm.label for name, arm in experiment.ARMS.items()}
params

# %% [markdown]
# ## 1. The problem
#
# At `smoke` and `laptop` the category is generated: chairs of random parts, sizes and fabrics, each turned by a random
# angle, with exact poses, masks, depth and surface. Some chairs train networks; every seed has a held-out chair that
# no network has seen. A photograph costs nothing, so everything can be compared with the truth. At `paper` it is a
# category of CO3Dv2.

# %%
places = [(v, s) for v in params.views for s in params.seeds]
jobs = {f"album-{first}": partial(data.album, params, first, end) for first, end in data.album_parts(params)}
parts = list(record.cells(jobs, "training objects", workers=workers).values())
album = data.joined(parts)
jobs = {f"case-{v}-seed{s}": partial(data.case, params, v, s) for v, s in places}
jobs |= {f"other-{v}-seed{s}": partial(data.other_case, params, v, s) for v, s in places}
made = list(record.cells(jobs, "held-out objects", workers=workers).values())
cases = dict(zip(places, made, strict=False))
others = dict(zip(places, made[len(places) :], strict=True))
name, sha256 = data.provenance(params)
record.data(name, sha256=sha256)
print(f"{len(album.images)} objects to learn from, {album.images.shape[1]} pictures each, {params.size} pixels a side")

# %%
case = cases[main, seed]
rows = []
for s in params.seeds[:3]:
    one = cases[main, s].scene
    rows.append([*(view.image for view in one.train), None, *(view.image for view in one.test[:3])])
titles = [*["photograph"] * main, "", *["test view"] * 3]
labels = [f"seed {s}" for s in params.seeds[:3]]
fig = figures.gallery(rows, titles, row_labels=labels)
record.figure("inputs", fig, "What is given of some held-out objects, and views that test.")

# %% [markdown]
# ## 2. What the photographs say about a new camera
#
# Take a pixel of a camera nobody stood at. Its ray may meet the surface at any depth; each depth is one pixel of every
# photograph, all of them on that photograph's **epipolar line**. The *epipolar feature transformer* (EFT) picks
# features there and attends
#
# 1. over the photographs, at each depth: do they agree?
# 2. along the ray, in each photograph: which depth is the surface?
# 3. over the photographs again: whom to believe?
#
# Tokens also hold harmonics of both rays' Plücker coordinates and of the depth, all in the query camera's coordinates:
# turning the world changes nothing (checked below). Out come a colour and a feature for each ray, here one ray for each
# square of 2 x 2 pixels. It learns by predicting pictures of training objects from others.

# %%
first = ["transformer"] if params.prior == "pretrained" else ["transformer", "base"]
jobs = {name: partial(experiment.first_networks, params, album, name) for name in first}
trained = record.cells(jobs, "transformer and base", workers=workers)

jobs = {
    f"looks-{v}-seed{s}": partial(experiment.looks, params, cases[v, s], others[v, s], trained["transformer"])
    for v, s in places
}
looks = dict(zip(places, record.cells(jobs, "transformer at work", workers=workers).values(), strict=True))

# %%
spots = [len(case.circle) * i // 6 for i in range(6)]
rows = {"transformer": looks[main, seed].pictures}
if case.truth is not None:
    rows["truth"] = case.truth
fig = figures.gallery([[images[i] for i in spots] for images in rows.values()], row_labels=list(rows))
record.figure("transformer", fig, "The transformer's pictures of a held-out object, around it, and the truth below.")

# %%
for v, s in places:
    if cases[v, s].truth is not None:
        for name, value in evaluation.transformer_quality(cases[v, s], looks[v, s].pictures).items():
            record.metric("eft_psnr", value, variant=f"{name}/{v}", seed=s)
            print(f"{v} photographs, seed {s}: {name} {value:.2f} dB")

# %% [markdown]
# ## 3. A model of the category, and its controller
#
# A diffusion model learns to predict the noise $\epsilon$ in $x_t = \sqrt{a_t}\,x + \sqrt{1-a_t}\,\epsilon$. The
# *base* $\epsilon(x_t)$ has seen chairs and is then frozen. Here it has a million weights and works in pixels; in the
# paper it is Stable Diffusion, told the category as its prompt. The *controller* is ControlNet's: a copy of the base's
# encoder that also sees the transformer's map $f$. Its outputs pass convolutions that start at zero, so that
# $\epsilon(x_t; f) = \epsilon(x_t)$ at first, exactly.

# %%
base = trained.get("base")
controller = record.cell(
    "controller",
    partial(
        priors.train_controller,
        params,
        album,
        trained["transformer"]["state"],
        base and base["state"],
    ),
)
networks = experiment.Networks(trained["transformer"], base, controller)
curves = {"transformer": trained["transformer"], "base": base, "controller": controller}
fig, axes = plt.subplots(1, 3, figsize=(10, 2.6))
for ax, (name, found) in zip(axes, curves.items(), strict=True):
    if found is not None:
        steps, values = figures.smooth(found["losses"])
        record.curve("network_loss", steps, values, variant=name)
        ax.plot(steps, values)
    ax.set(xlabel="step", title=name, yscale="log")
axes[0].set_ylabel("squared error")
record.figure("networks", fig, "Training losses: of colours (transformer) and of the noise (base, controller).")

# %% [markdown]
# Did they learn anything? The error of the predicted noise on pictures of *held-out* objects: of the answer 0, of the
# base, of the controlled model, and of the same with the features of *another* object. If control by the wrong object
# is as good, the controller has learnt nothing about the object.

# %%
prior = networks.prior(params)
for (v, s), one in cases.items():
    if v == main and one.truth is not None:
        found = evaluation.prior_quality(prior, one, looks[v, s].maps, looks[v, s].others, s)
        for name, value in found.items():
            record.metric("prior_error", value, variant=name, seed=s)
        print(f"seed {s}:", {name: f"{value:.4f}" for name, value in found.items()})

# %%
if params.prior == "small":
    base_samples, steered = evaluation.samples(prior, looks[main, seed].maps[spots], params.size, seed)
    rows = {"base": base_samples, "controlled": steered}
    if case.truth is not None:
        rows["truth"] = case.truth[spots]
    fig = figures.gallery([list(images) for images in rows.values()], row_labels=list(rows))
    caption = (
        "Samples of the base and, from the same noise, of the controlled model at cameras around a held-out object."
    )
    record.figure("samples", fig, caption)

# %% [markdown]
# ## 4. Two gradients that differ in one term
#
# How does a model of pictures pull on a scene? Render it, $x(\theta)$; add noise; ask what noise the model sees. If the
# model sees more than was added, it finds the picture unlikely there:
#
# $$\nabla_\theta \mathcal L_\mathrm{SDS} = \mathbb E_{t,\epsilon}\Big[ w(t)\,\big(\epsilon(x_t; f) - \epsilon\big)
#   \,\tfrac{\partial x}{\partial \theta}\Big], \qquad
# \nabla_\theta \mathcal L_\text{C-SDS} = \mathbb E_{t,\epsilon}\Big[ w(t)\,\big(\epsilon(x_t; f) - \epsilon(x_t)\big)
#   \,\tfrac{\partial x}{\partial \theta}\Big].$$
#
# C-SDS replaces the noise by what the frozen category model sees in the same picture. (This form is our reading of name
# and abstract.) What that does shows best where all is known: let the category be numbers $N(0, 1)$, and let $f$ say
# $N(1, 0.3^2)$. SDS pulls to the mean, 1, whatever the spread: with many numbers at once, that is blur. C-SDS pulls
# *beyond* it, away from what the category has in common. More contrast, then; whether it is the right contrast is a
# question for the experiment.

# %%
where = torch.linspace(-1, 4, 21).tolist()
fig, ax = plt.subplots(figsize=(5, 3))
for rule, name in (("sds", "SDS"), ("csds", "C-SDS")):
    point = evaluation.fixed_point(rule)
    record.metric("fixed_point", point, variant=rule)
    line = ax.plot(where, evaluation.pull(rule, where), label=f"{name}: settles at {point:.2f}")
    ax.plot([point], [0], "o", color=line[0].get_color())
ax.axhline(0, color="k", linewidth=0.5)
ax.set(xlabel="x", ylabel="pull", title="category N(0, 1), f says N(1, 0.3²)")
ax.legend()
record.figure("pull", fig, "Where SDS and C-SDS pull a number when both models are known exactly.")

# %%
for name, change in evaluation.exact_checks().items():
    record.metric("change", change, variant=name)
    print(f"{name}: {change:g}")

# %% [markdown]
# ## 5. The experiment
#
# A scene is a fixed number of Gaussians on the visual hull of the photographs' masks (the paper's is a NeRF on a hash
# grid). All arms fit the photographs and their masks; the *bootstrap* adds the transformer's pictures of a circle of
# cameras in the first third; then a prior takes over. Controls: the base alone (nothing says which chair), features of
# another chair, other random numbers, and an oracle that knows the true pictures. Arms of one seed share object, start
# and random numbers.

# %%
arms = {v: params.arms if v == main else params.side_arms for v in params.views}
runs = [(arm, v, s) for v in params.views for arm in arms[v] for s in params.seeds]
bar = params.workers == 1
jobs = {
    f"{arm}-{v}-seed{s}": partial(experiment.fitted, params, cases[v, s], looks[v, s], networks, arm, s, progress=bar)
    for arm, v, s in runs
}
results = dict(zip(runs, record.cells(jobs, "scenes", workers=workers).values(), strict=True))
scores = evaluation.report(record, results)
shown = [name for name in ("psnr", "gmsd", "sharpness", "chamfer") if name in scores]
print(f"{'':22s} views", *(f"{name:>10s}" for name in shown))
for arm, v in scores["psnr"]:
    print(f"{label[arm]:22s} {v:5d}", *(f"{statistics.fmean(scores[name][arm, v]):10.3f}" for name in shown))

# %% [markdown]
# By eye. Below each picture: PSNR, and gradient energy as a share of the truth's (1 is as sharp as the photograph).

# %%
columns = [arm for arm in ("photo", "eft", "sds", "csds", "oracle") if (arm, main) in scores["psnr"]]
rows, under = [], []
for tested in case.scene.test[:3]:
    images = [
        evaluation.picture(Gaussians(**results[arm, main, seed]["model"]), tested.camera.to("cpu")) for arm in columns
    ]
    truth = tested.image.cpu()
    quality = [-10 * (image - truth).square().mean().log10() for image in images]
    sharp = [evaluation.gradient_energy(image) / evaluation.gradient_energy(truth) for image in images]
    rows.append([*images, truth])
    under.append([*(f"{q:.1f} dB, {e:.2f}" for q, e in zip(quality, sharp, strict=True)), ""])
fig = figures.gallery(rows, [*(label[arm] for arm in columns), "truth"], under=under, width=1.9)
record.figure("renders", fig, f"Test views of a held-out object from {main} photographs by arm, and the truth.")

# %%
tested = case.scene.test[0]
if tested.depth is not None:
    depths = []
    for arm in columns:
        drawn = Gaussians(**results[arm, main, seed]["model"]).render(tested.camera.to("cpu"), mode="ED")
        depths.append(drawn.depth.detach().where(drawn.alpha.detach() > evaluation.COVERED, torch.nan))
    depths.append(tested.depth.cpu().where(tested.depth.cpu() > 0, torch.nan))
    fig = figures.gallery([depths], [*(label[arm] for arm in columns), "truth"])
    record.figure("depth", fig, "Depth of one test view by arm, and the truth; blank where nothing is.")

# %% [markdown]
# ### Sharper, or only noisier?
#
# Gradient energy cannot tell detail from speckle, so it never stands alone: PSNR and GMSD (a perceptual distance, lower
# is better, *not* LPIPS) say whether what was added is right. The spectrum shows at which scale.

# %%
fig, ax = plt.subplots(figsize=(5.4, 3.4))
lines = {}
for arm in columns:
    models = {s: Gaussians(**results[arm, main, s]["model"]) for s in params.seeds}
    lines[label[arm]] = [
        evaluation.spectrum(evaluation.picture(models[s], view.camera.to("cpu")))
        for s in params.seeds
        for view in cases[main, s].scene.test
    ]
lines["truth"] = [evaluation.spectrum(view.image.cpu()) for s in params.seeds for view in cases[main, s].scene.test]
for number, (name, found) in enumerate(lines.items()):
    power = torch.stack(found).mean(dim=0)
    record.curve("spectrum", list(range(1, len(power) + 1)), power.tolist(), variant=name)
    style = {"color": "black", "linestyle": ":"} if name == "truth" else {"color": plots.COLORS[number]}
    ax.plot(range(1, len(power) + 1), power, label=name, **style)
ax.set(xlabel="waves across the picture", ylabel="power", xscale="log", yscale="log", title="test views")
ax.legend()
record.figure("spectrum", fig, "Mean power of test views by spatial frequency, by arm, and that of the truth.")

# %%
panels = {"psnr": "PSNR, dB", "gmsd": "GMSD, lower is better", "sharpness": "gradient energy / truth's"}
panels |= {"chamfer": "Chamfer distance, lower is better"} if "chamfer" in scores else {}
fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True)
for ax, (name, title) in zip(axes, panels.items(), strict=True):
    figures.bars(ax, {label[arm]: values for (arm, v), values in scores[name].items() if v == main})
    ax.set(xlabel=title)
record.figure("arms", fig, f"All arms, {main} photographs: means, 95 % intervals over held-out objects, a dot each.")

# %%
everywhere = [arm for arm in experiment.ARMS if all((arm, v) in scores["psnr"] for v in params.views)]
if len(params.views) > 1 and everywhere:
    fig, ax = plt.subplots(figsize=(4.4, 3.2))
    series = {label[arm]: {v: scores["psnr"][arm, v] for v in params.views} for arm in everywhere}
    plots.metric_against(ax, params.views, series)
    ax.set(xlabel="photographs", ylabel="PSNR, dB", title="more photographs")
    record.figure("psnr-views", fig, "PSNR of test views against the number of photographs.")

# %% [markdown]
# ## 6. A chair of another kind
#
# NeRF-synthetic's chair at the same size. The networks have seen generated chairs alone, of plain parts and under other
# lamps, so this shows what becomes of the method outside its category. No claim is made of it.

# %%
if params.real_arms:
    record.data(data.REAL, sha256=data.real_sha256())
    real = record.cell("real", partial(data.real_case, params, main))
    seen = record.cell("real-looks", partial(experiment.looks, params, real, others[main, seed], networks.transformer))
    jobs = {f"real-{arm}": partial(experiment.fitted, params, real, seen, networks, arm, 0) for arm in params.real_arms}
    found = dict(zip(params.real_arms, record.cells(jobs, "real chair", workers=workers).values(), strict=True))
    rows = []
    for view in real.scene.test[:3]:
        images = [evaluation.picture(Gaussians(**found[arm]["model"]), view.camera) for arm in params.real_arms]
        rows.append([real.scene.train[len(rows) % main].image, *images, view.image])
    titles = ["photographs", *(label[arm] for arm in params.real_arms), "truth"]
    fig = figures.gallery(rows, titles, width=1.8)
    record.figure(
        "real", fig, "NeRF-synthetic's chair from the photographs in the first column, by arm, and the truth."
    )
    for arm in params.real_arms:
        for name, value in found[arm]["scores"].items():
            record.metric(f"real_{name}", value, variant=arm)
        print(f"{label[arm]:22s} {found[arm]['scores']['psnr']:6.2f} dB")
else:
    print("left out: no real data at this profile")

# %% [markdown]
# ## 7. Verdicts
#
# *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: pictures of 48 pixels, a
# generated category, a diffusion model of a million weights trained for minutes. Two of the paper's claims are not here
# at all: that it beats SparseFusion on CO3Dv2, and that it holds for objects of any kind.

# %%
record.close()
