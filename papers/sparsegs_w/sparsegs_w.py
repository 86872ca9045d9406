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
# # SparseGS-W: five photographs by five strangers
#
# *SparseGS-W: Sparse-View 3D Gaussian Splatting in the Wild with Generative Priors*, Li et al., 2025,
# [arXiv 2503.19452](https://arxiv.org/abs/2503.19452).
#
# Photographs of a landmark on the internet were taken on other days, by other cameras, with other people in front.
# Methods that cope with that learn from a thousand of them. SparseGS-W wants to make do with five, and lets a
# diffusion model that has seen millions of pictures do the rest. This notebook follows the idea to its verdicts:
#
# (1) the photographs, (2) where to start, (3) painting people over, (4) one appearance for all, (5) repairing views
# that nobody photographed, (6) near ones first, (7) the experiment, (8) appearance at will, (9) what repair does round
# by round, (10) real photographs, (11) the verdicts.
#
# **What this is not.** We had the abstract and remarks of others, not the paper's text. The equations are our reading
# of it and every number is ours. Two of its claims need data and networks that are not here: that it beats the methods
# for photo collections on PhotoTourism (SW-1) waits for the `paper` profile, with 3DGS and 3DGS with learnt colours as
# the only opponents; FID, ClipIQA and MUSIQ (SW-2) are not computed at all.
#
# The method is in `method.py`, the made-up strangers in `photos.py`, the diffusion model in `prior.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
width = None
height = None
views = None
tests = None
photos = None
fern_arms = None
fern_factor = None
arms = None
points = None
steps = None
warm = None
every = None
rounds = None
round_views = None
strength_first = None
strength_last = None
lr_means = None
lr_means_final = None
lr_scales = None
lr_quats = None
lr_opacities = None
lr_sh0 = None
sh_degree = None
sh_every = None
w_virtual = None
ramp = None
w_clean = None
dssim_virtual = None
ddim_steps = None
clean_strength = None
down = None
control = None
priors = None
dust3r = None
stable_diffusion = None
controlnet = None
prompt = None
prior_scenes = None
prior_width = None
prior_steps = None
prior_batch = None
prior_crop = None
prior_rate = None
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
from common.splatting.virtual import point_image
from papers.sparsegs_w import data, evaluation, experiment, figures, method
from papers.sparsegs_w import prior as priors_
from papers.sparsegs_w.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "sparsegs_w", profile, given)
record = Record.open("sparsegs_w", profile, params)
plots.style()
seed = params.seeds[0]
at_once = params.workers or None
label = {name: arm.label for name, arm in experiment.ARMS.items()}
params

# %% [markdown]
# ## 1. The photographs
#
# At `smoke` and `laptop` a facade is generated, a new one for every seed, and the strangers are made up: each but the
# first photographs in a light of their own ($I' = g\,I^\gamma + b$ for each channel), and two or three people stand in
# front. Nobody tells the method what is transient; it gets **masks** from a detector that misses legs, has ragged
# outlines and takes something for a person that is none. The first photograph is the **reference**: test views are
# clean and in its light. Each photograph shows another part of the house, so much of every test view is in one
# photograph at most.
#
# The same cell lets other scenes be photographed and fitted badly: the diffusion model's lessons, see 5.

# %%
jobs = {f"case-seed{s}": partial(data.case, params, s) for s in params.seeds}
lessons = params.prior_scenes + 1 if params.priors == "standin" else 0
jobs |= {f"lesson-{n}": partial(priors_.bad_pictures, params, n) for n in range(lessons)}
done = record.cells(jobs, "scenes", workers=at_once)
cases = {s: done[f"case-seed{s}"] for s in params.seeds}
pairs = [done[f"lesson-{n}"] for n in range(lessons)]
case = cases[seed]
name, sha256 = data.provenance(params)
record.data(name, sha256=sha256)
for s, one in cases.items():
    if one.weak is not None:
        record.metric("weak", one.weak, seed=s)
        print(f"seed {s}: {one.weak:.0%} of the test pixels are in fewer than two photographs")

# %%
known = case.true_masks is not None
for s, one in cases.items() if known else ():
    for metric, values in evaluation.input_quality(one).items():
        for variant, value in values.items():
            record.metric(metric, value, variant=variant, seed=s)
            print(f"seed {s}: {metric}[{variant}] {value:.3f}")

# %% [markdown]
# ## 2. Where to start
#
# A stereo network (DUSt3R) gives every pixel of every photograph a place in space and a confidence. Points of
# transient pixels are left out before all photographs are put together, and so are unsure ones. (Stand-in here: the
# true depth with smooth errors, wrong patches of which some pass the threshold, and the people where they stand.)

# %%
bare = dataclasses.replace(experiment.ARMS["raw"], masks="detected")
arms = {"with the people": experiment.ARMS["raw"], "masked": bare}
rows = {}
for title, arm in arms.items():
    cloud = experiment.start(params, case, experiment.inputs(case, arm, None), seed)
    rows[title] = [point_image(cloud, view.camera).image for view in case.scene.test[:4]]
rows["test view"] = [view.image for view in case.scene.test[:4]]
fig = figures.gallery(rows)
record.figure("start", fig, "Points before training, from test views, before white: with the people, and without.")

# %% [markdown]
# ## 3. Occlusion handling (OH)
#
# What stood behind the people is painted by the diffusion model:
# $I_\mathrm{clean} = M\cdot\mathrm{Inpaint}(I, M) + (1-M)\cdot I$. The photograph is noised and denoised (SDEdit), and
# after each step the pixels outside of the mask are set back to the photograph at that noise, so that the hole grows
# into its surroundings.
#
# ## 4. One appearance
#
# **AdaIN** gives a picture the mean and the deviation of a reference, channel by channel:
# $z' = \sigma_\mathrm{ref}\,(z-\mu)/\sigma + \mu_\mathrm{ref}$. Photographs are brought to the reference that way
# before anything else, and repaired views while they are denoised. It is exact where two pictures differ by a gain and
# an offset; it errs where they show different things, as five photographs of a house do. The classic rival: an affine
# map of colours for each photograph, **learnt** with the Gaussians.
#
# ## 5. Constrained novel-view enhancement (CNVE)
#
# A render $x$ of a view that nobody photographed is noised to strength $s$ and denoised under its own control
# (ControlNet), AdaIN after every step. Then the coarse is put back:
# $x^* \leftarrow x^* + D^\top(Dx - Dx^*)$, $D$ the means over blocks. $x^*$ serves as if it were a photograph:
#
# $$\mathcal L = (1-M)\,\mathrm{photo}(R, I) + w\,M\,|R - I_\mathrm{clean}|
#   + \lambda_v(t)\,\big[0.8\,L_1 + 0.2\,\text{D-SSIM}\big](x, x^*)$$
#
# Four things must hold exactly:

# %%
for check, error in evaluation.exact_checks().items():
    record.metric("error", error, variant=check)
    print(f"{check}: off by {error:.2g}")

# %% [markdown]
# Stable Diffusion is not at hand at `smoke` and `laptop`. Its stand-in is a small conditional diffusion model that
# predicts *condition plus correction*, so that an untrained one changes nothing; it has learnt from bad renders of
# other scenes, rooms and other facades. **A small prior can do harm**: one that believes its own guesses, as diffusion
# does, did. So this one looks at its condition alone, and the strength hardly matters to it. Its error on a scene kept
# aside stands here: unless "after" is lower than "before", CNVE has nothing to give, and the arms below will say so.

# %%
prior = None
if lessons:
    prior = record.cell("prior", partial(priors_.train, params, pairs[:-1], pairs[-1], progress=record.progress))
    steps_, values = figures.smooth(prior["losses"])
    record.curve("prior_loss", steps_, values)
    for variant, error in prior["error"].items():
        record.metric("prior_error", error, variant=variant)
    print("squared error of bad pictures of a scene kept aside:", {k: f"{e:.4f}" for k, e in prior["error"].items()})

# %%
if prior is not None:
    mender = priors_.mender(params, prior, seed)
    some = torch.stack([pair[0] for pair in pairs[-1][:4]]).movedim(1, -1).to(params.device)
    rows = {"bad": list(some)}
    for s in (params.strength_first, params.strength_last):
        rows[f"s = {s:g}"] = list(mender.enhance(some, 0, strength=s, reference=None, constrained=False))
    rows["constrained"] = list(mender.enhance(some, 0, strength=params.strength_first, reference=None))
    rows["good"] = [pair[1].movedim(0, -1) for pair in pairs[-1][:4]]
    fig = figures.gallery(rows)
    record.figure(
        "prior", fig, "A scene kept aside: bad renders, repaired at two strengths, with the constraint, truth."
    )

# %% [markdown]
# ## 6. Near ones first
#
# Close to a photograph the render is good and the repair has little to invent; far from all of them both are bad. So
# the virtual views of the first round lie next to the photographs, and the interpolation parameter widens linearly up
# to the middle between two, while $s$ falls. The rival draws as many views **at once**, anywhere, at the mean strength.

# %%
for metric, values in evaluation.schedule(params).items():
    for variant, value in values.items():
        record.metric(metric, value, variant=variant)
plan = experiment.rounds(params, experiment.ARMS["full"])
fig, ax = plt.subplots(figsize=(7.5, 2.6))
centers = torch.stack([view.camera.center for view in case.scene.train]).cpu()
draw = torch.Generator(case.reference.image.device).manual_seed(0)
for turn in range(plan.count):
    cameras = method.virtual_cameras(case.scene.train, plan.reach(turn), 12, draw)
    place = torch.stack([camera.center for camera in cameras]).cpu()
    shade = plots.COLORS[turn % len(plots.COLORS)]
    ax.plot(place[:, 0], place[:, 1], ".", color=shade, label=f"round {turn + 1}, s = {plan.strength(turn):.2g}")
ax.plot(centers[:, 0], centers[:, 1], "ks", label="photographs")
ax.set(xlabel="x", ylabel="y", title="virtual cameras from above", aspect="equal")
ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.05))
record.figure(
    "cameras", fig, "Photographs and virtual cameras from above: every round goes further from the photographs."
)

# %% [markdown]
# ## 7. The experiment
#
# Every arm is the whole method less (or with) one thing. Arms of one seed share scene, people, light, points' errors
# and random numbers, so their differences are paired. Finished trainings are kept: after an interruption this notebook
# goes on where it stopped.

# %%
bar = params.workers == 1 and record.interactive
runs = [(arm, s) for arm in params.arms for s in params.seeds]
jobs = {f"{a}-seed{s}": partial(experiment.train, params, cases[s], a, prior, s, progress=bar) for a, s in runs}
results = dict(zip(runs, record.cells(jobs, "arms", workers=at_once).values(), strict=True))
found = evaluation.report(record, results)
for arm, values in found["psnr"].items():
    left = f"   ghosts {statistics.fmean(found['ghost'][arm]):.3f}" if "ghost" in found else ""
    print(f"{label[arm]:24s}{statistics.fmean(values):6.2f} dB   {[f'{x:.2f}' for x in values]}{left}")

# %% [markdown]
# What the method is given, and what it makes of it.

# %%
best = "full" if "full" in params.arms else params.arms[0]
rows = {"photograph": [view.image for view in case.scene.train]}
rows["mask"] = [case.masks[view.name].float() for view in case.scene.train]
rows["after AdaIN"] = [
    view.image for view in experiment.inputs(case, dataclasses.replace(bare, appearance="adain"), None).views
]
clean = results[best, seed]["clean"]
if clean:
    rows["painted over"] = [clean[view.name] for view in case.scene.train]
if known:
    rows["truth"] = [case.clean[view.name] for view in case.scene.train]
fig = figures.gallery(rows)
record.figure(
    "inputs", fig, "The photographs, detected people, in the reference's appearance, painted over, the truth."
)
for s, one in cases.items() if known and clean else ():
    for variant, value in evaluation.hole_error(one, results[best, s]["clean"]).items():
        record.metric("hole_error", value, variant=variant, seed=s)
        print(f"seed {s}: error where people stood, {variant}: {value:.3f}")

# %%
models = {arm: Gaussians(**results[arm, seed]["model"]) for arm in params.arms}
columns = [arm for arm in ("raw", "no_oh", "no_adain", "affine_alone", "no_cnve", "full", "oracle") if arm in models]
rows = {}
for number, view in enumerate(case.scene.test[:3]):
    images = [experiment.picture(models[a], view.camera, results[a, seed]["colour"]) for a in columns]
    rows[f"test view {number + 1}"] = [*images, view.image]
titles = [f"{label[a]}\n{results[a, seed]['scores']['psnr']:.1f} dB" for a in columns] + ["truth\n"]
fig = figures.gallery(rows, titles, width=1.9)
record.figure("renders", fig, "Test views by arm beside the truth, first seed; PSNR: mean of all test views.")

# %% [markdown]
# Where people stood: what the models show from the photographs' own cameras.

# %%
if known:
    rows = {"photograph": [view.image for view in case.scene.train]}
    for a in [a for a in ("raw", "no_oh", "full") if a in models]:
        rows[label[a]] = [
            experiment.picture(models[a], view.camera, results[a, seed]["colour"]) for view in case.scene.train
        ]
    rows["truth"] = [case.clean[view.name] for view in case.scene.train]
    fig = figures.gallery(rows)
    record.figure("ghosts", fig, "Renders from the photographs' cameras with and without occlusion handling.")

# %% [markdown]
# Each arm's spread: a dot a seed, the mean, its 95 % interval. *Perfect masks* say what the detector's errors cost,
# *repaired by the truth* what a perfect diffusion model could bring, *shuffled repair* whether it matters what CNVE
# paints.

# %%
shown = [
    ("psnr", "PSNR of test views, dB"),
    ("gmsd", "GMSD (lower is better)"),
    ("ghost", "left of the people (lower is better)"),
]
shown = [(metric, title) for metric, title in shown if metric in found]
fig, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 0.32 * len(params.arms) + 1.2), sharey=True)
for ax, (metric, title) in zip(axes, shown, strict=True):
    figures.spread(ax, {label[arm]: values for arm, values in found[metric].items()}, title)
record.figure("spread", fig, "PSNR, GMSD and what is left of the people, by arm: dots are seeds, bars 95 % intervals.")

# %% [markdown]
# ## 8. Appearance at will
#
# A model in the reference's appearance can lend itself any photograph's: AdaIN from the render's own style to the
# photograph's. In a generated scene the truth in that light is known. *Matched* takes both styles from the same camera.

# %%
if known and best == "full":
    for s, one in cases.items():
        values = evaluation.appearance_control(one, Gaussians(**results[best, s]["model"]))
        for variant, value in values.items():
            record.metric("control_psnr", value, variant=variant, seed=s)
        print(f"seed {s}:", {k: f"{v:.2f} dB" for k, v in values.items()})
if best == "full":
    rows = {"photograph": [view.image for view in case.scene.train[1:]]}
    lent = [evaluation.lent(case, models[best], i, 0) for i in range(1, len(case.scene.train))]
    rows |= {way: [one[way].movedim(0, -1) for one in lent] for way in ("none", "adain", "matched")}
    if known:
        test = case.scene.test[0].image
        rows["truth"] = [case.lights[view.name](test) for view in case.scene.train[1:]]
    fig = figures.gallery(rows)
    record.figure(
        "appearance", fig, "One test view in the appearance of each photograph, by two ways of AdaIN, and truth."
    )

# %% [markdown]
# ## 9. Round by round
#
# What repair did to the virtual views, and whether it brought them closer to the truth.

# %%
pages = results[best, seed]["rounds"]
if pages:
    rows = {part: [page[part] for page in pages] for part in ("drawn", "repaired", "truth") if part in pages[0]}
    titles = [f"round {page['turn'] + 1}\ns = {plan.strength(page['turn']):.2g}" for page in pages]
    fig = figures.gallery(rows, titles)
    record.figure("repair", fig, "A virtual view of each round: the render, its repair, and what is really there.")
for (arm, s), result in results.items():
    if result["rounds"] and "truth" in result["rounds"][0]:
        values = evaluation.round_quality(result["rounds"])
        for variant, value in values.items():
            record.metric("virtual_psnr", value, variant=f"{arm}/{variant}", seed=s)
        print(
            f"{label[arm]:16s} seed {s}: virtual views {values['drawn']:.2f} dB, repaired {values['repaired']:.2f} dB"
        )

# %% [markdown]
# ## 10. Real photographs
#
# Five photographs of a fern (LLFF) with the same made-up people and light; held-out photographs, untouched, are the
# truth. Points come from plane-sweep stereo on the spoilt photographs: no truth goes into the start.

# %%
if params.fern_arms:
    record.data(data.FERN, sha256=data.fern_sha256())
    jobs = {f"fern-seed{s}": partial(data.fern_case, params, s) for s in params.seeds}
    ferns = dict(zip(params.seeds, record.cells(jobs, "ferns", workers=at_once).values(), strict=True))
    runs = [(arm, s) for arm in params.fern_arms for s in params.seeds]
    jobs = {f"fern-{a}-seed{s}": partial(experiment.train, params, ferns[s], a, prior, s) for a, s in runs}
    fern_results = dict(zip(runs, record.cells(jobs, "fern, arms", workers=at_once).values(), strict=True))
    fern_found = evaluation.report(record, fern_results, "fern_")
    for arm, values in fern_found["psnr"].items():
        print(f"{label[arm]:24s}{statistics.fmean(values):6.2f} dB   {[f'{x:.2f}' for x in values]}")
    rows = {"photograph": [view.image for view in ferns[seed].scene.train]}
    shown = [*ferns[seed].scene.train[:2], *ferns[seed].scene.test]
    for arm in params.fern_arms:
        one = Gaussians(**fern_results[arm, seed]["model"])
        rows[label[arm]] = [experiment.picture(one, view.camera) for view in shown]
    rows["truth"] = [ferns[seed].clean.get(view.name, view.image) for view in shown]
    fig = figures.gallery(rows)
    record.figure("fern", fig, "The fern: photographs; renders of two photographs' views and of test views; the truth.")
else:
    print("left out: no real data at this profile")

# %% [markdown]
# ## 11. Verdicts
#
# *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: 96 x 72 pixels, a stereo
# "network" that is the truth with noise, a diffusion model of one million weights. Orders may carry over.

# %%
record.close()
