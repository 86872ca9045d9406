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
# # SpaRe: who is best from three photographs, and can anybody tell?
#
# *AIM 2024 Sparse Neural Rendering Challenge*: data set and benchmark
# ([arXiv 2409.15041](https://arxiv.org/abs/2409.15041)), methods and results
# ([arXiv 2409.15045](https://arxiv.org/abs/2409.15045)).
#
# From a hundred photographs, 3D Gaussian splatting makes a scene that one can walk through. From three it makes
# something that looks right from exactly three places. Many papers repair that, each with a table in which it wins by
# some tenths of a decibel. This notebook follows the challenge's protocol and asks the question that the tables leave
# open: *how much does the same method differ from itself?*
#
# 1. the problem, seen in one picture;
# 2. the protocol: tracks, split files, six metrics;
# 3. the entrants: five ideas, one paragraph and one equation each;
# 4. the runs: every entrant, every seed, the same photographs, points and depth;
# 5. the table, with spreads, beside the published rows;
# 6. which parts earn their place, and what a better depth prior would bring;
# 7. the verdicts.
#
# The protocol is in `method.py`, the entrants in `entrants.py`, `corgs.py`, `lmgaussian.py`, the scenes in `data.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
scenes = None
width = None
factor_fern = None
factor_chair = None
factor_brighton = None
points = None
point_noise = None
outliers = None
arms = None
ablations = None
main_sets = None
controls = None
prior = None
depth_model = None
prior_error = None
iterations = None
most = None
reset = None
sh_degree = None
device = None
workers = None
perceptual = None
lpips_weights = None
lpips_net = None
timing_iterations = None

# %%
import dataclasses
import statistics
from functools import partial

import matplotlib.pyplot as plt

from common import params as parameters
from common import plots
from common.record import Record
from common.splatting.evaluation import tight_box
from papers.spare_benchmark import data, evaluation, experiment, figures, method, published
from papers.spare_benchmark.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "spare_benchmark", profile, given)
record = Record.open("spare_benchmark", profile, params)
plots.style()
label_of = {name: arm.label for name, arm in experiment.ARMS.items()}
perceptual_name = params.perceptual
params

# %% [markdown]
# ## 1. The problem
#
# A scene is a cloud of Gaussians, each with a place, a shape, a colour and an opacity. Training moves them until the
# renders look like the photographs. With few photographs there are many clouds that do, and nearly all of them are
# wrong from anywhere else: a Gaussian right in front of one camera can paint whatever that camera wants to see.
#
# First the scenes. What every entrant is given is prepared once: the training photographs, a dense cloud of points to
# start from, and a monocular-like depth map of each photograph. All of it comes from the training views alone, except
# on the generated scenes, where the truth is known and made worse on purpose.

# %%
wanted = {
    (set_, views, name): partial(data.prepare, params, set_, views, name)
    for set_ in experiment.sets(params)
    for views in sorted({count for _, other, count in experiment.plan(params) if other == set_})
    for name in data.scene_names(params, set_)
}
keys = {f"prepare/{set_}/{views}/{name}": (set_, views, name) for set_, views, name in wanted}
slow = set(params.dataset) != {"generated"}  # stereo takes longer than a process to start
found = record.cells(
    {key: wanted[address] for key, address in keys.items()}, "scenes", workers=params.workers or None if slow else 1
)
prepared = {keys[key]: value for key, value in found.items()}
for set_ in params.dataset:
    if known := data.registered_hash(set_):
        record.data(known[0], sha256=known[1])
    elif set_ != "generated":
        record.data(set_, sha256=data.folder_hash(params, set_))
for (_, views, name), scene in prepared.items():
    size = scene.scene.train[0].camera
    print(f"{name:12s} {views} views {size.width} x {size.height}, {len(scene.scene.test)} tests, {scene.prior.name}")

# %%
first_set = "generated" if "generated" in params.dataset else params.dataset[0]
few = method.VIEW_COUNTS[first_set][0]
example = prepared[first_set, few, data.scene_names(params, first_set)[0]]
inputs, tests = example.scene.train[:3], example.scene.test[:2]
fig, axes = plt.subplots(2, 5, figsize=(11, 3.8))
for axis, view in zip(axes[0], (*inputs, *tests), strict=True):
    figures.picture(axis, view.image, ("input: " if view in inputs else "compared: ") + figures.short(view.name))
for axis, view in zip(axes[1], inputs, strict=False):
    figures.picture(axis, example.prior.view(view.name)[0], "its depth prior", cmap="magma")
axes[1, 3].axis("off"), axes[1, 4].axis("off")
record.figure("inputs", fig, "What an entrant is given, photographs and depth priors, and two views that are compared.")

# %% [markdown]
# ## 2. The protocol
#
# **Tracks.** Three input views in Track 1, nine in Track 2, in one light. A *split file* says which: JSON, one entry a
# scene, view indices from 0; index 13 is camera 14, whose image is `cam_014_3_0000.png`. Ours has the same schema, so
# whatever reads the challenge's files reads these. The generated set is a small cousin of SpaRe: objects on a white
# platform in a black box, seen by a rig of 49 cameras. A good part of each compared view must be out of sight of all
# inputs, or the task would be too easy.

# %%
generated = data.scene_names(params, "generated")
for set_ in params.dataset:
    record.metric("scenes", len(data.scene_names(params, set_)), variant=set_)
for name, value in evaluation.protocol_numbers(record.folder, generated).items():
    record.metric("protocol", value, variant=name)
    print(f"{name:15s} {value}")
for views in method.VIEW_COUNTS["generated"]:
    shares = [data.unseen_share(n, prepared["generated", views, n].scene) for n in generated]
    record.metric("unseen", statistics.fmean(shares), variant=f"generated/{views}")
    print(f"{views} inputs: {statistics.fmean(shares):.0%} of the compared surface pixels are seen by none of them")

# %% [markdown]
# **Six metrics.** PSNR, SSIM and a perceptual distance of the whole image; and of the object alone, because in a black
# box most of an image is easily right: PSNR-M over the object's pixels, SSIM-M and LPIPS-M over the tight box around
# it. The perceptual distance of the challenge is LPIPS (AlexNet). Its weights are a download; where they are not at
# hand this notebook shows **GMSD**, which is *another* metric and is called so: the spread of a map comparing edges.

# %%
view = tests[0]
fig, axes = plt.subplots(1, 3, figsize=(9, 2.6))
figures.picture(axes[0], view.image, "a compared view")
if view.mask is not None:
    figures.picture(axes[1], view.mask, "object: PSNR-M")
    figures.picture(axes[2], view.image[tight_box(view.mask)], f"tight box: SSIM-M, {perceptual_name.upper()}-M")
record.figure("metrics", fig, "What the six metrics look at: the whole image, the object's pixels, its tight box.")

# %% [markdown]
# ## 3. The entrants
#
# All share one trainer, one schedule, the same points and the same limit on the number of Gaussians. The loss of
# **3DGS** is $\mathcal L_c = 0.8\,\|I-\hat I\|_1 + 0.2\,(1-\mathrm{SSIM})$; each entrant adds one thing.
#
# **FSGS** asks that rendered depth $D$ *correlates* with a monocular depth $D_m$, whose scale nobody knows, in training
# views and in pseudo views between them. It also grows Gaussians into gaps: one half-way to each of $K=3$ neighbours
# wherever these are far.
#
# $$\mathcal L = \mathcal L_c + 0.05\,\big(1-\mathrm{corr}(D, D_m)\big) + 0.5\,\big(1-\mathrm{corr}(D', D_m')\big)$$
#
# **DNGaussian** lets depth move positions with all opacities held at 0.95 (hard), then opacities with all positions
# held (soft), and compares small patches $P$ after normalising each, so that small errors count beside large ones:
#
# $$\mathcal L_d = 0.1\,\Big\|\frac{D_P-\bar D_P}{\sigma(D_P)} - \frac{M_P-\bar M_P}{\sigma(M_P)}\Big\|^2
#   + 1.0\,\Big\|\frac{D_P-\bar D_P}{\sigma(D)} - \frac{M_P-\bar M_P}{\sigma(M)}\Big\|^2$$
#
# **CoR-GS** trains two fields at once. Where they disagree, no photograph decides, so both are wrong: Gaussians without
# a partner in the other field are pruned, and renders of pseudo views are pulled together,
# $\mathcal L = \mathcal L_c + \mathcal L_c(\hat I'_1, \hat I'_2)$.
#
# **DropGaussian** leaves out each Gaussian with probability $r_t = 0.2\,t/T$ and raises the others' opacity by
# $1/(1-r_t)$. Gaussians that hide behind others then get gradients now and then.
#
# **LM-Gaussian** (its first stage) also compares renders $R_v$ of virtual cameras with the initial points $P_v$ seen
# from there, adds depth by correlation over the image and over boxes, and grows nothing. Normals and the repair by a
# diffusion model are left out here, so the entrant is called *LM-Gaussian-like*; the whole is `papers/lm_gaussian`.
#
# $$\mathcal L = \mathcal L_c + 0.1\,\big(P_g + P_l\big) + 0.6\,\|R_v - P_v\|_1$$
#
# The depth prior is a stand-in unless the profile says `network`: on generated scenes the true depth through an unknown
# factor and shift plus slow errors, on photographs plane-sweep stereo of the training views, on the chair the visual
# hull. On photographs and on the chair it is thus made of the same points that all entrants start from: the depth
# methods (FSGS, DNGaussian, LM-Gaussian) learn nothing new from it there. Two control rows tell how much hangs on it:
# a perfect prior, and one whose parts are shuffled.

# %% [markdown]
# ## 4. The runs
#
# Runs of one seed start from the same points and see the views in the same order, so that differences are paired.
# Finished runs are kept: after an interruption this notebook goes on where it stopped.

# %%
todo = experiment.jobs(params, prepared)
print(f"{len(todo)} runs of {params.iterations} iterations")
results = record.cells(todo, "runs", workers=params.workers or None)

# %%
scores: dict[tuple[str, str, int], dict[str, list[float]]] = {}  # (arm, set, views): metric: a value a seed
for arm, set_, views in experiment.plan(params):
    names, variant = data.scene_names(params, set_), f"{arm}/{set_}/{views}"
    for seed in params.seeds:
        runs = [results[f"{arm}/{set_}/{views}/{name}/{seed}"] for name in names]
        for metric in runs[0]["scores"]:
            value = statistics.fmean(run["scores"][metric] for run in runs)
            record.metric(metric, value, variant=variant, seed=seed)
            scores.setdefault((arm, set_, views), {}).setdefault(metric, []).append(value)
        record.metric("seconds", sum(run["seconds"] for run in runs), variant=variant, seed=seed)
        record.metric("gaussians", statistics.fmean(run["gaussians"] for run in runs), variant=variant, seed=seed)
        record.curve("loss", *zip(*runs[0]["losses"], strict=True), variant=variant, seed=seed)

# %% [markdown]
# ## 5. The table
#
# Mean and standard deviation over seeds. Published rows are means of the eight LLFF scenes at 504 x 378 and 10,000
# iterations, ours are one scene and, below `paper`, far fewer iterations: compare the order of rows and the size of
# gaps, never the numbers themselves.


# %%
def cell(values):
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):5.2f}{spread}"


for set_ in params.dataset:
    for views in method.VIEW_COUNTS[set_]:
        print(f"\n{set_}, {views} views")
        rows = [arm for arm, other, count in scores if (other, count) == (set_, views)]
        for arm in rows:
            row = scores[arm, set_, views]
            text = f"  {label_of[arm]:34s} PSNR {cell(row['psnr'])}   SSIM {statistics.fmean(row['ssim']):.3f}"
            text += f"   {perceptual_name.upper()} {statistics.fmean(row[perceptual_name]):.3f}"
            if "psnr_m" in row:
                text += f"   PSNR-M {cell(row['psnr_m'])}   SSIM-M {statistics.fmean(row['ssim_m']):.3f}"
                text += f"   {perceptual_name.upper()}-M {statistics.fmean(row[perceptual_name + '_m']):.3f}"
            if set_ in ("fern", "llff") and arm in published.LLFF:
                text += f"   | published {published.LLFF[arm][(3, 6, 9).index(views)][0]:.2f}"
            print(text)
print("\nLM-Gaussian's own table of LLFF at 3 views, whole method, another protocol; not to be mixed with the above:")
print(", ".join(f"{label_of[arm]} {value:.2f}" for arm, value in published.LM_GAUSSIAN.items()))

# %%
panels = [(set_, views) for set_ in params.dataset for views in method.VIEW_COUNTS[set_]]
psnr = {panel: {label_of[arm]: scores[arm, *panel]["psnr"] for arm in params.arms} for panel in panels}
fig = figures.dots({f"{set_}, {views} views": rows for (set_, views), rows in psnr.items()}, "PSNR, dB")
record.figure("psnr", fig, "PSNR of every entrant: a dot a seed, a bar the mean.")

# %% [markdown]
# ### How far apart must two numbers be?
#
# Two runs of the *same* method differ. If $s$ is the standard deviation over seeds, 95 % of such pairs lie within
# $1.96\sqrt 2\,s$ of each other. A gap below that, between single runs, says nothing. The tables rank methods by gaps
# such as 0.31 dB (DropGaussian over CoR-GS) and 0.02 dB (CoR-GS over FSGS), both at LLFF with 3 views and from one run.

# %%
for set_, views in panels:
    if len(params.seeds) > 1:
        gap = evaluation.resolvable(psnr[set_, views])
        record.metric("resolvable", gap, variant=f"{set_}/{views}")
        print(f"{set_:10s} {views} views: two single runs say something from {gap:.2f} dB on")
for name, gap in published.GAPS.items():
    print(f"published at LLFF-3, {name}: {gap:.2f} dB")

# %% [markdown]
# ### By eye
#
# The compared view that the first entrant finds hardest, by every entrant with the first seed; below, the error against
# the photograph (mean over colours).

# %%
for set_, views in {panel[0]: panel for panel in reversed(panels)}.values():
    name = data.scene_names(params, set_)[0]
    photographs = [view.image for view in prepared[set_, views, name].scene.test]
    drawn = {arm: results[f"{arm}/{set_}/{views}/{name}/{params.seeds[0]}"]["renders"] / 255 for arm in params.arms}
    number = evaluation.hardest(drawn[params.arms[0]], photographs)
    made, photograph = {label_of[arm]: images[number] for arm, images in drawn.items()}, photographs[number]
    fig = figures.renders(made, photograph)
    record.figure(
        f"renders-{set_}", fig, f"A compared view of {set_} from {views} inputs by every entrant; errors below."
    )

# %% [markdown]
# ### Masked or not
#
# In a black box, getting the background right is worth many decibels. Does the ranking by the object's pixels agree
# with the ranking by all pixels? Pairs of entrants that change places, for each seed:

# %%
masked = [panel for panel in panels if "psnr_m" in scores[params.arms[0], *panel]]
for set_, views in masked:
    for index, seed in enumerate(params.seeds):
        whole, inside = (
            {arm: scores[arm, set_, views][metric][index] for arm in params.arms} for metric in ("psnr", "psnr_m")
        )
        swaps = evaluation.rank_swaps(whole, inside)
        record.metric("rank_swaps", swaps, variant=f"{set_}/{views}", seed=seed)
        print(f"{set_}, {views} views, seed {seed}: {swaps} pairs change places")

# %%
if masked:
    rows = {
        f"{set_}, {views} views": {
            label_of[arm]: (scores[arm, set_, views]["psnr"], scores[arm, set_, views]["psnr_m"]) for arm in params.arms
        }
        for set_, views in masked
    }
    fig = figures.against(rows, "PSNR, dB", "PSNR-M, dB")
    record.figure("masked", fig, "PSNR of the object against PSNR of the whole image, a mark a seed.")

# %% [markdown]
# ## 6. Which parts earn their place?
#
# Variants with a part taken out or changed, on one set; and FSGS with a perfect and with a shuffled depth prior. Each
# line is a paired difference, seed by seed.

# %%
pairs = [
    ("DropGaussian: progressive over fixed", "dropgaussian", "dropgaussian_fixed"),
    ("CoR-GS: co-pruning over neither", "corgs_prune", "corgs_neither"),
    ("CoR-GS: co-regularisation over neither", "corgs_agree", "corgs_neither"),
    ("CoR-GS: both over neither", "corgs", "corgs_neither"),
    ("3DGS: dense stereo over sparse points", "3dgs", "3dgs_sfm"),
    ("FSGS from sparse points: + unpooling", "fsgs_sfm_unpool", "3dgs_sfm"),
    ("FSGS from sparse points: + depth", "fsgs_sfm_depth", "fsgs_sfm_unpool"),
    ("FSGS from sparse points: + pseudo views", "fsgs_sfm", "fsgs_sfm_depth"),
    ("LM-Gaussian-like: + depth", "lm_gaussian_depth", "lm_gaussian_neither"),
    ("LM-Gaussian-like: + virtual views", "lm_gaussian", "lm_gaussian_depth"),
]
differences = {}
for set_ in params.main_sets:
    at = (set_, method.VIEW_COUNTS[set_][0])
    for title, one, other in pairs:
        if (one, *at) in scores and (other, *at) in scores:
            two = scores[one, *at]["psnr"], scores[other, *at]["psnr"]
            differences[f"{title}, {set_}"] = [a - b for a, b in zip(*two, strict=True)]
for set_ in params.dataset:
    at = (set_, method.VIEW_COUNTS[set_][0])
    metric = "psnr_m" if "psnr_m" in scores["3dgs", *at] else "psnr"
    for title, arm in (("perfect", "fsgs_exact"), ("shuffled", "fsgs_shuffled")):
        if (arm, *at) in scores:
            difference = [a - b for a, b in zip(scores[arm, *at][metric], scores["fsgs", *at][metric], strict=True)]
            differences[f"FSGS on {set_}: {title} over plain prior"] = difference
for title, values in differences.items():
    print(f"{title:48s} {cell(values)} dB")
if not differences:
    print("left out at this profile")

# %%
if differences:
    fig = figures.dots({"": differences}, "paired difference, dB (with masks: of PSNR-M)", zero=True)
    record.figure("parts", fig, "What each part changes: a dot a seed, a bar the mean. Right of zero it helps.")

# %% [markdown]
# And what does it cost? One plain 3DGS training at the protocol's resolution, 504 x 378, with densification, opacity
# resets and evaluation, on two cores with nothing beside it.

# %%
if params.timing_iterations:
    timing = record.cell("timing", partial(experiment.timing, params))
    found = {"minutes": timing["seconds"] / 60, "cpu_minutes": timing["cpu_seconds"] / 60}
    found |= {"gaussians": timing["gaussians"], "psnr_full_size": timing["scores"]["psnr"]}
    for name, value in found.items():
        record.metric(name, value, variant="3dgs/fern-504")
        print(f"{name} {value:.2f}")
else:
    print("left out at this profile")

# %% [markdown]
# ## 7. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* is a result. At `smoke` the trainings are a
# fiftieth of the authors' and the verdicts are about the protocol. At `laptop` scenes are few and small: an order of
# two methods there is evidence about the idea at that scale, not about anybody's table.

# %%
record.close()
