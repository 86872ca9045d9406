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
# # Progressive gradient flow: growing sparse without the noise
#
# *Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers*, Bambhaniya, Yazdanbakhsh, Subramanian,
# Kao, Agrawal, Evci and Krishna, CPAL 2025, [arXiv 2402.04744](https://arxiv.org/abs/2402.04744).
#
# An N:M network keeps N of every M neighbouring weights, and is trained so from the start. At 2:4 that costs next to
# nothing. At 1:16 it costs accuracy, and the paper says why, and what helps. This notebook follows it:
#
# 1. the problem: what a pruned weight is told;
# 2. the remedy: four schedules by which a network grows sparse while it learns;
# 3. two places where the code and the description part;
# 4. the experiment: a vision transformer at five patterns, a language model, every arm with the same seeds;
# 5. the reason: is there less noise?
# 6. the price: accuracy at equal computation;
# 7. the verdicts.
#
# The equations are in `method.py`, the schedules themselves in `common/sparsity/flows.py`, the arms in `experiment.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
text = None
patterns = None
main_pattern = None
arms = None
main_arms = None
text_arms = None
network = None
patch = None
width = None
depth = None
heads = None
context = None
steps = None
epochs = None
batch = None
learning_rate = None
text_learning_rate = None
weight_decay = None
warmup = None
clip = None
mixup = None
exponent = None
dense = None
fine_tune = None
blocks = None
refresh = None
probe = None
device = None
workers = None

# %%
import dataclasses
from functools import partial

import matplotlib.pyplot as plt

from common import params as parameters
from common import plots, stats
from common.record import Record
from papers.progressive_gradient_flow import data, evaluation, experiment, figures, method
from papers.progressive_gradient_flow.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "progressive_gradient_flow", profile, given)
record = Record.open("progressive_gradient_flow", profile, params)
plots.style()
main = params.main_pattern
n, m = experiment.pattern_of(main)
label = experiment.LABELS
params

# %% [markdown]
# ## 1. The problem: what a pruned weight is told
#
# Of every $M$ weights along a row the $N$ largest are kept, $E$ marks them, and the network computes with
# $\widetilde W = E \odot W$. Which are largest changes while the network learns, so the pruned ones must learn too. The
# straight-through estimator hands *every* weight the gradient $\partial L / \partial \widetilde W$. For a kept
# weight that is the truth. For a pruned one it answers a question that nobody asked: *what if this one took part as
# well, beside those that are there?* At 2:4 every second weight is told such things; at 1:16 fifteen of sixteen are.
# SR-STE adds a pull towards zero for pruned weights, so that the choice flickers less.
#
# The paper's remedy is to let them take part. Pruned weights count with a factor $\beta$ that falls during training:
#
# $$\widetilde W = \big[E + \beta(s)\,(1 - E)\big] \odot W, \qquad
#   \beta(s) = \max(0,\, 1 - c\,s) \ \text{(linear)} \quad\text{or}\quad
#   \beta(s) = e^{-c\,s} \ \text{(exponential)}.$$
#
# That is *mask decay* (MDGF). *Structure decay* (SDGF) keeps the mask hard and lets the pattern grow sparser:
# $(M{-}1){:}M \to \tfrac M2{:}M \to \tfrac M4{:}M \to \dots \to N{:}M$ (stepwise), or keeps the density and lets the
# blocks shrink: $8N{:}8M \to 4N{:}4M \to 2N{:}2M \to N{:}M$ (geometric).
#
# First on the smallest possible example: a teacher, one linear layer whose weights *are* 1:16, and a student of its
# size that must find out which. The bare equations of `method.py` train it. The share of the teacher's places that the
# student's mask has found, step by step, over three teachers:

# %%
found = {flow: [] for flow in evaluation.ONE_LAYER}
for seed in range(3):
    problem = evaluation.teacher(seed)
    for flow in found:
        found[flow].append(evaluation.one_layer(problem, seed, flow))
        record.metric("planted_found", found[flow][-1][-1], variant=flow, seed=seed)
fig, ax = plt.subplots(figsize=(7, 3.4))
plots.curves(ax, {flow: (range(1, evaluation.STEPS + 1), rows) for flow, rows in found.items()})
ax.set(xlabel="step", ylabel="share of the teacher's places", ylim=(0.8, 1.005), title="one layer, 1:16")
record.figure("one-layer", fig, "Share of a 1:16 teacher's places that a student's mask has found, three teachers.")

# %% [markdown]
# One layer has no trouble: without noise from other layers all three find nearly everything. What differs are deep
# networks, below. But one layer is good for a check: the sparse layers that everything below is trained with must do
# exactly what the equations say.

# %%
for mode in ("ste", "scaled"):
    difference = evaluation.difference_to_layers(mode)
    record.metric("difference", difference, variant=mode)
    print(f"{mode}: weights differ by at most {difference:.1e} after {evaluation.STEPS} steps")

# %% [markdown]
# ## 2. Four schedules
#
# $c$ is scaled to the number of steps: the published $10^{-4}$ a step makes $\beta = e^{-11}$ at the end of the
# authors' run, and so does ours. The linear flow gets half of that $c$, which gives both curves the same area.

# %%
print(f"at 1e-4 a step beta halves in {evaluation.half_life(1e-4)} steps")
record.metric("half_life_steps", evaluation.half_life(1e-4))
shown = 1000
flows = method.recipes(method.Schedule(shown, exponent=params.exponent))
fig = figures.schedules(flows, n, m, shown)
record.figure("schedules", fig, f"What pruned weights count, and how many weights are kept, on the way to {main}.")

# %% [markdown]
# ## 3. Where code and description part
#
# **The stages.** A comment in the released code describes five equal stages to 1:16. What it computes are stages of a
# fourth of the training each, so that the fifth, the only one at 1:16, begins when the training is over: the network is
# pruned to a pattern that it was never trained at. (With a fine-tuning phase it would be; the published configurations
# have none.)

# %%
record.metric("stages", len(method.stepwise(1, 16)), variant="stepwise")
for arm in ("stepwise", "stepwise_released"):
    rules = [flows[arm].rule(step, 1, 16) for step in range(shown)]
    record.metric("final_share", sum((rule.n, rule.m) == (1, 16) for rule in rules) / shown, variant=arm)
    kept = list(dict.fromkeys(f"{rule.n}:{rule.m}" for rule in rules))
    print(f"{label[arm]:22s} trains at {', '.join(kept)}")

# %% [markdown]
# **The gradient.** Differentiating $\widetilde W$ gives a pruned weight $\beta\,\partial L/\partial\widetilde W$. The
# released code gives it the whole $\partial L/\partial\widetilde W$, with a comment that asks whether this is right. We
# call the first `scaled` and the second `ste`, and train both. The norm of what pruned weights get at $\beta = 0.05$:

# %%
for mode in ("ste", "scaled"):
    record.metric("pruned_gradient", evaluation.pruned_gradient(0.05, mode), variant=mode)
    print(f"{mode}: {evaluation.pruned_gradient(0.05, mode):.4f}")

# %% [markdown]
# ## 4. The experiment
#
# The feed-forward layers of a vision transformer become sparse, as in the paper; attention, embedding and head stay
# dense. Every arm is trained with every seed. Arms of one seed start from the same weights and see the same batches,
# so differences are paired. In the end each network is pruned to its hard mask and only then scored. Finished trainings
# are kept: after an interruption this notebook goes on where it stopped.

# %%
tasks = {"images": data.task_of(params, "images")}
if params.text != "none":
    tasks["text"] = data.task_of(params, "text")
for task in tasks.values():
    name, sha256 = task.provenance()
    record.data(name, sha256=sha256)
runs = [(*run, seed) for run in experiment.runs(params) for seed in params.seeds]
bar = {"progress": record.progress} if params.workers == 1 else {}
jobs = {
    f"{task}-{arm}-{pattern.replace(':', 'of')}-seed{seed}": partial(
        experiment.train, params, tasks[task], arm, pattern, seed, **bar
    )
    for task, arm, pattern, seed in runs
}
print(f"{len(jobs)} trainings")

# %%
trained = dict(zip(runs, record.cells(jobs, "trainings", workers=params.workers or None).values(), strict=True))

# %%
scores: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in tasks}
for (name, arm, pattern, seed), result in trained.items():
    variant = experiment.name_of(arm, pattern)
    record.metric(tasks[name].metric, result["score"], variant=variant, seed=seed)
    scores[name].setdefault((arm, pattern), []).append(result["score"])
    prefix = "" if name == "images" else "text_"
    record.metric(f"{prefix}flip_rate", result["flip_rate"], variant=variant, seed=seed)
    record.metric(f"{prefix}seconds", result["seconds"], variant=variant, seed=seed)
    if arm != experiment.DENSE:
        record.metric(f"{prefix}gradient_variance", result["variance_pruned"], variant=variant, seed=seed)
    if pattern == main:
        for curve, (at, values) in result["curves"].items():
            if arm != experiment.DENSE or curve == "loss":
                record.curve(f"{prefix}{curve}", at, values, variant=variant, seed=seed)
record.metric("exact", min(result["exact"] for result in trained.values()))
for name, row in scores.items():
    for (arm, pattern), values in row.items():
        print(f"{name:7s}{label[arm]:30s}{pattern:6s}{tasks[name].metric} {sum(values) / len(values):7.2f}")

# %%
fig, ax = plt.subplots(figsize=(7.5, 4.2))
figures.against_sparsity(ax, scores["images"], params.patterns, params.arms, bounds=(0, 100))
alone = stats.interval(scores["images"][experiment.DENSE, main])
ax.axhline(alone.mean, **figures.look(experiment.DENSE))
ax.axhspan(max(0, alone.low), min(100, alone.high), color=figures.look(experiment.DENSE)["color"], alpha=0.1)
ax.annotate("dense", (0, alone.mean), xytext=(0, 3), textcoords="offset points", fontsize="small")
ax.set(ylabel="top-1 accuracy, %", title=f"{params.dataset}: the sparser, the lower?")
record.figure("against-sparsity", fig, "Accuracy on test images against the pattern, mean and 95 % band over seeds.")

# %% [markdown]
# Differences to SR-STE, pair by pair: what all claims about accuracy are judged by.

# %%
compared = [arm for arm in params.arms if arm != "sr_ste"]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[1.3, 1])
lead = {
    (arm, pattern): [a - b for a, b in zip(values, scores["images"]["sr_ste", pattern], strict=True)]
    for (arm, pattern), values in scores["images"].items()
    if arm != experiment.DENSE
}
figures.against_sparsity(axes[0], lead, params.patterns, compared)
axes[0].axhline(0, color="black", linewidth=0.8)
axes[0].set(ylabel="points above SR-STE", title="lead over SR-STE")
at_main = [arm for arm in dict.fromkeys((*params.arms, *params.main_arms)) if arm != "sr_ste"]
for place, arm in enumerate(at_main):
    axes[1].plot(lead[arm, main], [place] * len(params.seeds), "o", color=figures.look(arm)["color"])
axes[1].axvline(0, color="black", linewidth=0.8)
axes[1].set_yticks(range(len(at_main)), [label[arm] for arm in at_main], fontsize="small")
axes[1].invert_yaxis()
axes[1].set(xlabel="points above SR-STE", title=f"all arms at {main}, a dot a seed")
record.figure("lead", fig, f"Accuracy above SR-STE's: over the patterns, and for every arm at {main}.")

# %% [markdown]
# The second task: a small GPT, sparse in the same layers, that predicts the next character.

# %%
if "text" in tasks:
    fig, ax = plt.subplots(figsize=(6, 2.6))
    for place, arm in enumerate(params.text_arms):
        values = scores["text"][arm, main]
        ax.plot(values, [place] * len(values), "o", color=figures.look(arm)["color"])
    ax.set_yticks(range(len(params.text_arms)), [label[arm] for arm in params.text_arms])
    ax.invert_yaxis()
    ax.set(xlabel="perplexity a character (less is better)", title=f"{params.text} at {main}, a dot a seed")
    record.figure("text", fig, f"Perplexity on held-out text at {main}, a dot a seed.")
else:
    print("no text at this profile")

# %% [markdown]
# ## 5. The reason: is there less noise?
#
# The paper blames the variance of the gradients. Below, of the entries of $\partial L/\partial\widetilde W$ at pruned
# places: their variance, averaged over layers, as a running mean over steps. And how many places of the mask change
# from one probe to the next. (The first steps, where $\beta$ is near 1, say little: hardly anything is pruned yet.)

# %%
shown_arms = [arm for arm in (*params.arms, *params.main_arms) if ("images", arm, main, params.seeds[0]) in trained]
shown_arms = [arm for arm in shown_arms if arm in ("sr_ste", "linear", "exponential", "stepwise", "exponential_scaled")]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
for ax, curve in zip(axes, ("variance_pruned", "flip_rate"), strict=True):
    series = {}
    for arm in shown_arms:
        rows = [trained["images", arm, main, seed]["curves"][curve] for seed in params.seeds]
        series[arm] = (rows[0][0], [values for _, values in rows])
    figures.over_time(ax, series)
    ax.set(yscale="log")
axes[0].set(title="variance of pruned weights' gradients", ylabel="running mean")
axes[1].set(title="mask places that changed", ylabel=f"share in {params.probe} steps")
record.figure(
    "noise", fig, f"Variance of the gradient at pruned places, and flips of the mask, over training at {main}."
)

# %% [markdown]
# ## 6. The price: accuracy at equal computation
#
# A mask that is hard saves products: of the three of a linear layer (forward, gradient of the input, gradient of the
# weights) the first two need only what is kept, so a training costs $(2\rho + 1)/3$ of a dense one at density $\rho$.
# Mask decay saves nothing as long as $\beta > 0$. So SR-STE may train longer for the same money; `sr_ste_long` does.

# %%
cost = {}
for arm, pattern in scores["images"]:
    count = experiment.steps_of(params, tasks["images"], arm, pattern)
    cost[arm, pattern] = experiment.products(params, tasks["images"], arm, pattern, count)
    variant = experiment.name_of(arm, pattern)
    record.metric("gigaproducts", cost[arm, pattern] / 1e9, variant=variant)
    if arm != experiment.DENSE:
        recipe = experiment.recipe_of(params, arm, count)
        share = method.share_of_dense(recipe, *experiment.pattern_of(pattern), count)
        record.metric("share_of_dense", share, variant=variant)
reference = cost[experiment.DENSE, main]
points = {
    arm: (cost[arm, pattern] / reference, values)
    for (arm, pattern), values in scores["images"].items()
    if pattern == main
}
for arm, (share, _) in points.items():
    print(f"{label[arm]:30s} {share:5.2f} of dense")

# %%
fig, ax = plt.subplots(figsize=(7.5, 4.4))
figures.against_products(ax, points)
ax.set(ylabel="top-1 accuracy, %", title=f"what accuracy costs, at {main}")
record.figure("products", fig, f"Accuracy against the products of the whole training, at {main}, with 95 % bars.")

# %% [markdown]
# ## 7. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* and *inconclusive* are results. Remember the
# scale: at `smoke` nothing is learned yet; at `laptop` a network of a hundred thousand parameters has seen each of
# twelve thousand images five times, which is far from ViT-B after 350 epochs of ImageNet.

# %%
record.close()
