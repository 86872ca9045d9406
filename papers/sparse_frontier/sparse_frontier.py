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
# # The Sparse Frontier: how much attention can be left out?
#
# *The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs*, Nawrot and others, 2025,
# [arXiv 2504.17768](https://arxiv.org/abs/2504.17768).
#
# Attention over a long prompt is quadratic in its length, and most of it weighs next to nothing. Many methods leave
# that part out without any training. Each comes with its own benchmark; this paper puts six of them on one footing and
# asks what a practitioner wants to know: which method, how sparse, for which task, and is a large model with sparse
# attention better than a small one without? The notebook goes from the idea to the verdicts:
#
# 1. the cost model: what sparsity can save at all;
# 2. the six methods, on one page;
# 3. models and tasks: small ones of our own, which can be measured in minutes;
# 4. the grid: every method at every sparsity, on every task and length;
# 5. what came out: by task, by length, at equal cost;
# 6. the verdicts.
#
# The methods are in `common/attention` (other papers use them), what is compared and what it costs in `method.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
models = None
retrain = None
tasks = None
lengths = None
prompts = None
rows = None
methods = None
sparsities = None
coverages = None
blocks = None
limit = None
decode_batch = None
window = None
window_retrieval = None
first = None
last_lines = None
last_keys = None
least = None
block = None
page = None
pool = None
floor = None
device = None
workers = None

# %%
import dataclasses
import itertools
import re
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import params as parameters
from common import plots
from common.attention.causal import CausalSite, queries_and_keys
from common.data import text
from common.record import Record
from common.training import long_context
from papers.sparse_frontier import data, evaluation, experiment, figures, method
from papers.sparse_frontier.evaluation import PLACES
from papers.sparse_frontier.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "sparse_frontier", profile, given)
record = Record.open("sparse_frontier", profile, params)
plots.style()
SMALL, LARGE = params.models
params

# %% [markdown]
# ## 1. What sparsity can save
#
# A prefill of $L$ tokens spends $N\,\rho\,(4hL^2d_h+3hL^2)$ FLOPs on attention of density $\rho$, and on everything
# else an amount linear in $L$. So the share of attention grows with $L$, and Amdahl's law says what sparsity gains. The
# paper prints shares of 40, 68 and 80 % at 16k, 64k and 128k tokens and gains of 1.5, 2.2 and 2.8 from attention that
# is five times as sparse. What do its own formulas give for Qwen2.5-7B?

# %%
for name, variant, value in evaluation.published():
    record.metric(name, value, variant=variant)
    print(f"{name:32s} {variant:5s} {value:7.2f}")
lengths_shown = [2**n for n in range(12, 18)]
by_model = {
    name: [method.attention_share(shape, length) for length in lengths_shown] for name, shape in method.SHAPES.items()
}
printed = {evaluation.SHARES[name]: share for name, share in evaluation.PRINTED_SHARES.items()}
fig, ax = plt.subplots(figsize=(7, 4))
figures.shares(ax, lengths_shown, by_model, printed).set(title="attention in the FLOPs of a prefill")
record.figure("shares", fig, "Share of dense attention in the FLOPs of a prefill, by model; crosses: as printed.")

# %% [markdown]
# The printed gains follow from the printed shares. The shares themselves do not follow from the printed formulas:
# without the logits, of which a prefill needs one row only, they come near at 64k and 128k, and at 16k they do not.
# No model of the figure goes through all three crosses.
#
# ## 2. Six methods
#
# In the **prefill** all queries are known. *Vertical-Slash* reads whole lines of the attention matrix: keys that every
# query reads (vertical) and distances at which every query reads (slash), the same number in every head.
# *FlexPrefill* takes as many lines in each head as cover a share of the scores. Both judge lines by the attention of
# the prompt's last few queries. *Block-Sparse* compares mean-pooled blocks of queries and keys.
#
# In **decoding** the cache is read once a token. *SnapKV* keeps the prompt's keys that its last queries attend to and
# throws the others away; *Ada-SnapKV* lets the heads of a layer compete for the budget. *Quest* throws nothing away:
# for each new query it bounds the scores of every page of keys by their least and greatest channels, and reads the
# best.
#
# First, do they do what they say? On a random attention each must change nothing when it keeps everything.

# %%
for name, variant, value in evaluation.check_methods(params.of_methods("")):
    record.metric(name, value, variant=variant)
    print(f"{name:15s} {variant:15s} {value:.3g}")

# %% [markdown]
# ## 3. Models and tasks
#
# The authors' models have 7 to 72 billion parameters. Ours are two small transformers with rotary positions, a layer
# apart, that were trained for minutes on tasks over a made-up vocabulary, with lengths up to the longest one here:
# *retrieve* values by their keys (eight, or *one*), *track* variables through assignments, find the most *common* word
# of a group. Every prompt holds its questions at the end, and the answers follow one by one. **Skill** is accuracy with
# guessing taken off: 0 is chance, 1 is all right. A fourth task, to *filter* the chapters in which something does not
# happen, our models do not learn in that time; it is asked of models of transformers alone.

# %%
bar = {"progress": record.progress} if params.workers == 1 else {}
if params.dataset == "generated":
    made = {name: record.cell(f"train-{name}", partial(experiment.make, params, name, **bar)) for name in params.models}
    models_ = {name: experiment.Model(name, state, "made here") for name, state in made.items()}
else:
    models_ = {name: experiment.prepare(params, name, progress=record.progress) for name in params.models}
if params.dataset != "words":
    for name, sha256 in text.hashes(long_context.corpus(params.dataset)).items():
        record.data(name, sha256=sha256)
for name, model in models_.items():
    if params.dataset != "generated":
        short = Path(name).name if params.dataset == "words" else f"long-context-{name}"
        record.data(re.sub(r"\W+", "_", short).lower(), sha256=model.sha256)
shapes = {name: experiment.shape(params, model) for name, model in models_.items()}
for name, shape in shapes.items():
    shares = ", ".join(f"{method.attention_share(shape, length):.0%}" for length in params.lengths)
    print(f"{name}: {shape.weights / 1e6:.2f} million weights; attention is {shares} of a prefill")

# %% [markdown]
# What one head of the larger model reads of a prompt that retrieves, at a tenth of the attention (FlexPrefill: lines
# that hold 15 % of the scores):

# %%
lm, encode = experiment.network(params, models_[LARGE])
batch = data.prompts(params, "retrieve", params.lengths[1], params.seeds[0], encode)[0]
query, key = queries_and_keys(lm, batch.tokens[:1].to(params.device))[-1]
key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
length = query.shape[2]
seen = np.tri(length, dtype=bool)
shown = {}
for name in params.methods:
    chosen = method.selector(name, 0.15 if name == "flex_prefill" else 0.1, params.of_methods("retrieve"))
    start, stop = (0, batch.prompt) if chosen.phase == "prefill" else (batch.prompt, length)
    rows_ = chosen.plan(query, key, CausalSite(0, batch.prompt, query.shape[-1] ** -0.5))(start, stop)
    mask = seen.copy()
    mask[start:stop, : rows_.shape[-1]] &= rows_[0, 0].cpu().numpy()
    shown[name] = mask
fig, axes = plt.subplots(1, len(shown), figsize=(2.4 * len(shown), 2.7))
figures.masks(axes, shown)
record.figure(
    "masks",
    fig,
    "Keys (across) that each query (down) of one head reads: prefill methods thin out the prompt's rows, decoding "
    "methods the last ones.",
)

# %% [markdown]
# ## 4. The grid
#
# Every method at every sparsity on the same prompts. Sparsity is what was *realised*, counted key by key; FlexPrefill
# has none to set, so its coverage is swept. A seed is a draw of prompts, for one pair of models: intervals speak of
# other prompts, not of other models.

# %%
keys = list(itertools.product(params.models, params.tasks, zip(PLACES, params.lengths, strict=True), params.seeds))
jobs = {
    f"{name.replace('/', '_')}-{models_[name].sha256[:8]}-{task}-{length}-seed{seed}": partial(
        experiment.evaluate, params, models_[name], task, length, seed
    )
    for name, task, (_, length), seed in keys
}
results = record.cells(jobs, "grid", workers=params.workers or None).values()
grid = {(name, task, place, seed): found for (name, task, (place, _), seed), found in zip(keys, results, strict=True)}
jobs = {
    f"blocks-{models_[LARGE].sha256[:8]}-{task}-seed{seed}": partial(
        experiment.evaluate_blocks, params, models_[LARGE], task, params.lengths[-1], seed
    )
    for task in params.tasks
    for seed in params.seeds
}
results = record.cells(jobs, "blocks", workers=params.workers or None).values()
block_keys = [(LARGE, task, "long", seed) for task in params.tasks for seed in params.seeds]
blocks_ = dict(zip(block_keys, results, strict=True))

# %%
for name, task, place, seed in grid:
    cell = grid[name, task, place, seed]
    record.metric("skill", cell["dense"], variant=f"{name}/{task}/{place}/dense", seed=seed)
    for used, points in cell["points"].items():
        for strength, sparsity, skill in points:
            record.metric("skill", skill, variant=f"{name}/{task}/{place}/{used}/{strength:.3g}", seed=seed)
            record.metric("sparsity", sparsity, variant=f"{name}/{task}/{place}/{used}/{strength:.3g}", seed=seed)
for task in params.tasks:
    for seed in params.seeds:
        record.metric("dense_skill", grid[LARGE, task, "long", seed]["dense"], variant=task, seed=seed)
print("skill of the dense models, mean over seeds")
for name, task in itertools.product(params.models, params.tasks):
    found = [np.mean([grid[name, task, place, seed]["dense"] for seed in params.seeds]) for place in PLACES]
    print(f"{name:10s} {task:14s} " + "  ".join(f"{value:6.3f}" for value in found))
learned = evaluation.learned(params, grid)
print(f"learned, and looked at below: {', '.join(learned) or 'nothing (no claim about quality can be judged)'}")

# %% [markdown]
# ## 5. What came out
#
# ### By task
#
# The top row leaves out parts of the prefill, the bottom row parts of the cache in decoding. A band is the range over
# seeds.

# %%
fig, axes = plt.subplots(2, len(params.tasks), figsize=(2.9 * len(params.tasks), 5.4), sharey=True)
for row, used in zip(axes, (params.prefill, params.decode), strict=True):
    for ax, task in zip(row, params.tasks, strict=True):
        figures.skill_curves(ax, params, grid, used, task, "long")
    row[0].set_ylabel("skill")
    row[0].legend(fontsize="small", loc="lower left")
record.figure(
    "by-task", fig, "Skill against realised sparsity at the long length, by task: prefill (top) and decoding (bottom)."
)

# %%
known = dataclasses.replace(params, tasks=learned)
if learned:
    for name, variant, seed, value in evaluation.summary(known, grid, blocks_, shapes):
        record.metric(name, value, variant=variant, seed=seed)
    print("relative error at the long length, mean over seeds")
    for used, task in itertools.product(params.methods, learned):
        cells = [grid[LARGE, task, "long", seed] for seed in params.seeds]
        found = [
            np.mean([evaluation.error(cell, used, sparsity) for cell in cells]) for sparsity in evaluation.ERRORS_AT
        ]
        print(f"{figures.LABELS[used]:15s} {task:14s} " + "  ".join(f"{value:6.3f}" for value in found))

# %% [markdown]
# ### At equal cost
#
# Cost counts everything: attention at its realised density, all linear layers, and the search for what to keep. A
# prefill costs FLOPs; a decoding step costs bytes, and the sequences of a batch share the weights that are read. A
# model is worth its size where its points lie on the Pareto front.

# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4))
for ax, phase, unit in zip(axes, ("prefill", "decode"), ("FLOPs of a prefill", "bytes a decoding step"), strict=True):
    by_seed = [evaluation.front(params, grid, shapes, phase, "long", seed)[0] for seed in params.seeds]
    points = [(*rows[0][:2], *np.mean([row[2:] for row in rows], axis=0)) for rows in zip(*by_seed, strict=True)]
    best = method.pareto([(point[3], point[4]) for point in points])
    figures.iso_flop(ax, points, best, unit).set(title=phase)
    for model, used, sparsity, cost, skill in (points[place] for place in best):
        print(f"{phase:8s} front: {model} {figures.LABELS[used]:15s} sparsity {sparsity:.2f} {cost:.3g} {skill:.3f}")
record.figure("iso-cost", fig, "Mean skill against cost at the long length, all models and methods; means over seeds.")

# %% [markdown]
# ### By length
#
# The paper finds that longer prompts tolerate more: the error at a fixed budget of 1/20 falls, and the keys needed for
# an error of 5 % grow more slowly than the prompt.

# %%
if learned:
    rows_of = evaluation.summary(known, grid, blocks_, shapes)
    table = {(name, variant, seed): value for name, variant, seed, value in rows_of}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for ax, name, label in (
        (left, "error_at_twentieth", "all methods"),
        (right, "keys_needed", "Quest, 5 % error"),
    ):
        values = [[table[name, place, seed] for place in PLACES] for seed in params.seeds]
        figures.errors_by_length(ax, params.lengths, {label: values})
    left.set(title="relative error at 1/20 of the budget", ylabel="relative error")
    right.set(title="keys that a query needs", ylabel="keys")
    right.plot(params.lengths, params.lengths, color="grey", linestyle=":", label="all keys")
    right.legend(fontsize="small")
    record.figure("by-length", fig, "Error at a fixed budget, and keys needed at a fixed error, against length.")
else:
    print("left out: the dense model can do no task at this profile")

# %% [markdown]
# ## 6. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: at `smoke`
# nothing is learned, at `laptop` models of a hundred thousand parameters read a few hundred tokens.

# %%
record.close()
