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
# # LM-Gaussian: a scene from a handful of photographs
#
# *LM-Gaussian: Boost Sparse-view 3D Gaussian Splatting with Large Model Priors*, Yu et al., 2024,
# [arXiv 2409.03456](https://arxiv.org/abs/2409.03456).
#
# Gaussian splatting needs a hundred photographs of a place. From four, it explains the photographs perfectly and is
# wrong everywhere else. LM-Gaussian lets networks that have seen millions of images fill in what four photographs
# cannot say. This notebook goes from idea to verdict:
#
# (1) the problem, (2) which points to believe, (3) five losses, (4) repair by a diffusion model, (5) the experiment and
# the controls that expose a leak, (6) what the released code leaves out, (7) real photographs, (8) the verdicts.
#
# The method is in `method.py`, the priors in `priors.py`, the repair in `repair.py`, the arms in `experiment.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
factor = None
width = None
height = None
tests = None
closed = None
fern_arms = None
fern_views = None
fern_factor = None
views = None
main_views = None
arms = None
side_arms = None
points = None
stage1 = None
steps = None
every = None
early_until = None
early_most = None
rewind = None
lr_means = None
lr_means_final = None
lr_scales = None
lr_quats = None
lr_opacities = None
lr_sh0 = None
sh_degree = None
sh_every = None
w_virtual = None
w_depth = None
w_normal = None
w_depth_normal = None
box = None
between = None
align_steps = None
align_box = None
priors = None
dust3r = None
marigold_depth = None
marigold_normals = None
stable_diffusion = None
controlnet = None
prompt = None
prior_scenes = None
prior_width = None
prior_steps = None
control_steps = None
prior_batch = None
prior_crop = None
prior_rate = None
lora_rank = None
lora_steps = None
lora_batch = None
lora_crop = None
lora_rate = None
ddim_steps = None
strength = None
control = None
eta = None
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
from papers.lm_gaussian import data, evaluation, experiment, figures, method
from papers.lm_gaussian.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "lm_gaussian", profile, given)
record = Record.open("lm_gaussian", profile, params)
plots.style()
main = params.main_views
seed = params.seeds[0]
workers = params.workers or None
label = {name: arm.label for name, arm in experiment.ARMS.items()}
params

# %% [markdown]
# ## 1. The problem
#
# A scene is a cloud of coloured, semi-transparent ellipsoids: **Gaussians**. Drawing them is differentiable, so they
# can be fitted to photographs. With few photographs the fit has infinitely many solutions: a blob in front of a camera
# explains that camera's picture as well as a surface behind it, and whatever no camera sees is free.
#
# At `smoke` and `laptop` the scene is a generated courtyard with exact truth, a new one for every seed; at `paper` it
# is a folder of photographs. The share of the test pixels that no training view sees says how much must be *invented*.

# %%
scenes = data.scenes(params)
jobs = {
    f"case-{scene}-{v}-seed{s}": partial(data.case, params, scene, v, s)
    for scene in scenes
    for v in params.views
    for s in params.seeds
}
settings = [(x, v, s) for x in scenes for v in params.views for s in params.seeds]
made = dict(zip(settings, record.cells(jobs, "scenes", workers=workers).values(), strict=True))
case = made[scenes[0], main, seed]
name, sha256 = data.provenance(params)
record.data(name, sha256=sha256)
for (_, v, s), one in made.items():
    if one.unseen is not None:
        record.metric("unseen", one.unseen, variant=str(v), seed=s)
        print(f"{v} views, seed {s}: {one.unseen:.0%} of the test pixels are in no training view")

# %%
shown = [*case.scene.train[:4], *case.scene.test[:2]]
titles = ["photograph" if view in case.scene.train else "test view" for view in shown]
fig = figures.gallery([[view.image for view in shown]], titles)
record.figure("views", fig, f"Photographs of one scene, of {len(case.scene.train)} in all, and two views that test.")

# %% [markdown]
# ## 2. Where to start: points, and which to believe
#
# A stereo network (DUSt3R) looks at pairs of photographs and says for every pixel where in space it lies, and how sure
# it is. That is a far denser start than the points of structure from motion. But it errs in two ways. At edges and on
# plain walls it puts **floating points** in front of the truth. And of the **far background** it is unsure although it
# is right, so a threshold on the confidence would cut the background away. Hence two rules:
#
# 1. *Cleaning.* Let $p$ be a point of view $i$ with confidence $C_i(p)$, falling on pixel $q$ of view $j$. If $p$ lies
#    in front of what $j$ sees there and $C_i(p) < C_j(q)$, then $C_i(p) \leftarrow 0$.
# 2. *Background.* Where $D_i > 1.5\,\mathrm{median}(D_i)$: $C_i \leftarrow C_i + 5$. Then all points with $C_i > 5$
#    stay.
#
# (Stand-ins here: the true depth with noise, flying pixels and wrong patches; see `priors.py`.)

# %%
view = case.scene.train[0]
stereo, mono = case.stereo[view.name], case.mono[view.name]
maps = [stereo.depth, stereo.confidence, mono.depth]
titles = ["photograph", "stereo depth", "its confidence", "monocular depth", "monocular normals"]
fig = figures.gallery([[view.image, *maps, (mono.normals + 1) / 2]], titles, width=2.6)
record.figure("priors", fig, "What the priors say of one photograph: depth with wrong patches, confidence, normals.")

# %%
starts = {"sfm": "structure from motion", "raw": "raw stereo", "no_background": "cleaned", "init": "+ background rule"}
starts = {name: title for name, title in starts.items() if name != "sfm" or case.scene.points is not None}
camera = case.virtual[0]
clouds = {name: experiment.cloud(params, case, experiment.STAGE1[name], seed) for name in starts}
titles = [f"{title}\n{len(clouds[name]):,} points" for name, title in starts.items()]
fig = figures.gallery([[point_image(points, camera).image for points in clouds.values()]], titles, width=3)
record.figure("init", fig, "The points of four starts from a camera between two photographs, in front of white.")

# %%
for (_, v, s), one in made.items():
    if v == main and one.truth is not None:
        for name, values in evaluation.init_quality(params, one, s).items():
            for variant, value in values.items():
                record.metric(name, value, variant=variant, seed=s)
                print(f"seed {s}: {name}[{variant}] {value:.3f}")

# %% [markdown]
# ## 3. Five losses instead of one
#
# One Gaussian a point, and then a fit to the photographs $I$ with four more witnesses:
#
# $$\mathcal L = \underbrace{0.8\,\|R-I\|_1 + 0.2\,(1-\mathrm{SSIM})}_{\text{photographs}}
#   + 0.6\,\underbrace{\|R_v-P_v\|_1}_{\text{points, virtual views}}
#   + 0.1\,\underbrace{\big(P_g+P_l\big)}_{\text{depth}}
#   + 0.01\,\underbrace{\big(\|N-N^m\|_1 + 1-N\!\cdot\!N^m\big)}_{\text{normals}}
#   \;(+\,0.05\,\underbrace{(1-N\!\cdot\!N_D)}_{\text{depth and normals agree}})$$
#
# * A monocular depth is right only up to scale and shift, so it is compared by **correlation**: $P_g = 1 -
#   \mathrm{corr}(D, D^m)$ over the image, $P_l$ the same over boxes at random places, which sees local shape.
# * The **normal** of a Gaussian is its shortest axis; drawing the normals in place of colours gives $N$.
# * **Virtual views** lie between neighbouring photographs (slerp, position on a line). There the render has to look
#   like the cleaned points $P_v$.

# %%
drawn = Gaussians.from_points(clouds["init"])
with torch.no_grad():
    rendering = drawn.render(view.camera, mode="RGB+ED")
    normals = method.normal_image(drawn.splats(), view.camera)
    surface = method.normals_from_depth(view.camera, rendering.depth)
points = point_image(clouds["init"], camera)
pictures = [rendering.image, rendering.depth, (normals + 1) / 2, (surface + 1) / 2, points.image]
titles = ["render R", "depth D", "normals N of Gaussians", "normals of the depth", "points $P_v$, virtual view"]
fig = figures.gallery([pictures], titles, width=2.6)
record.figure("losses", fig, "What the losses compare, before the first step: one Gaussian a point, still round.")

# %% [markdown]
# ## 4. What nobody photographed: repair
#
# After stage 1 the renders of the virtual views are blurred and torn where photographs say little. The **Gaussian
# repair model** is a diffusion model that gets the torn render as its condition. A diffusion model learns to predict
# the noise $\epsilon$ in $x_t = \sqrt{a_t}\,x_0 + \sqrt{1-a_t}\,\epsilon$. To *repair* $x$ (SDEdit), add a little
# noise to it, up to $t = 0.2\,T$, and let the model take it away again in the last 10 of 50 steps: the layout stays,
# the detail is drawn anew. Three parts, at any scale:
#
# * a **denoiser** that knows what pictures look like (Stable Diffusion; here 1.7 million weights, in pixels, trained on
#   generated facades and objects, never on a courtyard);
# * a **control branch** that shows it the torn render: a copy of the encoder, its outputs through convolutions that
#   start at zero, so that at first nothing changes (ControlNet);
# * **low-rank changes** (LoRA) for this scene, learnt from pairs everybody has for free: an *early* render of a
#   training view, and its photograph.
#
# Three exact checks: a fresh control branch, a fresh low-rank change and SDEdit at strength 0 must alter nothing.

# %%
for name, change in evaluation.exact_checks().items():
    record.metric("change", change, variant=name)
    print(f"{name}: changes the output by {change:g}")

# %% [markdown]
# Each round draws all virtual views, repairs them, and then fits to photographs and repaired views $R_v$ together, with
# the loss $w_v\,\|\,\mathrm{render}_v - R_v\|_1$ and $w_v = \min(1,\; 16\,d_\mathrm{near}/d_\mathrm{max})$: next to a
# photograph, a repaired view has nothing to add.

# %%
weights = method.distance_weights(case.virtual, case.scene.train)
centers = torch.stack([c.center for c in case.virtual]).cpu()
inputs = torch.stack([v.camera.center for v in case.scene.train]).cpu()
fig, ax = plt.subplots(figsize=(4.6, 3.6))
spots = ax.scatter(centers[:, 0], centers[:, 1], c=weights.cpu(), cmap="viridis", vmin=0, vmax=1, label="virtual")
ax.scatter(inputs[:, 0], inputs[:, 1], marker="s", color=plots.COLORS[1], label="photograph")
fig.colorbar(spots, label="weight w")
ax.set(xlabel="x", ylabel="y", title="cameras from above", aspect="equal")
ax.legend()
record.figure("cameras", fig, "Photographs and virtual cameras from above, and how much a repaired view counts.")

# %% [markdown]
# ## 5. The experiment
#
# Arms of one seed share scene, priors and random numbers, so their differences are paired. Finished trainings are kept:
# after an interruption this notebook goes on where it stopped. First the diffusion model and all first stages.

# %%
arms = {v: params.arms if v == main else params.side_arms for v in params.views}
runs = [(arm, x, v, s) for x in scenes for v in params.views for arm in arms[v] for s in params.seeds]
first_runs = experiment.first_stages(runs)
bar = params.workers == 1

jobs = {} if params.priors == "pretrained" else {"prior": partial(experiment.prior, params)}
for arm, *where in first_runs:
    x, v, s = where
    jobs[f"{arm}-{x}-{v}-seed{s}"] = partial(experiment.stage1, params, made[x, v, s], arm, s, progress=bar)
done = record.cells(jobs, "first stages", workers=workers)
prior = done.pop("prior", None)
first = dict(zip(first_runs, done.values(), strict=True))

# %%
if prior is not None:
    fig, ax = plt.subplots(figsize=(6, 3.2))
    for name, losses in prior["losses"].items():
        steps, values = figures.smooth(losses)
        record.curve("prior_loss", steps, values, variant=name)
        ax.plot(steps, values, label=name)
    ax.set(xlabel="step", ylabel="squared error of the noise", title="the small diffusion model")
    ax.legend()
    record.figure("prior", fig, "Training losses of the small diffusion model and of its control branch.")
    for name, error in prior["error"].items():
        record.metric("prior_error", error, variant=name)
    print("squared error of bad pictures of a scene kept aside:", {k: f"{e:.4f}" for k, e in prior["error"].items()})

# %% [markdown]
# Then the second stages, with their controls.

# %%
second_runs = [run for run in runs if run[0] in experiment.STAGE2]
jobs = {}
for arm, x, v, s in second_runs:
    begun = first[experiment.after(arm), x, v, s]
    given = (params, made[x, v, s], arm, begun, prior, s)
    jobs[f"{arm}-{x}-{v}-seed{s}"] = partial(experiment.stage2, *given, progress=bar)
second = dict(zip(second_runs, record.cells(jobs, "second stages", workers=workers).values(), strict=True))
results = first | second

# %%
psnr = evaluation.report(record, results)
for (arm, v), values in psnr.items():
    print(f"{label[arm]:22s} {v:3d} views {statistics.fmean(values):6.2f} dB   {[f'{x:.2f}' for x in values]}")

# %% [markdown]
# By eye. Black is where there are no Gaussians at all.

# %%
columns = [arm for arm in ("sfm", "raw", "init", "depth", "normal", "regularised", "full") if (arm, main) in psnr]
black = case.scene.train[0].image.new_zeros(3)
rows, titles = [], []
for tested in case.scene.test[:2]:
    models = [Gaussians(**results[arm, scenes[0], main, seed]["model"]) for arm in columns]
    images = [experiment.picture(model, tested, black) for model in models]
    quality = [-10 * (image - tested.image).square().mean().log10() for image in images]
    rows.append([*images, tested.image])
    titles.append([*(f"{label[arm]}\n{q:.1f} dB" for arm, q in zip(columns, quality, strict=True)), "truth\n"])
fig = figures.gallery(rows, titles, width=2)
record.figure("renders", fig, f"Two test views after each part of the method, {main} training views, and the truth.")

# %%
if ("full", main) in psnr:
    last = second["full", scenes[0], main, seed]
    some = list(range(0, len(last["drawn"]), max(1, len(last["drawn"]) // 4)))[:4]
    rows = {"drawn": last["drawn"], "repaired": last["repaired"]}
    rows |= {"truth": case.truth} if case.truth is not None else {}
    fig = figures.gallery([[images[i] for i in some] for images in rows.values()], row_labels=list(rows), width=2.6)
    record.figure("repaired", fig, "Virtual views before and after repair in the last round, and the truth.")

# %%
for (arm, _, v, s), result in second.items():
    if v == main and "drawn" in result and case.truth is not None:
        found = evaluation.virtual_quality(made[scenes[0], v, s], result)
        for name, value in found.items():
            record.metric("virtual_psnr", value, variant=f"{arm}/{name}", seed=s)
        print(f"{label[arm]:22s} seed {s}: virtual views {found['drawn']:.2f} dB, repaired {found['repaired']:.2f} dB")

# %% [markdown]
# ### Part by part
#
# Bars are means over seeds with 95 % intervals. Left the paper's ladder: from points of structure from motion to the
# whole method. Right the controls: *perfect* priors say what better networks could bring; *shuffled* ones must lose
# what the priors brought, or the gain came from elsewhere; "no repair, as long" is the fair opponent of repair.

# %%
ladder = ["sfm", "raw", "no_background", "init", "depth", "normal", "regularised", "full"]
controls = ["regularised", "shuffled_priors", "perfect_priors", "covered", "longer", "full", "longer_covered"]
controls += ["full_covered", "no_lora", "shuffled_repair", "oracle"]
fig, axes = plt.subplots(1, 2, figsize=(11, 4))
for ax, names, title in zip(axes, (ladder, controls), (f"part by part, {main} views", "controls"), strict=True):
    figures.bars(ax, {label[arm]: psnr[arm, main] for arm in names if (arm, main) in psnr})
    ax.set(xlabel="PSNR of test views, dB", title=title)
record.figure("ablation", fig, "PSNR after each part and of the controls: means, 95 % intervals, a dot a seed.")

# %%
everywhere = [arm for arm in experiment.ARMS if all((arm, v) in psnr for v in params.views)]
if len(params.views) > 1 and everywhere:
    fig, ax = plt.subplots(figsize=(5, 3.4))
    plots.metric_against(ax, params.views, {label[arm]: {v: psnr[arm, v] for v in params.views} for arm in everywhere})
    ax.set(xlabel="photographs", ylabel="PSNR, dB", title="more photographs")
    record.figure("psnr-views", fig, "PSNR of test views against the number of training views.")

# %% [markdown]
# ## 6. What the released code does not do
#
# Three things are in the authors' code that their scripts never reach. Depth and normals have to agree only after step
# 30,000, and there are 30,000. Densification begins at the step at which it ends. The alignment guided by monocular
# depth is switched off. And the forward-facing schedule reaches two rounds of repair, not three. The first and the last
# are arithmetic; the others run here as arms of their own.

# %%
for name, values in evaluation.plans().items():
    for variant, value in values.items():
        record.metric(name, value, variant=variant)
        print(f"{name}[{variant}]: {value:g}")

# %% [markdown]
# ## 7. Real photographs
#
# Three photographs of a fern (LLFF), small. No network's weights are needed: points come from plane-sweep stereo, and
# the monocular maps are its smoothed depth. So this is a test of the *machinery* on real images, with weaker priors
# than the paper's; the diffusion model has seen nothing but generated facades and objects.

# %%
fern_psnr: dict[str, list[float]] = {}
if params.fern_arms:
    record.data(data.FERN, sha256=data.fern_sha256())
    fern = record.cell("fern", partial(data.fern_case, params))
    fern_runs = [(arm, data.FERN, params.fern_views, s) for arm in params.fern_arms for s in params.seeds]
    begun = experiment.first_stages(fern_runs)
    jobs = {f"fern-{run[0]}-seed{run[3]}": partial(experiment.stage1, params, fern, run[0], run[3]) for run in begun}
    fern_results = dict(zip(begun, record.cells(jobs, "fern, first stages", workers=workers).values(), strict=True))
    further, jobs = [run for run in fern_runs if run[0] in experiment.STAGE2], {}
    for arm, *where in further:
        start = fern_results[experiment.after(arm), *where]
        jobs[f"fern-{arm}-seed{where[2]}"] = partial(experiment.stage2, params, fern, arm, start, prior, where[2])
    fern_results |= dict(zip(further, record.cells(jobs, "fern, second stages", workers=workers).values(), strict=True))
    for run in fern_runs:
        for metric, value in fern_results[run]["scores"].items():
            record.metric(f"fern_{metric}", value, variant=run[0], seed=run[3])
        fern_psnr.setdefault(run[0], []).append(fern_results[run]["scores"]["psnr"])
    for arm, values in fern_psnr.items():
        print(f"{label[arm]:22s} {statistics.fmean(values):6.2f} dB   {[f'{x:.2f}' for x in values]}")
else:
    print("left out: no real data at this profile")

# %%
if params.fern_arms:
    tested = fern.scene.test[0]
    models = [Gaussians(**fern_results[arm, data.FERN, params.fern_views, seed]["model"]) for arm in fern_psnr]
    images = [*(experiment.picture(model, tested, black) for model in models), tested.image]
    titles = [*(f"{label[arm]}\n{statistics.fmean(x):.1f} dB" for arm, x in fern_psnr.items()), "photograph\n"]
    fig = figures.gallery([images], titles)
    record.figure("fern", fig, "A test view of the fern from three photographs, by arm, first seed; PSNR: means.")

# %% [markdown]
# ## 8. Verdicts
#
# *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: 96 x 72 pixels, a stereo
# "network" that is the truth with noise, a diffusion model of two million weights. Orders may carry over.

# %%
record.close()
