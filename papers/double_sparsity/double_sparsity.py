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
# # Double Sparsity: a few channels tell which tokens matter
#
# *Post-Training Sparse Attention with Double Sparsity*, Yang and others, 2024,
# [arXiv 2408.07092](https://arxiv.org/abs/2408.07092).
#
# A language model that writes reads its whole cache of keys and values for every token: decoding is bound by memory.
# Few tokens matter at a time, but to know which ones, one has to compare the query with all keys. Double Sparsity
# compares in a sixteenth of the channels. Which channels those are hardly depends on the text, so they are found once,
# offline, and the cache keeps a contiguous copy of them, the *labels*. The notebook goes from the idea to the verdicts:
#
# 1. the idea on attention where the important channels are known;
# 2. what it reads, byte by byte, and what that allows at most;
# 3. a model of our own, its channels, and whether they are the same for every text;
# 4. quality: perplexity and long-context tasks against what is read;
# 5. time: one decoding step, dense and sparse;
# 6. the verdicts.
#
# The method is in `method.py`; what it is compared with is in `common/attention/decode.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
model = None
retrain = None
arms = None
ratios = None
tasks = None
context = None
passages = None
prompts = None
rows = None
calibration = None
dense_layers = None
page = None
first = None
contexts = None
batches = None
heads = None
head = None
repeats = None
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
from papers.double_sparsity import data, evaluation, experiment, figures, method
from papers.double_sparsity.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "double_sparsity", profile, given)
record = Record.open("double_sparsity", profile, params)
plots.style()
params

# %% [markdown]
# ## 1. Channels that matter
#
# Attention adds up $q_c k_c$ over the channels $c$. A channel with large entries in *both* decides which tokens win;
# one that is large in the queries alone, or in the keys alone, does not. So the statistic is the mean of $|q_c k_c|$
# over the tokens of any text. Generated queries and keys show why: in each head four channels are large in both, four
# in the queries alone and four in the keys alone.

# %%
query, key, outliers = data.planted(params.seeds[0], outliers=evaluation.PLANTED)
scores = {name: method.calibrate([[(query, key)]], name)[0][0] for name in ("qk", "q", "k")}
fig, axes = plt.subplots(1, 3, figsize=(12, 2.6))
figures.planted_scores(axes, scores, outliers[0].numpy())
record.figure(
    "planted", fig, "Importance of the channels of one head by three statistics; coloured: those that matter."
)
for statistic in ("qk", "q", "k"):
    record.metric("found_channels", evaluation.found_channels(statistic), variant=statistic)
    record.metric("planted_recall", evaluation.recall(statistic), variant=statistic)
    print(
        f"by |{statistic:2s}|: labels of 1/16 of the channels find {evaluation.recall(statistic):.0%} of the best keys"
    )

# %% [markdown]
# **As released.** The released calibration tests a wrong key of a dictionary, so every batch overwrites what those
# before it said, and only the last one counts. Here that is a switch, `released`. And the decoding step itself: with
# all channels and tokens it is dense attention, and with few it is what the mask says with which quality is measured
# below.

# %%
for name, value in evaluation.released_is_last(params.seeds[0]).items():
    record.metric("differs_from_last", value, variant=name)
    print(f"calibration as {name}: differs from that over its last text alone by {value:.3g}")
for name, value in evaluation.same_as_dense(params.seeds[0]).items():
    record.metric("step_error", value, variant=name)
    print(f"largest difference of a decoding step ({name}): {value:.1e}")

# %% [markdown]
# ## 2. What it reads
#
# For a head with $D$ channels and a cache of $L$ tokens a dense step reads $2LD$ numbers. Double Sparsity reads the
# labels, $LD/16$, and $2D$ numbers for each of $L/16$ tokens: $3/32$ of that. Decoding is bound by what is read, so
# no kernel can be faster than these ratios. The paper's first version prints 14.1, its second up to 16.

# %%
for length in (2**14, 2**18):
    for name, ratio in evaluation.bytes_read(length):
        print(f"{length:7d} tokens, {name:28s} {ratio:6.2f} times fewer bytes")
for name, ratio in evaluation.bytes_read(2**18):
    record.metric("fewer_bytes", ratio, variant=name)

# %% [markdown]
# With labels of 16 bits, 1/16 and 1/16 make at most 10.7. The printed numbers need labels of 4 bits, and 16 needs
# more: something else than reading less must have gone faster too.
#
# ## 3. A model and its channels
#
# The authors' models have 7 billion parameters and more. Ours is a small causal transformer with rotary positions that
# was trained for minutes on tiny Shakespeare by characters and on generated long-context tasks.

# %%
if params.dataset == "generated":
    bar = {"progress": record.progress}
    lm_model = experiment.Model(
        params.model, record.cell("train", partial(experiment.make, params, **bar)), "made here"
    )
else:
    lm_model = experiment.prepare(params, progress=record.progress)
    name = Path(params.model).name if params.dataset == "folder" else f"long-context-{params.model}"
    record.data(re.sub(r"\W+", "_", name).lower(), sha256=lm_model.sha256)
if params.dataset != "folder":
    for name, sha256 in text.hashes(long_context.corpus(params.dataset)).items():
        record.data(name, sha256=sha256)

# %% [markdown]
# Are the important channels the same for every text? Rankings from Shakespeare, from other Shakespeare, and from the
# tasks, whose tokens share nothing with it:

# %%
jobs = {
    f"rankings-{lm_model.sha256[:8]}-seed{s}": partial(experiment.rankings, params, lm_model, s) for s in params.seeds
}
rankings = dict(zip(params.seeds, record.cells(jobs, "rankings", workers=params.workers or None).values(), strict=True))
for ratio in params.ratios:
    for seed, found in rankings.items():
        for name, value in evaluation.static(found, ratio).items():
            record.metric("overlap", value, variant=f"{name}/{ratio}", seed=seed)
    shown = {
        name: np.mean([evaluation.static(found, ratio)[name] for found in rankings.values()])
        for name in evaluation.static(rankings[params.seeds[0]], ratio)
    }
    print(f"1/{ratio:<3d} " + ", ".join(f"{name} {value:.2f}" for name, value in shown.items()))
kinds = [kind for kind in rankings[params.seeds[0]] if kind != "again"]
fig, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 3.6), squeeze=False)
for ax, kind in zip(axes[0], kinds, strict=True):
    figures.importances(ax, rankings[params.seeds[0]][kind], f"calibrated on {kind}")
record.figure("channels", fig, "Importance of every channel (across) of every head (down), over the head's largest.")

# %% [markdown]
# ## 4. Quality
#
# Each arm reads 1/4 to 1/32 of the tokens, chosen by 1/4 to 1/32 of the channels. *All channels* is the exact choice of
# tokens: what is lost there, token sparsity loses. A sixteenth of our 32 channels is two; *as many channels as of 128*
# takes eight, as the authors' models do. *Quest* bounds pages of keys, *H2O* keeps what was attended to most
# before, *StreamingLLM* the first and the last tokens. Perplexity is that of the second half of passages, decoded after
# the first; skill is accuracy at questions about long prompts with guessing taken off (1: all right). A seed is a draw
# of calibration texts, passages and prompts for one model.

# %%
jobs = {
    f"quality-{lm_model.sha256[:8]}-seed{s}": partial(experiment.evaluate, params, lm_model, s) for s in params.seeds
}
quality = dict(zip(params.seeds, record.cells(jobs, "quality", workers=params.workers or None).values(), strict=True))
for name, variant, seed, value in evaluation.quality(params, quality):
    record.metric(name, value, variant=variant, seed=seed)


# %%
def of_seeds(arm, ratio, task=None):
    """One value a seed: perplexity, or skill at a task (`mean`: over tasks)."""
    if task is None:
        return [quality[seed]["perplexity"][arm, ratio] for seed in params.seeds]
    skills = [quality[seed]["skill"][arm, ratio] for seed in params.seeds]
    return [np.mean(list(skill.values())) if task == "mean" else skill[task] for skill in skills]


columns = [None, *params.tasks, *(["mean"] if params.tasks else [])]
print(f"{'':20s} {'ratio':>6s} " + " ".join(f"{column or 'perplexity':>10s}" for column in columns))
for arm, ratio in quality[params.seeds[0]]["perplexity"]:
    values = [np.mean(of_seeds(arm, ratio, column)) for column in columns]
    label = experiment.ARMS.get(arm, "dense")
    print(f"{label:20s} {'1/' + str(ratio):>6s} " + " ".join(f"{value:10.3f}" for value in values))

# %%
choosers = [arm for arm in ("ds", "ds_128", "ds_q", "ds_k", "ds_random", "exact") if arm in params.arms]
others = [arm for arm in ("ds", "exact", "quest", "h2o", "streaming") if arm in params.arms]
shown = {"channels": choosers, "methods": others}
fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
for ax, (title, arms_) in zip(axes, shown.items(), strict=True):
    values = {arm: {ratio: of_seeds(arm, ratio) for ratio in params.ratios} for arm in arms_}
    figures.against_ratio(ax, params.ratios, values, np.mean(of_seeds("dense", 1))).set(title=title, yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
axes[0].set_ylabel("perplexity")
record.figure("perplexity", fig, "Perplexity against what is read: ways to rank channels, and other methods.")

# %%
if params.tasks:
    fig, axes = plt.subplots(1, len(params.tasks), figsize=(3.6 * len(params.tasks), 3.8), sharey=True)
    for ax, task in zip(axes, params.tasks, strict=True):
        values = {arm: {ratio: of_seeds(arm, ratio, task) for ratio in params.ratios} for arm in others}
        figures.against_ratio(ax, params.ratios, values, np.mean(of_seeds("dense", 1, task))).set(title=task)
        ax.get_legend().remove()
    axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    axes[0].set_ylabel("skill")
    record.figure("tasks", fig, "Skill at long-context tasks against what is read, by method.")

# %% [markdown]
# ## 5. Time
#
# One decoding step of attention over a long cache, dense and sparse in turn in one process; labels lie ready, as they
# do in decoding. Ours is plain torch: products of labels, the largest, a copy of the chosen rows, attention over them.

# %%
times = {}
for batch in params.batches:
    for length in params.contexts:
        found = record.cell(f"time-{batch}-{length}", partial(experiment.timings, params, length, batch))
        times[batch, length] = [row["dense"] / row["sparse"] for row in found]
        for repeat, ratio in enumerate(times[batch, length]):
            place = params.contexts.index(length) + 1
            size = "small" if batch == params.batches[0] else "large"
            record.metric("speedup", ratio, variant=f"{size} batch/context {place}", seed=repeat)
        dense, sparse = (np.median([row[name] for row in found]) for name in ("dense", "sparse"))
        print(f"batch {batch}, {length:6d} tokens: dense {1e3 * dense:7.2f} ms, sparse {1e3 * sparse:7.2f} ms")
by_batch = {batch: [times[batch, length] for length in params.contexts] for batch in params.batches}
fig, ax = plt.subplots(figsize=(6.5, 4))
figures.speedups(ax, params.contexts, by_batch, dict(evaluation.bytes_read(params.contexts[-1]))["16-bit labels"])
record.figure(
    "time", fig, "How many times as fast a decoding step is at 1/16 and 1/16; dotted: what fewer bytes allow."
)

# %% [markdown]
# ## 6. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: at `smoke`
# nothing is learned, at `laptop` a model of a hundred and fifty thousand parameters reads 512 tokens.

# %%
record.close()
