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
# # Computational limits of LoRA: when gradients can be had without an L x L matrix
#
# *Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer Models*, Hu and others, ICLR 2025,
# [arXiv 2406.03136](https://arxiv.org/abs/2406.03136).
#
# LoRA trains few parameters, but the gradient to those few still goes through attention, whose weights are an
# $L \times L$ matrix. Must fine-tuning take time quadratic in $L$? The paper's answer depends on norms alone: if no
# entry of queries and keys (of $XW^\star$ and of $X\,\alpha BA/r$) exceeds the order of $\sqrt{\log L}$, almost linear
# algorithms exist; if they do, none is subquadratic, unless the strong exponential time hypothesis is wrong.
#
# The second half is a statement about all algorithms that no measurement can test. This short notebook runs the first
# half, watches the rank that is needed grow, and asks where the norms of a trained model lie. The method is in
# `method.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
length = None
head = None
rank = None
norms = None
degrees = None
lengths = None
accuracy = None
dataset = None
data_dir = None
model = None
retrain = None
adapted = None
adapter_steps = None
adapter_rate = None
context = None
passages = None
device = None
workers = None

# %%
import dataclasses
import re
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import params as parameters
from common import plots
from common.data import text
from common.record import Record
from common.training import long_context
from papers.lora_limits import data, evaluation, experiment, figures, method
from papers.lora_limits.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "lora_limits", profile, given)
record = Record.open("lora_limits", profile, params)
plots.style()
params

# %% [markdown]
# ## 1. Chained low-rank products
#
# If all entries of $Q$ and $K$ are at most $\Gamma$, scores $QK^\top/d$ lie in $[-\Gamma^2, \Gamma^2]$, and there a
# polynomial serves as $\exp$. A polynomial of a matrix of rank $d$ has a rank too: with a column for each monomial,
# $\exp(QK^\top/d) \approx U_Q U_K^\top$. Every term of the gradient is then a chain of thin products. Is the closed
# form the gradient, are the chains the polynomial, and is it linear?

# %%
for seed in params.seeds:
    for name, value in experiment.checks(params, seed).items():
        record.metric("check", value, variant=name, seed=seed)
        print(f"seed {seed}, {name}: relative difference {value:.1e}")
for name, value in experiment.growth(params).items():
    record.metric("growth", value, variant=name)
    print(f"twice the length, largest tensor of the {name} gradient: {value:.2f} times as large")

# %% [markdown]
# ## 2. The norm decides the degree
#
# Error of the adapters' gradients against the degree, for problems whose norm is known:

# %%
found = {seed: record.cell(f"errors-seed{seed}", partial(experiment.errors, params, seed)) for seed in params.seeds}
for seed, errors in found.items():
    for name, variant, value in evaluation.of_norms(params, errors):
        record.metric(name, value, variant=variant, seed=seed)
by_norm = {norm: [[errors[norm, g] for g in params.degrees] for errors in found.values()] for norm in params.norms}
fig, ax = plt.subplots(figsize=(6.5, 4))
figures.against_degree(ax, params.degrees, by_norm, params.accuracy)
record.figure("degrees", fig, "Error of LoRA gradients by chained products against the polynomial's degree, by norm.")

# %% [markdown]
# The number of columns is $\binom{d+g}{g}$. With $d = O(\log L)$ and $g$ growing more slowly than $\log L$ it is
# $L^{o(1)}$.
#
# ## 3. The rank that any method needs
#
# Singular values tell the least rank of *any* matrix near the attention. For entries of $\pm\Gamma$ and
# $2\log_2 L$ channels, below, at and above the threshold:

# %%
jobs = {f"ranks-seed{seed}": partial(experiment.ranks, params, seed) for seed in params.seeds}
needed = dict(zip(params.seeds, record.cells(jobs, "ranks", workers=params.workers or None).values(), strict=True))
for seed, counted in needed.items():
    for name, variant, value in evaluation.of_ranks(params, counted):
        record.metric(name, value, variant=variant, seed=seed)
fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for ax, tolerance in zip(axes, experiment.TOLERANCES, strict=True):
    by_regime = {
        regime: [[counted[regime, tolerance, n] for n in params.lengths] for counted in needed.values()]
        for regime in data.REGIMES
    }
    figures.against_length(ax, params.lengths, by_regime).set(title=f"within {tolerance}")
    for regime, rows in by_regime.items():
        slope = experiment.exponent(params.lengths, np.mean(rows, axis=0))
        print(f"within {tolerance:4s} {regime:8s}: rank grows as L to the power {slope:.2f}")
axes[1].legend(loc="lower right")
axes[1].set_ylabel("")
record.figure("ranks", fig, "The least rank of a matrix near the attention against the length, by regime of the norm.")

# %% [markdown]
# The order is as the theory says. How far $L^{o(1)}$ is away at lengths that anybody uses is seen on the right: for
# 1 % even norms below the threshold need a rank that grows nearly as fast as the length.
#
# ## 4. Where real norms lie
#
# A small language model with LoRA on queries, keys and values, fine-tuned for a moment. A model divides scores by
# $\sqrt d$ instead of $d$, so its entries count $d^{1/4}$ times.

# %%
if params.dataset == "generated":
    lm_model = experiment.Model(
        params.model, record.cell("train", partial(experiment.make, params, progress=record.progress)), "made here"
    )
else:
    lm_model = experiment.prepare(params, progress=record.progress)
    name = Path(params.model).name if params.dataset == "folder" else f"long-context-{params.model}"
    record.data(re.sub(r"\W+", "_", name).lower(), sha256=lm_model.sha256)
if params.dataset != "folder":
    for name, sha256 in text.hashes(long_context.corpus(params.dataset)).items():
        record.data(name, sha256=sha256)

# %%
jobs = {f"heads-{lm_model.sha256[:8]}-seed{s}": partial(experiment.heads, params, lm_model, s) for s in params.seeds}
heads = dict(zip(params.seeds, record.cells(jobs, "heads", workers=params.workers or None).values(), strict=True))
for seed, measured in heads.items():
    for name, variant, value in evaluation.of_heads(params, measured):
        record.metric(name, value, variant=variant, seed=seed)
bound = method.threshold(params.context)
fig, ax = plt.subplots(figsize=(6.5, 3.6))
figures.norms_of_heads(ax, list(heads.values()), bound)
record.figure("heads", fig, "Largest entries of queries and keys of every head of a trained model, and the threshold.")

# %%
first = heads[params.seeds[0]]
print(f"largest entry of X W*: {max(first['adapter']['frozen']):.2f}; of X (alpha B A / r): ", end="")
print(f"{max(first['adapter']['adapter']):.2f}")
print(f"{'head':>4s} {'norm':>6s} {'score':>6s} {'rank/L':>7s}  error of the gradient by degree")
for place, (norm, score, share) in enumerate(zip(first["norm"], first["score"], first["rank"], strict=True)):
    told = ", ".join(f"{degree}: {value:.2g}" for degree, value in first["error"][place].items())
    print(f"{place + 1:4d} {norm:6.2f} {score:6.2f} {share:7.2f}  {told}")

# %% [markdown]
# ## 5. Verdicts
#
# The algorithm is right and linear, and norms decide how well it does. A trained model lies above $\sqrt{\log L}$ with
# its largest entries, and the adapter adds little to that: the norms that LoRA would have to watch are those of
# the pretrained weights. The threshold is an order of magnitude in the limit, not a number to compare a model of 512
# tokens with; the rank and the error beside it say the same, though.

# %%
record.close()
