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
# # AdaSpa: sparse attention for video, searched rarely and exactly
#
# *Training-free and Adaptive Sparse Attention for Efficient Long Video Generation*, Xia, Ling, Fu, Wang, Li, Xiao and
# Cui, ICCV 2025, [arXiv 2502.21079](https://arxiv.org/abs/2502.21079).
#
# A video diffusion transformer lets every token of every frame look at every other, fifty times over. For eight
# seconds of HunyuanVideo at 720p that is five sixths of all arithmetic. Most of the weight of this attention lies in
# few places; where, depends on the prompt, the seed, the layer and the head, but hardly on the denoising step. So
# AdaSpa *searches* for the places in the running generation, exactly but only twice, and attends to them in between.
# The notebook goes from the observation to the verdicts:
#
# 1. how much there is to gain;
# 2. a video model small enough for a laptop, of HunyuanVideo's own class;
# 3. what its attention looks like, along the steps and across prompts and seeds;
# 4. the method;
# 5. heads whose pattern is known;
# 6. all variants and rivals, from the same noise;
# 7. what a search costs, up to the paper's 119,056 tokens;
# 8. the verdicts.
#
# The method is in `method.py`, spelled out in plain torch; what runs is `common.attention.AdaSpa` on
# `kernels.attention`, which any diffusers pipeline can use.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
frames = None
side = None
sprite_prompts = None
clip_prompts = None
texts = None
model = None
patch = None
heads = None
head_dim = None
double = None
single = None
real_share = None
train_steps = None
train_batch = None
train_rate = None
train_warmup = None
image_share = None
model_seed = None
retrain = None
keep_model = None
steps = None
shift = None
arms = None
keep_ratio = None
search_steps = None
block_size = None
look_at = None
families_at = None
densities = None
sizes = None
lengths = None
rounds = None
long_rounds = None
timing_dim = None
timing_block = None
timing_keep = None
planted_grid = None
planted_text = None
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
from papers.adaspa import cost, data, evaluation, experiment, figures, network, planted
from papers.adaspa.settings import Params

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "adaspa", profile, given)
record = Record.open("adaspa", profile, params)
plots.style()
params

# %% [markdown]
# ## 1. How much there is to gain
#
# HunyuanVideo cuts a 720p video of 129 frames into $33\cdot45\cdot80$ tokens and adds 256 of text: $L=119\,056$. Each
# of its 60 blocks multiplies $4L^2d$ times for attention, and $24\,d^2L$ times for everything else, $d=3072$. No sparse
# attention can save more than its share.

# %%
FULL = 33 * 45 * 80 + cost.HUNYUAN["text"]
peta = {
    "attention": cost.STEPS * cost.attention_flops(FULL) / 1e15,
    "all": cost.STEPS * (cost.attention_flops(FULL) + cost.linear_flops(FULL)) / 1e15,
}
for name, value in peta.items():
    record.metric("pflop", value, variant=name)
record.metric("attention_share", cost.share(FULL))
at = np.geomspace(2e3, 4e5, 100)
fig, ax = plt.subplots(figsize=(7, 3.2))
ax.plot(at, [cost.share(tokens) for tokens in at])
ax.plot([FULL], [cost.share(FULL)], "o", color=plots.COLORS[1])
ax.annotate("8 s at 720p", (FULL, cost.share(FULL)), textcoords="offset points", xytext=(-62, 6))
ax.set(xscale="log", xlabel="tokens", ylabel="share of attention", ylim=(0, 1))
record.figure("share", fig, "Share of attention in HunyuanVideo's arithmetic against the length of the sequence.")
print(
    f"{peta['attention']:.0f} of {peta['all']:.0f} PFLOP are attention: at most {1 / (1 - cost.share(FULL)):.1f} times "
    "faster without it"
)

# %% [markdown]
# ## 2. A small video model
#
# The weights of HunyuanVideo do not fit a laptop, and with random weights attention has no structure. So the project
# trains a small transformer *of the same class* (diffusers' `HunyuanVideoTransformer3DModel`: text and video in one
# attention, rotary positions in time, rows and columns) on videos whose captions are exact: sprites that move, bounce
# and hide each other; and, at `laptop`, on pieces of real clips. It is trained by flow matching, in pixels.

# %%
small = not params.model
state = None
if small:
    examples = [data.sprites(params.frames, params.side, params.model_seed, number) for number in range(3)]
    fig = figures.videos({"\n".join(" ".join(phrase) for phrase in words): video for video, words in examples})
    record.figure("sprites", fig, "Generated training videos and their captions.")
    if params.keep_model:
        found = network.trained(params, progress=record.progress)
        record.data("checkpoint video-sprites", sha256=found.sha256)
        state = found.state
    else:
        made = record.cell("model", partial(network.train, params))
        record.curve("loss", range(len(made["losses"])), made["losses"])
        state = made["state"]
    net = network.load(params, state)
    tokens = params.frames * (params.side // params.patch) ** 2
    print(
        f"{sum(p.numel() for p in net.parameters()):,} weights; {tokens} tokens of video and {data.TEXT} of text, in "
        f"{-(-(tokens + data.TEXT) // params.block_size)} blocks of {params.block_size}"
    )

# %% [markdown]
# ## 3. What attention looks like
#
# A dense generation is watched. For each layer and head the weight of attention in every tile, that is a block of
# queries times a block of keys, is summed up exactly. Maps of one prompt: heads differ, steps much less.

# %%
prompts = experiment.captions(params)
watched = {}
if small:
    jobs = {
        f"look-prompt{prompt}-seed{seed}": partial(experiment.study, params, prompt, seed, state)
        for prompt in range(len(prompts))
        for seed in params.seeds
    }
    keys = [(prompt, seed) for prompt in range(len(prompts)) for seed in params.seeds]
    watched = dict(zip(keys, record.cells(jobs, "looking on", workers=params.workers or None).values(), strict=True))

    first, last = params.look_at[0], max(params.look_at)
    looks = watched[0, params.seeds[0]]["looks"]
    count = len(looks[first].scores)
    chosen = sorted({round(x) for x in np.linspace(0, count - 1, min(6, count))})
    rows = {f"step {step}": [looks[step].scores[head] for head in chosen] for step in (min(looks), first, last)}
    record.figure(
        "maps",
        figures.maps(rows, [f"layer {head // params.heads + 1}, head {head % params.heads + 1}" for head in chosen]),
        "Attention weight by tile, some heads and three steps of one generation; text is last.",
    )

# %% [markdown]
# **How concentrated, and does that depend on the step?** Keep the heaviest fifth of the tiles in each row and ask for
# their share of the weight, the *recall*. If it differs between heads but not between steps, the budget should follow
# the head, and the search need not be repeated.

# %%
if small:
    for seed in params.seeds:
        rows = [evaluation.steadiness(params, watched[prompt, seed]["looks"]) for prompt in range(len(prompts))]
        for name in rows[0]:
            record.metric("recall", experiment.seed_values([row[name] for row in rows]), variant=name, seed=seed)
    table = np.array([evaluation.steadiness(params, found["looks"])["mean"] for found in watched.values()])
    print(f"recall of the best fifth: {table.mean():.3f}, from {table.min():.3f} to {table.max():.3f} by generation")

# %% [markdown]
# **Do tiles and LSE keep?** A tile's weight is $\sum\exp(q_ik_j/\sqrt d-\mathrm{LSE}_i)$. The tiles of the first search
# are held against the best ones of later steps (*retention*), and the search with the LSE of the first against a search
# with its own (*agreement*). A shift of the LSE that is common to a block of rows cannot change the order of tiles, so
# only its spread *within* blocks matters.

# %%
if small:
    curves = {name: {} for name in ("retention", "agreement", "correlation", "within")}
    for seed in params.seeds:
        rows = [evaluation.stability(params, watched[prompt, seed]["looks"]) for prompt in range(len(prompts))]
        for name, curve in curves.items():
            by_step = {step: experiment.seed_values([row[step][name] for row in rows]) for step in rows[0]}
            record.metric(name, experiment.seed_values(list(by_step.values())), seed=seed)
            record.curve(name, list(by_step), list(by_step.values()), seed=seed)
            curve[seed] = list(by_step.values())
    after = [step for step in sorted(params.look_at) if step > first]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    plots.curves(
        left, {name: (after, list(curves[name].values())) for name in ("retention", "agreement", "correlation")}
    )
    left.set(xlabel="step", title=f"what keeps of step {first}", ylim=(min(0.5, left.get_ylim()[0]), 1.02))
    plots.curves(right, {"within blocks": (after, list(curves["within"].values()))})
    right.set(xlabel="step", ylabel="change of LSE, nats", title="what can disturb the order of tiles")
    record.figure("keeping", fig, "Left: tiles and LSE of the search against later steps. Right: drift within blocks.")

# %% [markdown]
# **Do tiles serve another video?** If they did, an offline search would do. The same later steps, with tiles searched
# in this generation, in one from other noise, and in one of another prompt:

# %%
if small:
    kept = {"this one": {}, "other noise": {}, "other prompt": {}}
    for seed in params.seeds:
        other = params.seeds[(params.seeds.index(seed) + 1) % len(params.seeds)]
        sources = {"this one": (0, seed), "other noise": (0, other), "other prompt": (1, seed)}
        for name, (shift_prompt, of) in sources.items():
            values = [
                evaluation.transfer(
                    params,
                    watched[prompt, seed]["looks"],
                    watched[(prompt + shift_prompt) % len(prompts), of]["looks"],
                )
                for prompt in range(len(prompts))
            ]
            if len(prompts) > 1 or not shift_prompt:
                kept[name][seed] = experiment.seed_values(values)
                record.metric("transfer", kept[name][seed], variant=name.replace(" ", "_"), seed=seed)
    fig, ax = plt.subplots(figsize=(6.5, 3.2))
    figures.reaches(ax, {name: list(values.values()) for name, values in kept.items() if values})
    ax.set(ylabel="weight held, of the best", ylim=(min(0.8, ax.dataLim.y0), 1.0))
    record.figure("transfer", fig, "What tiles searched elsewhere hold of the weight of the best tiles.")

# %% [markdown]
# **Why tiles?** Earlier methods keep columns, diagonals or both. The best of each family there is, chosen on the whole
# matrix, at equal numbers of entries:

# %%
if small:
    by_family = {}
    for seed in params.seeds:
        rows = [row for prompt in range(len(prompts)) for row in watched[prompt, seed]["families"].values()]
        for name, value in evaluation.families(rows).items():
            record.metric("family", value, variant=name, seed=seed)
            family, density = name.split("/")
            by_family.setdefault(family, {}).setdefault(float(density), []).append(value)
    fig, ax = plt.subplots(figsize=(7, 3.6))
    record.figure(
        "families",
        figures.families(ax, by_family).figure,
        "Recall of the best pattern of each family: tiles of 16 to 128 tokens, columns, diagonals, half of each.",
    )

# %% [markdown]
# ## 4. The method
#
# With $W=\mathrm{softmax}(QK^\top/\sqrt d)$ and tiles $(p,q)$ of $B\times B$,
#
# $$S_{pq}=\sum_{i\in p,\,j\in q}\exp\!\Big(\frac{q_i\cdot k_j}{\sqrt d}-\mathrm{LSE}_i\Big),\qquad
#   \mathrm{Recall}(M)=\frac{\sum_{(p,q)\in M}S_{pq}}{\sum S_{pq}}$$
#
# - **Warm-up**: the first steps are dense.
# - **Fused search** in step $t_1$: FlashAttention gives output and LSE; the keys are streamed once more for $S$. The
#   kernel here keeps each row's sum in every tile with the maximum it was taken at, and rescales at the end: one pass.
# - **LSE-cached search** in later search steps: the second pass alone, with the LSE of $t_1$.
# - **Row by row** the same number of tiles, so that no query is starved; every tile with text in it on top.
# - **Head tiers**: of $n$ heads with a recall above 0.8, the $n$ best give half of their tiles to the $n$ worst.
#
# The text leaves some of it open (paper.yaml lists what), and prints $\log$ for $\exp$ in both algorithms. Kernels and
# `method.py` against each other, and two facts about a stale LSE:

# %%
for name, value in evaluation.exactness().items():
    record.metric("difference", value, variant=name)
    print(f"{name:8s} differs by {value:.1e}")
for shift_ in (0.5, 5.0):
    record.metric("changed_by_shift", evaluation.row_shift_changes(shift_), variant=f"{shift_:g}")
for deviation in (0.1, 0.3, 1.0):
    changed = evaluation.noise_changes(deviation)
    record.metric("changed_by_noise", changed, variant=f"{deviation:g}")
    print(f"errors of the LSE that differ from row to row by {deviation:g} change {changed:.1%} of the choice")

# %% [markdown]
# ## 5. Heads whose pattern is known
#
# Planted heads over the tokens of a longer video: one looks at a few columns, one at its neighbourhood in space and
# time, one at pieces of the video at random places, one at everything. What the best tiles hold, what as many tiles in
# a window hold, and what the head tiers give to each:

# %%
known = {seed: evaluation.kinds_of_heads(params, seed) for seed in params.seeds}
for seed, kinds in known.items():
    for kind, row in kinds.items():
        for name, value in row.items():
            record.metric(f"planted_{name}", value, variant=kind, seed=seed)
    record.metric("planted_mean_keep", np.mean([row["keep"] for row in kinds.values()]), seed=seed)
titles = {"recall": "recall of the best tiles", "window": "recall of a window", "keep": "share of tiles given"}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for ax, (name, title) in zip(axes, titles.items(), strict=True):
    figures.reaches(ax, {kind: [known[seed][kind][name] for seed in params.seeds] for kind in planted.KINDS})
    ax.set(title=title)
record.figure("planted", fig, "Planted heads: what the best fifth of the tiles holds, what a window holds, the tiers.")

# %% [markdown]
# ## 6. All variants, from the same noise
#
# Every arm generates the same captions from the same noise. The measure is the distance to the *dense* video, as in the
# paper: PSNR over all frames. It has a floor: dense attention by another kernel, or in bfloat16, also ends elsewhere.
# *MInference-like* and *Sparse VideoGen-like* choose anew in every attention from a few queries; *another prompt's
# tiles* is an offline search. All keep as many tiles after as many dense steps.

# %%
jobs, order = {}, []
for arm in params.arms:
    for seed in params.seeds:
        masks = None
        if arm == "fixed":
            others = [watched[(prompt + 1) % len(prompts), seed]["masks"] for prompt in range(len(prompts))]
            masks = experiment.batched(others)
        jobs[f"{arm}-seed{seed}"] = partial(experiment.generate, params, arm, seed, state, masks)
        order.append((arm, seed))
generated = dict(zip(order, record.cells(jobs, "generations", workers=params.workers or None).values(), strict=True))
measured = {}
for (arm, seed), found in generated.items():
    dense = generated["dense", seed]["videos"]
    row = evaluation.arm_metrics(found["videos"], dense, prompts, same=arm == "dense")
    row["density"] = found["density"]
    if found["recall"] is not None:
        row["found"] = found["recall"]
    if "wall" in found:
        row["wall"] = experiment.seed_values(found["wall"])
    for name, value in row.items():
        record.metric(name, value, variant=arm, seed=seed)
        measured.setdefault(name, {}).setdefault(arm, []).append(value)

# %%
told = [arm for arm in ("dense", "adaspa", "svg", "minference", "window", "keep_0.1") if arm in params.arms]
for number in range(len(prompts) or len(params.texts)):
    words = prompts[number] if prompts else ((params.texts[number],),)
    rows = {experiment.ARMS[arm]: generated[arm, params.seeds[0]]["videos"][number] for arm in told}
    record.figure(
        f"videos-{number + 1}", figures.videos(rows), f"“{'; '.join(' '.join(x) for x in words)}”, first seed."
    )

# %%
FLOORS = ("kernel", "bfloat16")
compared = [arm for arm in params.arms if arm in measured["psnr"] and arm not in FLOORS]
fig, (left, right) = plt.subplots(1, 2, figsize=(11.5, 0.27 * len(compared) + 1.3))
figures.arms(left, {arm: measured["psnr"][arm] for arm in compared}, "PSNR to the dense video, dB")
figures.arms(right, {arm: measured["density"][arm] for arm in compared}, "tiles computed in sparse attentions")
right.set_yticklabels([])
record.figure("arms", fig, "Left: PSNR to the dense model's video, a dot a seed. Right: the density really computed.")
for arm in (*(arm for arm in FLOORS if arm in measured["psnr"]), *compared):
    psnr, density = (np.mean(measured[name][arm]) for name in ("psnr", "density"))
    print(f"{experiment.ARMS[arm]:26s} {psnr:6.2f} dB, density {density:.3f}")
if "follows" in measured:
    followed = {arm: np.mean(measured["follows"][arm]) for arm in ("dense", "adaspa")}
    print(f"sprites that follow the caption: dense {followed['dense']:.0%}, AdaSpa {followed['adaspa']:.0%}")

# %% [markdown]
# Where along the steps does a video leave the dense one? While all is dense, not at all; then the small errors of each
# step add up.

# %%
if small:
    runs = {arm: [generated[arm, seed]["trajectory"] for seed in params.seeds] for arm in params.arms}
    exact = runs.pop("dense")
    fig, ax = plt.subplots(figsize=(8, 3.8))
    figures.trajectories(ax, {arm: states for arm, states in runs.items() if states[0] is not None}, exact)
    record.figure("trajectories", fig, "Distance of a generation's states to those of the dense one, mean of seeds.")

# %% [markdown]
# ## 7. What a search costs
#
# One planted head on this machine, against torch's attention: the fused search (with the dense attention it replaces),
# the cached search (with the choice of tiles), and sparse attention. Whatever the length, a search that pays for itself
# after a step or two is worth it.

# %%
timed = {}
for tokens in params.lengths:
    count = params.long_rounds if tokens == max(params.lengths) else params.rounds
    timed[tokens] = record.cell(
        f"timing-{tokens}",
        partial(
            cost.measure,
            tokens,
            head_dim=params.timing_dim,
            keep_ratios=params.timing_keep,
            block=params.timing_block,
            rounds=count,
        ),
    )
middle = {}
for tokens, found in timed.items():
    for number, row in enumerate(cost.ratios(found["seconds"])):
        for name, value in row.items():
            record.metric("cost", value, variant=f"{name}/{tokens}", seed=number)
            middle.setdefault(name, {}).setdefault(tokens, []).append(value)
    record.metric("seconds_dense", np.median(found["seconds"]["dense"]), variant=str(tokens))
middle = {name: [np.median(values) for values in row.values()] for name, row in middle.items()}
keep, longest = params.timing_keep[0], max(params.lengths)
names = {"search": "search, with dense attention", "scores": "cached search"} | {
    f"sparse/{kept_:g}": f"sparse, {kept_:g} kept" for kept_ in params.timing_keep
}
ideal = {f"sparse, {kept_:g} kept": timed[longest]["density"][f"{kept_:g}"] for kept_ in params.timing_keep}
fig, ax = plt.subplots(figsize=(8, 3.8))
figures.by_length(ax, list(timed), {title: middle[name] for name, title in names.items()}, ideal)
record.figure("lengths", fig, "Time of one head over that of torch's dense attention; dotted: the share of tiles kept.")

# %% [markdown]
# From there to a whole generation by Amdahl's law: HunyuanVideo's share of attention at that length, ten dense steps,
# two searches, 38 sparse steps, and everything else as it was. A prediction for this processor, not a measurement of
# HunyuanVideo.

# %%
PAPER_STEPS = (10, 30)
TRIPLE = 3 * (FULL - cost.HUNYUAN["text"]) + cost.HUNYUAN["text"]  # 24 seconds
predicted = {}
for tokens, found in timed.items():
    rows = [cost.speedup(cost.share(tokens), costs, PAPER_STEPS) for costs in evaluation.costs_at(found, keep)]
    predicted[tokens] = np.median(rows)
    for number, value in enumerate(rows):
        record.metric("speedup", value, variant=str(tokens), seed=number)
share, at_longest = cost.share(longest), evaluation.costs_at(timed[longest], keep)
for number, costs in enumerate(at_longest):
    record.metric("speedup", cost.speedup(share, costs, PAPER_STEPS, cached=False), variant="uncached", seed=number)
    record.metric("search_share", cost.search_share(share, costs, PAPER_STEPS), seed=number)
for number, costs in enumerate(evaluation.costs_at(timed[longest], min(params.timing_keep))):
    record.metric("speedup", cost.speedup(cost.share(TRIPLE), costs, (1, 30)), variant="24s", seed=number)
costs = {name: np.median([row[name] for row in at_longest]) for name in at_longest[0]}
sparse_steps = cost.STEPS - PAPER_STEPS[0]
parts = {
    "dense": {"other": 1 - share, "dense attention": share},
    "AdaSpa": {
        "other": 1 - share,
        "dense attention": share * PAPER_STEPS[0] / cost.STEPS,
        "searches": cost.search_share(share, costs, PAPER_STEPS),
        "sparse attention": share * sparse_steps * costs["sparse"] / cost.STEPS,
    },
}
fig, ax = plt.subplots(figsize=(8, 2.2))
record.figure(
    "phases",
    figures.phases(ax, parts).figure,
    f"Where the time of a generation goes at {longest:,} tokens, predicted from the costs measured here.",
)
for tokens, value in predicted.items():
    print(f"{tokens:9,} tokens: {value:.2f} times as fast")

# %% [markdown]
# ## 8. Verdicts

# %%
record.close()
