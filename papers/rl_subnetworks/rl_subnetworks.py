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
# # Does reinforcement learning change few weights, or does bfloat16?
#
# *Reinforcement Learning Finetunes Small Subnetworks in Large Language Models*, Mukherjee and others, NeurIPS 2025,
# [arXiv 2505.11711](https://arxiv.org/abs/2505.11711).
#
# Compare a language model before and after RL: 70 to 95 % of the weights are the same numbers; after supervised
# fine-tuning (SFT) it is about 10 %. The authors conclude that RL trains a small subnetwork, chosen by data that
# stay near the policy. *RL's Razor* ([arXiv 2509.04259](https://arxiv.org/abs/2509.04259)) answers that bfloat16 makes
# the sparsity: in float32, at the same performance, it is gone. Here both are asked on a model small enough to train in
# every precision:
#
# 1. what bfloat16 does with small steps;
# 2. a model that half knows how to sort, and how it is fine-tuned;
# 3. **the dispute**: how many weights change, by precision, tolerance and learning rate;
# 4. the shape of the update: matrices, rank, concentration;
# 5. the subnetwork: overlap between seeds, and training it alone;
# 6. causes: near-policy data, KL, clipping;
# 7. published models (at `paper`), and the verdicts.
#
# The method is in `method.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
dataset = None
seeds = None
digits = None
width = None
depth = None
heads = None
base_steps = None
base_rate = None
base_batch = None
retrain = None
arms = None
rate = None
other_rates = None
steps = None
target = None
check = None
prompts = None
answers = None
updates = None
clip = None
gradient_clip = None
kl = None
questions = None
tolerances = None
pairs = None
device = None
workers = None

# %%
import dataclasses
import re
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from common import params as parameters
from common import plots
from common.record import Record
from papers.rl_subnetworks import evaluation, experiment, figures, pretrained
from papers.rl_subnetworks.experiment import Arm
from papers.rl_subnetworks.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "rl_subnetworks", profile, given)
record = Record.open("rl_subnetworks", profile, params)
plots.style()
params

# %% [markdown]
# ## 1. What bfloat16 does with small steps
#
# Between 1 and 2 bfloat16 has 128 numbers, and as many between any power of two and the next. A step that does not
# reach half-way to the neighbour is rounded away. A weight of 1, moved by 0.001 a hundred times:

# %%
for seed in params.seeds:
    for name, variant, value in evaluation.checks(seed):
        record.metric(name, value, variant=variant, seed=seed)
        if name == "moved" and seed == params.seeds[0]:
            print(f"{variant:9s} the weight moved by {value:.4f}")

# %% [markdown]
# ## 2. A model that half knows how to sort
#
# `5 2 8 0 2 | 0 2 2 5 8`: a small transformer learns to sort from text in which half of the answers are careless (any
# digits), and one in twenty is written in a second alphabet. So it often fails, but succeeds often enough for RL to
# find a reward. RL is GRPO with a verifier that takes either alphabet. SFT has demonstrations in the usual alphabet;
# *on own answers* they are the base model's, the wrong ones left out (near its policy); *off policy* they are in the
# second alphabet. Every arm starts from the same weights in bfloat16, has the same optimizer and learning rate, and
# ends when it reaches the same accuracy, or at a last step.

# %%
make = partial(experiment.make, params, progress=record.progress)
if profile == "smoke":
    base_state = record.cell("base", make)
else:
    found = experiment.base(params, progress=record.progress)
    base_state = found.state
    record.data("rl_sorting", sha256=found.sha256)
start = experiment.start(base_state)
print(f"{sum(weight.numel() for weight in start.values()):,} weights")

# %%
jobs = {
    f"{arm.label(params)}-seed{seed}": partial(experiment.train, params, base_state, arm, seed)
    for seed in params.seeds
    for arm in experiment.arms(params)
}
done = record.cells(jobs, "fine-tuning", workers=params.workers or None)
labels = [arm.label(params) for arm in experiment.arms(params)]
runs = {seed: {label: done[f"{label}-seed{seed}"] for label in labels} for seed in params.seeds}

# %%
told = {
    (seed, name, variant): value
    for seed, of_seed in runs.items()
    for label, run in of_seed.items()
    for name, variant, value in evaluation.of_run(params, start, label, run)
}
for (seed, name, variant), value in told.items():
    record.metric(name, value, variant=variant, seed=seed)


def of_seeds(name, variant):
    """One value a seed."""
    return [told[seed, name, variant] for seed in params.seeds]


columns = {
    "steps": "6.0f",
    "accuracy": "9.3f",
    "surprise": "9.3f",
    "sparsity": "9.3f",
    "density": "8.3f",
    "rank": "6.3f",
}
print(f"{'':30s} " + " ".join(f"{name:>{width.split('.')[0]}s}" for name, width in columns.items()))
for label in labels:
    means = {name: np.mean(of_seeds(name, f"{label}/1e-05" if name == "sparsity" else label)) for name in columns}
    print(f"{figures.said(label):30s} " + " ".join(f"{means[name]:{width}}" for name, width in columns.items()))

# %%
main = [f"{name}/{precision}" for name in ("rl", "sft") for precision in experiment.PRECISIONS]
fig, ax = plt.subplots(figsize=(7, 4))
figures.accuracies(ax, {label: runs[params.seeds[0]][label] for label in main}, params.target)
record.figure("accuracy", fig, "Accuracy of one seed against optimizer steps, by method and precision of the weights.")

# %% [markdown]
# *Surprise* is what the training data cost the base model, in nats a token: RL's own answers, then what SFT is shown.
#
# ## 3. How many weights change
#
# The same trainings, looked at with every tolerance. A weight in bfloat16 either stays or moves by at least the
# distance of neighbours, so there a small tolerance says nothing. In float32 the answer is whatever the tolerance is.

# %%
fig, ax = plt.subplots(figsize=(7.5, 4.4))
tables = {label: np.transpose([of_seeds("sparsity", f"{label}/{t:g}") for t in params.tolerances]) for label in main}
figures.sweep(ax, params.tolerances, tables)
record.figure(
    "sparsity", fig, "Share of weights that stay against the tolerance, by method and precision; dotted: the paper's."
)
for label in main:
    shares = [
        of_seeds("sparsity", f"{label}/0"),
        of_seeds("sparsity", f"{label}/1e-05"),
        of_seeds("rounded_sparsity", label),
    ]
    exactly, within, in_bfloat16 = (np.mean(values) for values in shares)
    print(f"{figures.said(label):14s} exactly {exactly:.3f}, within 1e-5 {within:.3f}, in bfloat16 {in_bfloat16:.3f}")

# %% [markdown]
# If rounding makes the sparsity, the learning rate has to decide over it, even with a master copy:

# %%
rates = sorted([params.rate, *params.other_rates])
for rate in rates:
    label = Arm("rl", "master", rate).label(params)
    shares, reached = of_seeds("sparsity", f"{label}/1e-05"), np.mean(of_seeds("accuracy", label))
    print(f"rate {rate:7.0e}: unchanged {np.mean(shares):.3f}, accuracy {reached:.3f}")

# %% [markdown]
# ## 4. The shape of the update
#
# Matrix by matrix, and its rank. *Density*, $\|u\|_1^2 / (n \|u\|_2^2)$, is the share of weights that carry an update
# $u$ however small it is: $2/\pi = 0.64$ where moves are normal, 0.1 where a tenth of the weights carry it.

# %%
fig, ax = plt.subplots(figsize=(10, 4.2))
shown = [label for label in main if "float32" not in label]
by_label = {label: evaluation.of_matrices(start, runs[params.seeds[0]][label].state) for label in shown}
figures.by_matrix(ax, by_label)
record.figure("matrices", fig, "Share of weights unchanged in every weight matrix of one seed.")
for label in main:
    rank, density = (np.mean(of_seeds(name, label)) for name in ("rank", "density"))
    print(f"{figures.said(label):14s} rank {rank:.3f}, density {density:.3f}")

# %% [markdown]
# ## 5. The subnetwork
#
# Do two seeds change the same weights? More than chance is not yet a subnetwork that the task has chosen: small weights
# have closer neighbours in bfloat16 and change more easily, whatever moves them. So the overlap is also taken with the
# smallest weights of every tensor.

# %%
overlaps = {}
for place, seed in enumerate(params.seeds):
    other = params.seeds[(place + 1) % len(params.seeds)]
    overlaps[seed] = {v: value for _, v, value in evaluation.of_overlaps(start, runs[seed], runs[other])}
    for variant, value in overlaps[seed].items():
        record.metric("overlap", value, variant=variant, seed=seed)
words = {"seeds": "another seed", "chance": "chance", "sft": "SFT", "smallest": "smallest weights"}
groups = {
    precision: {said: [found[f"{precision}/{name}"] for found in overlaps.values()] for name, said in words.items()}
    for precision in ("bfloat16", "master")
}
fig, ax = plt.subplots(figsize=(7, 3.8))
figures.bars(ax, groups, "share of RL's changed weights").set(ylim=(0, 1.05))
record.figure("overlap", fig, "Of the weights that RL changed, the share that others change too.")

# %% [markdown]
# And trained alone, with the same prompts and as many steps? Beside it as many weights of each tensor chosen at random.

# %%
arm = Arm("rl", "bfloat16", params.rate)
jobs = {
    f"{name}-seed{seed}": partial(
        experiment.again, params, base_state, arm, seed, runs[seed]["rl/bfloat16"], random=name == "random"
    )
    for seed in params.seeds
    for name in ("sub", "random")
}
alone = record.cells(jobs, "subnetworks", workers=params.workers or None)
for seed in params.seeds:
    pair = {name: alone[f"{name}-seed{seed}"] for name in ("sub", "random")}
    for name, variant, value in evaluation.of_subnetworks(start, runs[seed]["rl/bfloat16"], pair):
        record.metric(name, value, variant=variant, seed=seed)
        if name != "moved_outside":
            print(f"seed {seed} {name:12s} {variant:10s} {value:.4f}")

# %% [markdown]
# ## 6. Causes
#
# Data near the policy and far from it, a KL term, no clipping. With a master copy, where small steps add up and are
# compared in bfloat16 at the end: without one every arm changes the same small weights. All have one learning rate and
# end at the same accuracy where they reach it.

# %%
causes = [label for label in labels if label.endswith("/master")]
groups = {
    experiment.ARMS[label.split("/")[0]]: {"unchanged": of_seeds("sparsity", f"{label}/1e-05")} for label in causes
}
fig, ax = plt.subplots(figsize=(9, 3.6))
figures.bars(ax, groups, "share of weights unchanged").set(ylim=(0, 1.02))
record.figure("causes", fig, "Share of weights unchanged with a master copy, by training data and method; dots: seeds.")

# %% [markdown]
# ## 7. Published models

# %%
for pair in params.pairs:
    before, after = pair.split(" > ")
    compared = partial(pretrained.compare, before, after, params.tolerances, device=params.device)
    published = record.cell(f"pair-{after}", compared)
    name = after.rpartition("/")[2]
    record.data(re.sub(r"\W+", "_", name).lower(), sha256=published.sha256)
    record.metric("pair_sparsity", published.sparsity[1e-5], variant=name)
    record.metric("pair_rank", published.rank, variant=name)
    print(f"{pair}: unchanged {published.sparsity[1e-5]:.3f}, rank {published.rank:.3f}")
if not params.pairs:
    print("none at this profile: the authors' checkpoints have seven billion weights")

# %% [markdown]
# ## 8. Verdicts
#
# A count of weights that changed is a count at a precision. What this notebook can say: what the count is in each
# precision at the same accuracy, and what of the paper's findings is left where rounding has no part in it. What it
# cannot: how far seventy thousand weights, which have to move further relative to their size to learn anything, stand
# for seven billion.

# %%
record.close()
