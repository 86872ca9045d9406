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
# # SST: training a network a few singular vectors at a time
#
# *Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks*, Zhao, Zhang, Li, Liu and
# Cannistraci, ICML 2025, [arXiv 2405.15481](https://arxiv.org/abs/2405.15481).
#
# Training with Adam needs memory for the weights, for their gradients and for two moments of each. LoRA trains a
# product of two thin matrices instead, which is enough to fine-tune a model but not to train one from scratch: what it
# adds has a low rank. SST trains *all* of a matrix, but not all of it at once. The notebook goes from the idea to the
# verdicts:
#
# 1. the idea: a weight as its singular value decomposition;
# 2. four facts that can be checked exactly, one of them a surprise;
# 3. memory: what the method saves and what it costs, counted for the authors' models;
# 4. the experiment: a small language model from scratch, every arm with its own learning rate;
# 5. what came out: SST and its rivals, its parts, gradients, spectra, pruning;
# 6. the verdicts.
#
# The method is in `method.py`, LoRA and ReLoRA* in `baselines.py`, the arms in `experiment.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
length = None
test_tokens = None
model = None
width = None
depth = None
heads = None
context = None
rank = None
arms = None
rates = None
tuning_seed = None
cuts = None
steps = None
batch = None
warmup = None
interval = None
device = None
autocast = None
workers = None

# %%
import dataclasses
import math
from functools import partial

import matplotlib.pyplot as plt
import torch

from common import params as parameters
from common import plots
from common import seeds as random
from common.record import Record
from papers.sst import data, evaluation, experiment, figures, method
from papers.sst.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "sst", profile, given)
record = Record.open("sst", profile, params)
plots.style()
params

# %% [markdown]
# ## 1. The idea
#
# Every matrix is a sum of $k$ pairs of directions, each with a size:
#
# $$W=\sum_{i=1}^{k}\Sigma_i\,U_iV_i^{\mathsf T},\qquad U^{\mathsf T}U=V^{\mathsf T}V=1 .$$
#
# SST keeps $U$, $\Sigma$ and $V$ in place of $W$. In every step it trains all sizes $\Sigma$, which are few, and the
# vectors of $r$ pairs, after which those have length one again:
#
# $$\Sigma\leftarrow\max(\Sigma-\eta\,\nabla_\Sigma,\,0),\qquad
#   U_i\leftarrow\frac{U_i-\eta\,\tfrac{\partial L}{\partial W}V_i}{\|\cdot\|},\qquad
#   V_i\leftarrow\frac{V_i-\eta\,(\tfrac{\partial L}{\partial W})^{\mathsf T}U_i}{\|\cdot\|}\qquad(i\in S).$$
#
# The true gradient for $U_i$ has a factor $\Sigma_i$; SST leaves it out, so that small pairs learn as fast as large
# ones (the *enhanced* gradient). Every few steps $S$ is drawn anew, with
# $p_i=\tfrac12\big(\tfrac1k+\Sigma_i/\sum\Sigma\big)$: half of the chance goes to all, half to the large. And when each
# could have had its turn, the product is decomposed again.
#
# Which pairs have their turn, for a spectrum that falls as $1/i$:

# %%
count, shown = 48, 60
falling = 1 / torch.arange(1.0, count + 1)
fig, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True)
for ax, sampling in zip(axes, ("mixed", "proportional", "top", "sequential"), strict=True):
    draw = random.generator(0, "picture")
    drawn = [method.choose(falling, 4, sampling, i, draw).tolist() for i in range(shown)]
    figures.visits(ax, drawn, count).set(title={"mixed": "SST: half even, half by size", "top": "the largest",
        "proportional": "by size", "sequential": "in turn"}[sampling])  # fmt: skip
    record.metric("visited", len({i for row in drawn for i in row}) / count, variant=sampling)
record.figure("visits", fig, "Which pairs of singular vectors are trained in each iteration, by four ways to choose.")

# %% [markdown]
# ## 2. Four facts
#
# **Nothing jumps.** The decomposition at the start, a change of $S$ and a new decomposition leave the layer's output as
# it was. LoRA and ReLoRA* do not jump either, but pay for it: with $B=0$ the gradient of $A$ is zero.

# %%
for event, change in evaluation.distortion().items():
    record.metric("distortion", change, variant=event)
    print(f"{event:6s} changes a layer's output by at most {change:.1e}")
for kind in ("relora", "sst"):
    record.metric("dead_share", evaluation.dead_share(kind), variant=kind)
    print(f"{kind:7s} share of zero gradients after a restart {evaluation.dead_share(kind):.2f}")

# %% [markdown]
# **The vectors drift.** They keep their length but not their right angles, so $\Sigma$ stops being the singular values
# until the next decomposition.

# %%
for event, error in evaluation.orthogonality().items():
    record.metric("orthogonality_error", error, variant=event)
    print(f"{event:8s} largest error of U'U and V'V {error:.1e}")

# %% [markdown]
# **The enhanced gradient is the true one over $\Sigma_i$.**

# %%
record.metric("gradient_error", evaluation.gradient_error())
record.metric("sgd_ratio", evaluation.sgd_ratio())
print(f"largest difference {evaluation.gradient_error():.1e}")

# %% [markdown]
# **And Adam does not see the difference.** The authors prove that the enhanced gradient is better for gradient descent.
# But they train with Adam, which divides every entry by the size of its own gradients: a factor that stays the same for
# all of a vector's steps cancels. $\Sigma_i$ changes slowly, so what is left of the enhancement is what $\varepsilon$
# and the drift of $\Sigma_i$ leave.

# %%
record.metric("adam_difference", evaluation.adam_difference())
print(f"two sets of vectors after 50 steps of Adam, apart by {evaluation.adam_difference():.1e} of their way")

# %% [markdown]
# ## 3. Memory, counted
#
# The authors train 18.7 % of LLaMA-1.3B at a time. Counting entries gives the same number, and says what it is made of:
# embeddings and head, which are trained whole, are more than half of it.

# %%
share, linear = (evaluation.trained_share(evaluation.LLAMA_1B, linear_only=only) for only in (False, True))
record.metric("trained_share", 100 * share, variant="all")
record.metric("trained_share", 100 * linear, variant="linear")
rank, side = evaluation.LLAMA_1B.rank, 2048
for name, count in {
    "lora": method.trained(side, side, rank, "lora"),
    "sst": method.trained(side, side, rank, "sst"),
    "lora_next": method.trained(side, side, rank + 1, "lora"),
}.items():
    record.metric("entries", count, variant=name)
print(f"LLaMA-1.3B: SST trains {share:.1%} of all entries, {linear:.1%} of those of the linear layers")

# %% [markdown]
# What is saved are gradients and moments. The weights themselves grow: $U$ and $V$ together are twice as large as a
# square $W$.

# %%
ledgers = {how: evaluation.ledger(evaluation.OPT_1B, how) for how in ("full", "lora", "sst")}
for how, parts in ledgers.items():
    record.metric("gigabytes", sum(parts.values()), variant=how)
    record.metric("weight_gigabytes", parts["weights"], variant=how)
    print(f"{how:5s} " + ", ".join(f"{part} {size:.2f} GB" for part, size in parts.items()))
fig, ax = plt.subplots(figsize=(7.5, 2.4))
figures.ledgers(ax, ledgers).set(title="OPT-1.3B without activations")
record.figure("ledger", fig, "Gigabytes of weights, gradients and moments for OPT-1.3B, counted in float32.")

# %% [markdown]
# The headline, from the perplexities that the authors print: how much of the gap between the better low-rank method and
# full rank SST closes.

# %%
for name, printed in evaluation.PRINTED.items():
    if "lora" in printed:
        record.metric("printed_gap_closed", 100 * evaluation.gap_closed(printed), variant=name)
        print(f"{name:11s} {evaluation.gap_closed(printed):.1%}")

# %% [markdown]
# ## 4. The experiment
#
# A small GPT learns to continue a text, from scratch. All arms of a seed start from the same weights and see the same
# windows. Embeddings, head, norms and biases are trained whole in all of them; the linear layers in the blocks are what
# differs. Every arm tries the same learning rates on a seed that is not measured, and keeps the one with the best
# perplexity on the validation text.

# %%
texts = data.corpus(params)
name, sha256 = data.provenance(texts)
record.data(name, sha256=sha256)
bar = {"progress": record.progress} if params.workers == 1 else {}
workers = params.workers or None
tried = [(arm, rate) for arm in params.arms for rate in params.rates]
jobs = {
    f"tune-{arm}-{rate:g}": partial(experiment.train, params, arm, rate, params.tuning_seed, **bar)
    for arm, rate in tried
}
tuned = dict(zip(tried, record.cells(jobs, "learning rates", workers=workers).values(), strict=True))
best = {
    arm: experiment.best_rate({rate: tuned[arm, rate]["validation"] for rate in params.rates}) for arm in params.arms
}
for arm, rate in best.items():
    record.metric("rate", rate, variant=arm)
    row = "  ".join(f"{rate:g}: {tuned[arm, rate]['validation']:.3f}" for rate in params.rates)
    print(f"{experiment.label(arm):20s} {row}  -> {rate:g}")

# %%
runs = [(arm, seed) for arm in params.arms for seed in params.seeds]
jobs = {f"{arm}-seed{seed}": partial(experiment.train, params, arm, best[arm], seed, **bar) for arm, seed in runs}
trained = dict(zip(runs, record.cells(jobs, "trainings", workers=workers).values(), strict=True))
for (arm, seed), found in trained.items():
    where = {"variant": arm, "seed": seed}
    record.metric("perplexity", found["perplexity"], **where)
    record.curve("loss", range(len(found["losses"])), found["losses"], **where)
    for share, perplexity in found["cut"].items():
        rise = math.log(perplexity / found["perplexity"])
        record.metric("rise", rise, variant=f"{arm}/{share:g}", seed=seed)
for arm in params.arms:
    found = trained[arm, params.seeds[0]]
    record.metric("trained", found["trained"], variant=arm)
    record.metric("moments", found["moments"], variant=arm)

# %% [markdown]
# ## 5. What came out

# %%
values = {arm: [trained[arm, seed]["perplexity"] for seed in params.seeds] for arm in params.arms}
for arm, row in values.items():
    print(f"{experiment.label(arm):20s} perplexity " + "  ".join(f"{value:.3f}" for value in row))
for seed in params.seeds:
    row = {arm: trained[arm, seed]["perplexity"] for arm in ("full", "lora", "relora", "sst")}
    if min(row["lora"], row["relora"]) > row["full"]:  # else there is no gap to close
        print(f"seed {seed}: SST closes {evaluation.gap_closed(row):.1%} of the gap")

# %%
MAIN = ["full", "lora", "relora", "sst"]
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1.2, 1])
figures.smoothed(left, {arm: [trained[arm, seed]["losses"] for seed in params.seeds] for arm in MAIN})
left.set(ylabel="training loss, nats a token", title="from scratch at equal rank")
figures.dots(right, values).set(xlabel="perplexity on the test text", title="all arms, a dot a seed")
record.figure("arms", fig, "Training loss of four methods, and test perplexity of every arm with a dot for each seed.")

# %% [markdown]
# Does SST move as full-rank training does? The authors compare the norm of the gradient along the training. ReLoRA*'s
# falls at every merge, when half of its factors are dead; SST's should follow the full one.

# %%
for arm in ("lora", "relora", "sst"):
    for seed in params.seeds:
        alike = evaluation.correlation(trained["full", seed]["gradients"], trained[arm, seed]["gradients"])
        record.metric("gradient_correlation", alike, variant=arm, seed=seed)
fig, ax = plt.subplots(figsize=(8, 3.4))
for arm in MAIN:
    ax.plot(trained[arm, params.seeds[0]]["gradients"], color=figures.color(arm), linewidth=0.8,
            label=experiment.label(arm))  # fmt: skip
ax.set(yscale="log", xlabel="step", ylabel="norm of the gradient", title="gradients of the linear layers, one seed")
ax.legend()
record.figure("gradients", fig, "Norm of the gradient of what is trained in the linear layers, along one training.")

# %% [markdown]
# And what becomes of the weights? Left, the singular values of the first feed-forward matrix. Right, what it costs to
# cut the small ones off all matrices of the trained network.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
figures.spectra(left, {arm: [trained[arm, s]["sigma"] for s in params.seeds] for arm in MAIN})
left.set(title="singular values after training")
rises = {
    arm: {
        share: [math.log(trained[arm, s]["cut"][share] / trained[arm, s]["perplexity"]) for s in params.seeds]
        for share in params.cuts
    }
    for arm in MAIN
}
figures.cuts(right, rises).set(title="pruning singular values")
record.figure("spectra", fig, "Singular values of one trained matrix, and the loss when the small ones are cut off.")

# %% [markdown]
# ## 6. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* and *inconclusive* are results. The scale:
# at `smoke` nothing is learned; at `laptop` a network of a hundred thousand parameters has seen half of a short text,
# which is far from a billion parameters and thirteen billion tokens.

# %%
record.close()
