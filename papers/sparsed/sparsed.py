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
# # SparseD: sparse attention for language models that denoise
#
# *SparseD: Sparse Attention for Diffusion Language Models*, Wang, Fang, Ma, Yang and Wang, ICLR 2026, [arXiv
# 2509.24014](https://arxiv.org/abs/2509.24014).
#
# A diffusion language model starts from a row of MASK and fills it in over many steps. Every step is a whole pass over
# prompt and answer, with attention from every token to every other: no cache of keys, no causal mask. Most of that
# attention weight lies in few places, but *which* places differs from head to head. SparseD looks once, early on, and
# then reuses what it found. The notebook goes from the idea to the verdicts:
#
# 1. two small diffusion models, one that answers questions about long prompts and one that has read Shakespeare;
# 2. where they look, and how little that changes from step to step;
# 3. the idea: skip, isolated selection, reuse;
# 4. what the released code does otherwise, switch by switch;
# 5. answers: every arm on the tasks, and how few blocks are enough;
# 6. text: the loss step by step, and which steps are fragile;
# 7. time: what finding the pattern costs, and what it brings;
# 8. the verdicts.
#
# The method is in `method.py` (one sitting), patterns known beforehand in `baselines.py`, masked diffusion in
# `diffusion.py`, the arms in `experiment.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
tasks = None
prompts = None
queries = None
hops = None
gap = None
windows = None
length = None
generated = None
steps = None
block_length = None
block_size = None
keep_ratio = None
skip = None
ratios = None
sink = None
arms = None
model = None
width = None
depth = None
heads = None
ratio = None
rate = None
clip = None
stages = None
text_steps = None
text_batch = None
text_length = None
retrain = None
timing_lengths = None
timing_block = None
repeats = None
device = None
workers = None

# %%
import dataclasses
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from common import params as parameters
from common import plots
from common.record import Record
from common.training.checkpoints import checkpoint, rounded
from papers.sparsed import evaluation, experiment, figures, models, timing
from papers.sparsed.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "sparsed", profile, given)
record = Record.open("sparsed", profile, params)
plots.style()
RATIO = params.keep_ratio
params

# %% [markdown]
# ## 1. Two models that denoise
#
# Forwards, each token turns into MASK with probability $t$; backwards, a transformer that sees both sides says what was
# there. Its loss bounds the likelihood (LLaDA, Nie et al. 2025):
#
# $$\mathcal L=-\,\mathbb E_{t\sim U(0,1)}\Big[\frac1t\sum_{i\,\text{masked}}\log p_\theta(x_i\mid x_t)\Big].$$
#
# Both models are small transformers with rotary positions. One learns **tasks**: a prompt of key-value pairs or of
# words of several groups, and behind it questions, each with one MASK for its answer. The other learns **text**. Their
# weights come from `checkpoints/` where the files are; `smoke` trains toys for seconds and judges no quality by them.

# %%
states, losses = {}, {}
for kind in [] if params.model else models.KINDS:
    if profile == "smoke":
        state, losses[kind] = record.cell(f"trained-{kind}", partial(models.train, params, kind))
        states[kind] = rounded(state)
    else:
        found = checkpoint(
            f"sparsed-{kind}",
            models.settings_of(params, kind),
            lambda keep, kind=kind: models.train(params, kind, keep, progress=record.progress)[0],
            retrain=params.retrain,
        )
        states[kind] = found.state
        record.data(f"checkpoint_sparsed_{kind}", sha256=found.sha256)
for name, sha256 in models.identity(params).items():
    record.data(name, sha256=sha256)
networks = {kind: models.build(params, kind, states.get(kind)) for kind in models.KINDS}
for kind, network in networks.items():
    print(f"{kind}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters")
if losses:
    fig, ax = plt.subplots(figsize=(6, 3.2))
    figures.learned(ax, losses).set(title="seconds of training")
    record.figure("training", fig, "Training losses of the two toy models.")

# %% [markdown]
# ## 2. Where they look
#
# Tokens in blocks of $b$: a tile of the attention matrix is a block of queries by a block of keys, and its weight the
# mean of the attention weights in it. Below, text: unseen windows, the first part given, the rest masked, then unmasked
# step by step. Framed: the tiles that SparseD would choose in the first step; right of the green line the keys are
# generated. Heads differ: some look around themselves, some far away, some everywhere.

# %%
jobs = {f"observed-seed{seed}": partial(experiment.observe, params, states.get("text"), seed) for seed in params.seeds}
observed = dict(
    zip(params.seeds, record.cells(jobs, "observing", workers=params.workers or None).values(), strict=True)
)
first = observed[params.seeds[0]]["scores"]  # [steps, layers, heads, n, n]
way = experiment.policy(params, "sparsed", steps=params.steps, prompt=params.length - params.generated)
shown = [(layer, head) for layer in range(first.shape[1]) for head in range(first.shape[2])][:12]
columns = min(4, len(shown))
rows = -(-len(shown) // columns)
fig, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.8 * rows + 0.3), squeeze=False)
for ax in axes.flat[len(shown) :]:
    ax.axis("off")
for ax, (layer, head) in zip(axes.flat, shown, strict=False):
    kept = way.select(first[0, layer][None]).dense()[0, head]
    figures.pattern(ax, first[0, layer, head], kept, way.prompt_blocks)
    ax.set(title=f"layer {layer}, head {head}")
record.figure("patterns", fig, "Attention weights in tiles, by head, in the first step; framed: what SparseD keeps.")

# %% [markdown]
# And from step to step? *Similar* is the cosine of a head's tiles in one step and the next. *In common* are the tiles
# that SparseD would choose in a step with those that it chose in its search step. What matters is the weight in them:
# in tiles chosen early (*reused*) against tiles chosen in that very step (*own*).

# %%
similar = {seed: found["similar"] for seed, found in observed.items()}  # [steps - 1, layers, heads]
for seed, found in observed.items():
    record.metric("similar", similar[seed].mean(), variant="mean", seed=seed)
    record.metric("similar", similar[seed].mean(0).min(), variant="worst head", seed=seed)
    record.metric("overlap", found["kept"][-1].mean(), variant="last step", seed=seed)
    record.metric("overlap", found["kept"][-1].min(), variant="worst head", seed=seed)
    record.metric("held", found["held"].mean(), variant="reused", seed=seed)
    record.metric("held", found["best"].mean(), variant="own", seed=seed)
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
lines = {
    "similar, mean of heads": [values.mean((1, 2)).tolist() for values in similar.values()],
    "similar, lowest head": [values.amin((1, 2)).tolist() for values in similar.values()],
    "in common, mean of heads": [found["kept"].mean((1, 2)).tolist() for found in observed.values()],
}
figures.steps(left, lines, "cosine, or share of tiles").set(title="step to step")
weight = {
    "own tiles": [found["best"].mean((1, 2)).tolist() for found in observed.values()],
    "reused tiles": [found["held"].mean((1, 2)).tolist() for found in observed.values()],
}
figures.steps(right, weight, "share of the attention weight").set(title=f"weight in a share ρ = {RATIO:g} of the tiles")
record.figure("similarity", fig, "How much patterns change along the denoising of text; thin lines are seeds.")

# %% [markdown]
# ## 3. The idea
#
# **Skip.** The first $\lfloor\text{skip}\cdot T\rfloor$ steps stay dense. **Isolated selection.** In the last of them,
# every block of queries keeps the best share $\rho$ of the prompt's key blocks and, apart from those, the best share
# $\rho$ of the generated ones: at that time most of these are still MASK and would not be chosen against the prompt.
# **Reuse.** All later steps attend to those tiles and to nothing else.
#
# The weights of tiles take no product of queries and keys of their own: the kernel that computes dense attention with
# its log-sum-exp sums them on the way (it is the one that AdaSpa's search uses). What is exact about this:

# %%
batch = experiment.text_batch(params, params.seeds[0])
difference = evaluation.full_difference(params, networks["text"], batch)
record.metric("full_difference", difference)
record.metric("miscount", evaluation.miscount())
record.metric("pattern_difference", evaluation.pattern_difference())
for name, released in (("search", False), ("released", True)):
    record.metric("passes", evaluation.searched_passes(released=released), variant=name)
for seed in params.seeds:
    for name, isolated in (("isolated", True), ("together", False)):
        value = evaluation.starved(params, states.get("text"), seed, isolated=isolated)
        record.metric("generated_share", value, variant=name, seed=seed)
print(f"logits at rho = 1 differ from those of dense attention by {difference:.1e}")
print(f"selected together, generated blocks get {value:.2f} times an even share")

# %% [markdown]
# ## 4. What the released code does otherwise
#
# Five things, each a switch of `method.Compat`. LLaDA's search divides its logits by $\sqrt{32}$, the root of the
# number of heads, and its attention by $\sqrt{128}$: the pattern is found with weights that are too sharp. It keeps
# $\lfloor\rho n\rfloor+1$ blocks (with $\rho=1$ one more than there are, which is an error). It is dense for two steps
# longer. The prompt's blocks are those among the best of *all* blocks, so they are not isolated: the prompt gets more
# than its share where generated blocks rank low, and less where they rank high. And generated keys are ranked by a
# softmax of their own. What each changes in the text model's patterns, where all is still masked:

# %%
for seed in params.seeds:
    table = evaluation.compat_table(params, states.get("text"), seed)
    for name, row in table.items():
        for metric, value in row.items():
            record.metric(f"compat_{metric}", value, variant=name, seed=seed)
record.metric("logit_factor", evaluation.logit_factor())
record.metric("extra_steps", evaluation.extra_steps(128, 0.2))
print(f"{'switch':20s} tiles changed  density  of the prompt  of generation   (seed {params.seeds[-1]})")
for name, row in table.items():
    print(f"{name:20s} {row['changed']:13.1%} {row['density']:8.3f} {row['prompt']:14.3f} {row['generated']:14.3f}")

# %% [markdown]
# ## 5. Answers
#
# Every arm answers the same questions, one answer a step, the surest first. The patterns that serve autoregressive
# models (a window, and a window with the first tokens) keep as many tiles as SparseD and are sparse from the first step
# on.

# %%
sweep = [("sparsed", value) for value in params.ratios] + [("streaming", value) for value in params.ratios]
wanted = [(arm, None) for arm in params.arms if arm != "own"] + sweep


def compute(function, kind, wanted, title):
    """Results by (arm, ratio, seed)."""
    keys = [(arm, value, seed) for arm, value in wanted for seed in params.seeds]
    jobs = {
        f"{kind}-{arm}-{value}-seed{seed}": partial(function, params, states.get(kind), arm, value, seed)
        for arm, value, seed in keys
    }
    return dict(zip(keys, record.cells(jobs, title, workers=params.workers or None).values(), strict=True))


answers = compute(experiment.answer, "tasks", wanted, "answering")
scores = {key: float(np.mean([found["token"] for found in row.values()])) for key, row in answers.items()}
for (arm, value, seed), row in answers.items():
    variant = arm if value is None else f"{arm}/{value:g}"
    record.metric("accuracy", scores[arm, value, seed], variant=variant, seed=seed)
    record.metric("exact", np.mean([found["exact"] for found in row.values()]), variant=variant, seed=seed)
    record.metric("answer_density", np.mean([found["density"] for found in row.values()]), variant=variant, seed=seed)
    if value is None:
        for task, found in row.items():
            record.metric("task_accuracy", found["token"], variant=f"{arm}/{task}", seed=seed)


# %%
def of_seeds(table, arm, value=None):
    """One value a seed."""
    return [table[arm, value, seed] for seed in params.seeds]


fig, axes = plt.subplots(1, len(params.tasks), figsize=(5.2 * len(params.tasks), 3.4), sharey=True, squeeze=False)
for ax, task in zip(axes[0], params.tasks, strict=True):
    by_arm = {
        arm: [answers[arm, None, seed][task]["token"] for seed in params.seeds]
        for arm, value in wanted
        if value is None
    }
    figures.arms_by_seed(ax, by_arm, "right answers, %").set(title=task)
record.figure("tasks", fig, f"Right answers of every arm at a share ρ = {RATIO:g}, a dot a seed.")
for arm, value in wanted:
    if value is None:
        found = of_seeds(scores, arm)
        print(f"{figures.label(arm):24s} {np.mean(found):7.2f} %   " + "  ".join(f"{x:.2f}" for x in found))

# %% [markdown]
# **How few blocks are enough?** The paper: accuracy is flat down to $\rho$ of 20 to 30 % and collapses at 5 %.


# %%
def by_ratio(table, arm):
    """Values of the seeds by ratio."""
    return {value or RATIO: of_seeds(table, arm, value) for value in (*params.ratios, None)}


fig, ax = plt.subplots(figsize=(6.5, 3.8))
shown = {"SparseD": by_ratio(scores, "sparsed"), "sink and window": by_ratio(scores, "streaming")}
figures.against_ratio(ax, shown, np.mean(of_seeds(scores, "dense")), "right answers, %").set(title="fewer blocks")
record.figure("ratios", fig, "Right answers against the share of key blocks kept; dotted: dense attention.")

# %% [markdown]
# ## 6. Text, step by step
#
# For text there is no right answer, but a loss. The true tokens are unmasked in a random order over $T$ steps, and in
# each step the cross-entropy of what is still masked is taken: their mean over the steps bounds what a token costs.
# *Each step's own pattern* is sparse in every step with tiles found in that very step, so that what it loses is lost to
# sparsity alone, not to age.

# %%
texts = compute(experiment.text_losses, "text", [(arm, None) for arm in params.arms] + sweep, "reading")
bounds = {key: float(np.mean(found["losses"])) for key, found in texts.items()}
for (arm, value, seed), found in texts.items():
    variant = arm if value is None else f"{arm}/{value:g}"
    record.metric("text_loss", bounds[arm, value, seed], variant=variant, seed=seed)
    record.metric("text_density", found["density"], variant=variant, seed=seed)
for seed in params.seeds:
    dense, own = (texts[arm, None, seed]["losses"] for arm in ("dense", "own"))
    for name, value in zip(("early", "late"), evaluation.rises(dense, own), strict=True):
        record.metric("rise", value, variant=name, seed=seed)
    record.curve("step_loss", range(1, params.steps + 1), dense, variant="dense", seed=seed)
    record.curve("step_loss", range(1, params.steps + 1), own, variant="own", seed=seed)


def above(arm):
    """Rise over the dense loss in each step, a row a seed."""
    pairs = [(texts[arm, None, seed]["losses"], texts["dense", None, seed]["losses"]) for seed in params.seeds]
    return [(np.array(mine) - np.array(dense)).tolist() for mine, dense in pairs]


fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
told = [arm for arm in ("own", "no_skip", "sparsed", "no_isolation") if arm in params.arms]
figures.steps(left, {figures.label(arm): above(arm) for arm in told}, "nats a token above dense")
left.set(title="what sparsity costs in each step")
shown = {"SparseD": by_ratio(bounds, "sparsed"), "sink and window": by_ratio(bounds, "streaming")}
figures.against_ratio(right, shown, np.mean(of_seeds(bounds, "dense")), "nats a token").set(title="fewer blocks")
record.figure("text", fig, "Left: loss above dense attention's in each step. Right: mean loss against the share kept.")
for arm in params.arms:
    found = of_seeds(bounds, arm)
    print(f"{figures.label(arm):24s} {np.mean(found):.4f} nats a token   " + "  ".join(f"{x:.4f}" for x in found))

# %% [markdown]
# ## 7. Time
#
# One attention of two heads of 64 on one thread, torch's dense attention as the measure. *search* is dense attention
# with the weights of all tiles; the released way finds them beside the dense attention, block of queries by block of
# queries, with two softmaxes. A generation pays for the pattern once and gains in every sparse step.

# %%
taken = {n: record.cell(f"times-{n}", partial(timing.seconds, params, n)) for n in params.timing_lengths}
for n, found in taken.items():
    for repeat in range(params.repeats):
        row = {name: values[repeat] for name, values in found.items()}
        for name, value in row.items():
            record.metric("seconds", value, variant=f"{name}/{n}", seed=repeat)
        for total in (128, 1024):
            for name, released in (("search", False), ("released", True)):
                gain = timing.generation_speedup(row, total, params.skip, released=released)
                record.metric("speedup", gain, variant=f"{name}/{n}/{total}", seed=repeat)
longest = params.timing_lengths[-1]
for seed in range(params.repeats):  # under names that do not change with the profile
    row = {name: values[seed] for name, values in taken[longest].items()}
    for name, value in row.items():
        record.metric("longest_seconds", value, variant=name, seed=seed)
    for name, released in (("search", False), ("released", True)):
        gain = timing.generation_speedup(row, 128, params.skip, released=released)
        record.metric("longest_speedup", gain, variant=name, seed=seed)
medians = {name: [float(np.median(taken[n][name])) for n in params.timing_lengths] for name in timing.NAMES}
fig, ax = plt.subplots(figsize=(6.5, 3.8))
figures.times(ax, params.timing_lengths, medians).set(title=f"one attention, ρ = {RATIO:g}")
record.figure("times", fig, "Time of one attention's parts over that of torch's dense attention, medians of repeats.")
for name, values in medians.items():
    print(f"{name:9s} " + "  ".join(f"{value * 1e3:9.1f} ms" for value in values))

# %% [markdown]
# ## 8. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: at `smoke`
# nothing is learned, at `laptop` models of a hundred thousand parameters see 256 tokens in 16 blocks.

# %%
record.close()
