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
# # SR-STE: N:M sparse networks from scratch
#
# *Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch*, Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun and
# Li, ICLR 2021, [arXiv 2102.04010](https://arxiv.org/abs/2102.04010).
#
# Hardware can skip zeros cheaply if they come in a pattern: of every $M$ neighbouring weights at most $N$ are not zero.
# The usual way there is to train a dense network, prune it and train it again. This paper trains the sparse network
# once, from the first step, and asks for one new hyper-parameter. The notebook tells how, and measures it:
#
# 1. the idea: which weights are used is chosen anew in every step;
# 2. four equations, and that our layers follow them;
# 3. a teacher whose right choice is known: does the method find it?
# 4. what the released code groups;
# 5. the experiment: dense, STE and SR-STE on images, several patterns, several seeds;
# 6. how often the choice changes, and what $\lambda_W$ does to it;
# 7. what it costs;
# 8. the verdicts.
#
# The method is in `method.py` (one sitting), the arms in `experiment.py`, the data in `data.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
size = None
validation = None
augment = None
networks = None
other_arms = None
depth = None
width = None
sr_ste = None
ste = None
by_position = None
sweep = None
sweep_pattern = None
epochs = None
steps = None
warmup = None
batch = None
learning_rate = None
momentum = None
weight_decay = None
decay = None
device = None
workers = None
loaders = None
repeats = None

# %%
import dataclasses
from functools import partial

import matplotlib.pyplot as plt
import torch

from common import params as parameters
from common import plots
from common.record import Record
from papers.sr_ste import data, experiment, figures, method
from papers.sr_ste.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "sr_ste", profile, given)
record = Record.open("sr_ste", profile, params)
plots.style()
params

# %% [markdown]
# ## 1. The idea
#
# Take a row of weights in groups of $M = 4$ and keep the $N = 2$ largest of each. That is the network we shall use. But
# which two they are must not be settled at the start, when weights are random numbers. So all four are stored and
# trained, and in every step the two largest of the moment are used.

# %%
row = torch.tensor([[0.9, -0.1, 0.4, -0.6, 0.2, -0.3, 0.1, 0.7]])
chosen = method.choose(row, 2, 4)
print("W  ", *(f"{x:5.1f}" for x in row[0]))
print("E  ", *(f"{int(x):5d}" for x in chosen[0]))
print("W~ ", *(f"{x:5.1f}" for x in method.sparse(row, chosen)[0]))

# %% [markdown]
# How is a weight trained that is not used? Its true gradient is zero: changing it a little changes nothing. The
# **straight-through estimator** (STE) gives it the gradient that it would have if it were used *in addition*. With that
# every weight can come back, but the signal is wrong: two weights that could do the same job are told to do it both.
# The left-out one grows until it is the larger one, the choice flips, and now the other one is told to grow.
#
# **SR-STE** leaves all that as it is and adds a pull towards zero for the weights that are left out, and for them only.
#
# ## 2. Four equations
#
# $$\tilde W = E(W)\odot W \tag{1}$$
# $$W \leftarrow W-\gamma\, g,\qquad g=\partial L/\partial\tilde W \tag{2: STE}$$
# $$W \leftarrow W-\gamma\,\big(g+\lambda_W\,(1-E)\odot W\big) \tag{3: SR-STE}$$
# $$\mathrm{SAD}_{i\to j}=\|E_j-E_i\|_1 \tag{4}$$
#
# The last one is the paper's measure of unrest: how many places differ between two choices. `method.py` writes these
# out, and `common.sparsity` makes layers of them. Do the layers do what the equations say? Ten steps of both:

# %%
after = {name: experiment.ten_steps(name, pull) for name, pull in (("ste", 0.0), ("sr_ste", 0.3))}
distances = {
    "ste": after["ste"] - experiment.ten_steps_written_out(0.0),
    "sr_ste": after["sr_ste"] - experiment.ten_steps_written_out(0.3),
    "zero_decay": experiment.ten_steps("sr_ste", 0.0) - after["ste"],
}
for name, value in distances.items():
    record.metric("distance", value.abs().max(), variant=name)
    print(f"{name:10s} {value.abs().max():.1e}")
for name in ("ste", "sr_ste"):
    record.metric("hyper_parameters", len(dataclasses.fields(method.recipe(name))), variant=name)

# %% [markdown]
# ## 3. A teacher whose choice is known
#
# In a network nobody knows which weights *should* be kept. Here we do: targets come from a linear teacher with exactly
# one non-zero weight in every eight, at random places, and the eight inputs of a group look alike (correlation 0.5).
# The student starts from random numbers and looks for the teacher's places with equation (3) as it stands.

# %%
searches = {
    (name, seed): experiment.search_planted(value, seed)
    for name, value in experiment.PLANTED_DECAYS.items()
    for seed in params.seeds
}
for (name, seed), found in searches.items():
    record.metric("recovered", found.recovered, variant=name, seed=seed)
    record.metric("planted_error", found.error, variant=name, seed=seed)
    record.metric("planted_flips", found.flips, variant=name, seed=seed)
for name, value in experiment.PLANTED_DECAYS.items():
    rows = [searches[name, seed] for seed in params.seeds]
    mean = [sum(getattr(row, what) for row in rows) / len(rows) for what in ("recovered", "flips", "error")]
    print(
        f"lambda_W {value:4g} ({name}): {mean[0]:.1%} of the places, {mean[1]:5.2f} flips a weight, error {mean[2]:.3f}"
    )

# %%
shown = [searches[name, params.seeds[0]] for name in experiment.PLANTED_DECAYS]
pictures = [(found.kept.int() - found.teacher.int())[:24, :64].float() for found in shown]
labels = [f"$\\lambda_W$ = {value:g}" for value in experiment.PLANTED_DECAYS.values()]
fig = plots.image_grid(
    [[picture] for picture in pictures], row_labels=labels, cmap="RdBu_r", vmin=-1, vmax=1, cell_inches=6.0
)
record.figure(
    "planted",
    fig,
    "Part of the found mask against the teacher's: white agrees, red was kept wrongly, blue was missed. "
    "Without the pull some choices are wrong, with a moderate one almost none, and too much freezes the first guess.",
)

# %% [markdown]
# The two ways to fail are in the picture. Without the pull the choice never rests. With too much of it a left-out
# weight cannot grow at all, and the first random choice stays. Between them lies a range of $\lambda_W$ where the
# teacher is found.
#
# ## 4. What the released code groups
#
# A convolution has weights $[O, I, k_h, k_w]$, and "neighbours" may mean several things. The released code takes $M$
# neighbours in the order (filter, row, column, input channel), so that a group lies at one kernel position, *if* $M$
# divides the channels. It does so for the first layer too, which has three.

# %%
for name, shape in (("stem", (64, 3, 7, 7)), ("layer", (64, 64, 3, 3))):
    groups = method.released_groups(shape, 4)
    record.metric("straddling", groups.positions, variant=f"{name}/positions")
    record.metric("straddling", groups.filters, variant=f"{name}/filters")
    shares = f"{groups.positions:.0%} of the groups leave their position, {groups.filters:.1%} their filter"
    print(f"ResNet-50 {name} {list(shape)}: {shares}")

# %% [markdown]
# No library can run such a stem faster, so here it stays dense, as does the last layer. (The authors say in issue 2 of
# their repository that they pruned all convolutions and kept the last layer dense.)
#
# ## 5. The experiment
#
# Every arm is trained with every seed. Arms of one seed start from the same weights and see the same images in the same
# order, so differences are paired. Finished trainings are kept: after an interruption this notebook goes on where it
# stopped.

# %%
images = record.cell("images", lambda: data.load(params))
record.data(images.name, sha256=images.provenance())
arm_of = experiment.arms(params)
steps_each = experiment.steps_of(params, images)
print(
    f"{images.name}: {len(images)} training images; {len(arm_of)} arms, {len(params.seeds)} seeds, {steps_each} steps"
)
_, handle = experiment.build(params, arm_of["dense"], classes=images.classes, channels=images.channels)
sparse_weights = sum(layer.weight.numel() for layer in handle.layers.values())
print(f"{len(handle.layers)} sparse layers with {sparse_weights:,} weights; dense: {', '.join(handle.skipped)}")

# %%
bar = {"progress": record.progress} if params.workers == 1 else {}
jobs = {
    f"{name}-seed{seed}": partial(experiment.fit, params, arm, images, seed, **bar)
    for seed in params.seeds
    for name, arm in arm_of.items()
}
done = record.cells(jobs, "trainings", workers=params.workers or None)
results = {name: [done[f"{name}-seed{seed}"] for seed in params.seeds] for name in arm_of}

# %%
for name, rows in results.items():
    for seed, found in zip(params.seeds, rows, strict=True):
        for what in ("top1", "top1_validation", "sad", "flips", "violations", "seconds"):
            if what in found:
                record.metric("training_seconds" if what == "seconds" else what, found[what], variant=name, seed=seed)
        for what, points in found["curves"].items():
            record.curve(what, *zip(*points, strict=True), variant=name, seed=seed)
top1 = {name: [found["top1"] for found in rows] for name, rows in results.items()}
for name, row in top1.items():
    flips = sum(found["flips"] for found in results[name]) / len(row)
    spread = f"({min(row):.2f} to {max(row):.2f})"
    print(f"{name:22s} top-1 {sum(row) / len(row):6.2f} % {spread:18s} {flips:5.2f} flips a weight")

# %% [markdown]
# ### Accuracy against sparsity

# %%
fig, ax = plt.subplots(figsize=(7.5, 4.5))
kinds = {"sr_ste": "SR-STE", "ste": "STE", "by_position": "SR-STE along kernel positions"}
present = {kind: label for kind, label in kinds.items() if any(name.startswith(f"{kind}/") for name in top1)}
apart = experiment.partly_dense(params, classes=images.classes, channels=images.channels)
figures.accuracy(ax, top1, present, apart)
record.figure(
    "accuracy",
    fig,
    "Top-1 against the share of weights kept in sparse layers; bars are 95 % intervals of the mean over seeds. With a "
    "star: more layers stay dense, as m does not divide their channels.",
)

# %% [markdown]
# The bars show each arm's own spread. Claims compare *paired* differences, whose spread is smaller: what a seed does to
# one arm it does in part to the other.

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.2))
pairs = {f"SR-STE - STE at {p}": (f"sr_ste/{p}", f"ste/{p}") for p in params.ste if f"sr_ste/{p}" in top1}
known = {
    "SR-STE at 2:4 - dense": ("sr_ste/2:4", "dense"),
    "4:8 - 2:4": ("sr_ste/4:8", "sr_ste/2:4"),
    "2:8 - 1:4": ("sr_ste/2:8", "sr_ste/1:4"),
    "channels - positions at 2:4": ("sr_ste/2:4", "by_position/2:4"),
    "ResNet-20, SR-STE - STE at 2:4": ("resnet20/sr_ste/2:4", "resnet20/ste/2:4"),
    "ResNet-20, SR-STE at 2:4 - dense": ("resnet20/sr_ste/2:4", "resnet20/dense"),
}
pairs |= {label: pair for label, pair in known.items() if all(name in top1 for name in pair)}
for place, (first, second) in enumerate(pairs.values()):
    differences = [a - b for a, b in zip(top1[first], top1[second], strict=True)]
    ax.plot(differences, [place] * len(differences), "o", color=plots.COLORS[place % 7], alpha=0.7)
    ax.plot(sum(differences) / len(differences), place, "|", color="black", markersize=16)
ax.axvline(0, color="black", linewidth=1)
ax.set_yticks(range(len(pairs)), list(pairs))
ax.invert_yaxis()
ax.set(xlabel="difference in top-1, points")
record.figure("differences", fig, "Paired differences in top-1, a dot a seed, a line their mean.")

# %% [markdown]
# ## 6. Unrest
#
# The share of weights whose place in the choice differs from the first step (SAD), at the pattern of the sweep. The
# dense network is watched through the same pattern: it is not masked, only looked at.

# %%
curves = {"dense, watched": "dense"}
curves |= {"STE" if x == 0 else f"{x:g} x": experiment.swept(params, x) for x in sorted({0, 1, *params.sweep})}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
for ax, what, title in zip(axes, ("sad", "flip_rate"), ("SAD to the first choice", "flip rate"), strict=True):
    drawn = {}
    for label, name in curves.items():
        table = [[value for _, value in found["curves"][what]] for found in results[name]]
        drawn[label] = ([step for step, _ in results[name][0]["curves"][what]], table)
    plots.curves(ax, drawn)
    ax.set(xlabel="step", ylabel="share of the weights", title=f"{title} at {params.sweep_pattern}")
axes[1].set_yscale("symlog", linthresh=1e-4)
record.figure("unrest", fig, "How far the choice has moved, and how much of it changes in a step, by lambda_W.")

# %% [markdown]
# And what it does to the result. At `laptop` the decay of all other arms (1 x) is the published one, which was also the
# best of four on held-out training images with a seed that is not used here, if by little.
#
# How large may $\lambda_W$ be? The pull is part of the gradient, so it goes through momentum $\mu$. A left-out weight
# whose gradient is zero then follows $w_{t+1}=(1+\mu-\gamma\lambda_W)\,w_t-\mu\,w_{t-1}$. It creeps to zero up to
# $\gamma\lambda_W=(1-\sqrt\mu)^2$; beyond, it swings through zero, and more pull shrinks it no faster than by the
# factor $\sqrt\mu$ a step.

# %%
limit = (1 - params.momentum**0.5) ** 2 / params.learning_rate
print(f"lambda_W {params.decay:g}; left-out weights swing from {limit:.3g} on, at the peak learning rate")

# %%
if params.sweep:
    multiples = sorted({0.0, 1.0, *params.sweep})
    names = [experiment.swept(params, x) for x in multiples]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    figures.sweep(axes[0], multiples, [top1[name] for name in names], ylabel="top-1, %", index=0)
    moved = [[found["flips"] for found in results[name]] for name in names]
    figures.sweep(axes[1], multiples, moved, ylabel="flips a weight, all steps", index=1)
    record.figure("sweep", fig, f"Accuracy and unrest at {params.sweep_pattern} against lambda_W.")
else:
    print("left out at this profile: a sweep of so short a training says nothing")

# %% [markdown]
# ## 7. What it costs
#
# Seconds of one training step, the three taking turns in this process. The pull is one multiplication and one addition
# a weight; the choice itself has to be searched for STE as well.

# %%
seconds = experiment.seconds_per_step(params, images)
for name, rows in seconds.items():
    for repeat, value in enumerate(rows):
        record.metric("seconds", value, variant=name, seed=repeat)
    print(f"{name:8s} {sorted(rows)[len(rows) // 2] * 1000:.1f} ms")

# %% [markdown]
# ## 8. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: at `laptop`
# a network of 75 thousand weights, in three arms one of 270 thousand, has seen ten thousand small photographs four
# times.

# %%
record.close()
