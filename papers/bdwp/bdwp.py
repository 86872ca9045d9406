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
# # BDWP: N:M sparse training in both directions
#
# *Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design*, Fang, Sun, Zhou and Wang,
# 2023, [arXiv 2309.13015](https://arxiv.org/abs/2309.13015).
#
# A training step multiplies three times with a layer's weight or its gradient. SR-STE makes the weight N:M and saves in
# the first product only. This paper makes the second one N:M as well, with a second view of the same weight, and builds
# an accelerator for it. The notebook tells how, and measures what can be measured without the FPGA:
#
# 1. the idea: why one N:M weight does not serve both directions;
# 2. six equations, and that our layers follow them;
# 3. the exact count of the work;
# 4. the relatives: Bi-Mask, and masks that are N:M both ways;
# 5. the experiment: all of them on images, several seeds;
# 6. how wrong the cheap gradients are;
# 7. how long our kernels take;
# 8. the verdicts.
#
# The method is in `method.py` (one sitting), the arms in `experiment.py`, the comparison of gradients in `fidelity.py`,
# the timed products in `timing.py`.

# %% tags=["parameters"]
profile = "smoke"  # smoke, laptop or paper: see params.yaml. None below means: what the profile says
seeds = None
dataset = None
data_dir = None
size = None
augment = None
networks = None
other_arms = None
depth = None
width = None
patch = None
vit_width = None
vit_depth = None
vit_heads = None
arms = None
pattern = None
epochs = None
steps = None
vit_epochs = None
warmup = None
batch = None
learning_rate = None
momentum = None
weight_decay = None
decay = None
vit_learning_rate = None
vit_decay = None
device = None
workers = None
loaders = None
counted = None
layers = None
timed = None
repeats = None

# %%
import dataclasses
from functools import partial

import matplotlib.pyplot as plt
import torch

from common import params as parameters
from common import plots
from common import seeds as random_states
from common.record import Record
from common.sparsity import Passes
from kernels import nm
from papers.bdwp import data, experiment, fidelity, figures, method, timing
from papers.bdwp.settings import Params, parse, parse_layer

given = {field.name: globals()[field.name] for field in dataclasses.fields(Params)}
params = parameters.load(Params, "bdwp", profile, given)
record = Record.open("bdwp", profile, params)
plots.style()
n, m = parse(params.pattern)
params

# %% [markdown]
# ## 1. The idea
#
# A weight $W$ of $O\times I$ numbers is multiplied with the input in the forward pass, $y=Wx$: for each output a sum
# over the $I$ inputs. In the backward pass it is multiplied with the gradient of the output, $dx=W^\top dy$: for each
# input a sum over the $O$ outputs. A multiplier that fetches $N$ of every $M$ numbers *of a sum* needs its groups along
# $I$ for the first and along $O$ for the second product.

# %%
weight = torch.randn(16, 16, generator=random_states.generator(0, "idea"))
seen = method.views(weight, n, m)
one_mask = nm.mask(weight, n, m, transposable=True)
shown = {"dense W": weight, "forward W_FF": seen.forward, "backward W_BP": seen.backward}
shown["transposable"] = weight * one_mask
for name, kept in (("forward", seen.kept), ("backward", seen.back), ("transposable", one_mask)):
    along = [method.illegal_groups(kept, n, m, dim=dim) for dim in (1, 0)]
    print(f"{name:13s} groups with more than {n} of {m}: {along[0]:4.0%} along the inputs, {along[1]:4.0%} the outputs")

# %%
fig = plots.image_grid(
    [list(shown.values())], col_labels=list(shown), cmap="RdBu_r", vmin=-2.5, vmax=2.5, colorbar_label="weight"
)
record.figure(
    "views",
    fig,
    f"A weight of 16 x 16 (rows: outputs) and what {params.pattern} leaves of it: in every row of eight two, in every "
    "column of eight two, or both at once, which keeps less of the large ones.",
)

# %% [markdown]
# A weight that is 2:8 along one axis breaks the pattern along the other in a third of its groups. There are three ways
# out: two views (this paper), a backward view inside the forward one (Bi-Mask), or one mask for both (transposable).
#
# ## 2. Six equations
#
# $$W_{FF}=E_F(W)\odot W,\qquad W_{BP}=E_B(W)\odot W \tag{1}$$
# $$y=W_{FF}\,x \tag{2}$$
# $$dx=W_{BP}^\top\,dy \tag{3}$$
# $$dW=dy\,x^\top \tag{4}$$
# $$W\leftarrow W-\gamma\,\big(dW+\lambda_W(1-E_F)\odot W\big) \tag{5}$$
# $$\text{cost}=(f+b+w)/3 \tag{7}$$
#
# and (6): both views of the next step are made right after the update, while the new weight is at hand. Note what (3)
# is *not*: the gradient of (2), which would be $W_{FF}^\top dy$. The network that is run and the network that hands the
# errors back are two thinnings of one dense weight. Do our layers do this? Ten steps of a perceptron, both ways:

# %%
expected = experiment.ten_steps_written_out(0.3)
for name in ("bdwp", "sr_ste"):
    distance = (experiment.ten_steps(name, 0.3) - expected).abs().max()
    record.metric("distance", distance, variant=name)
    print(f"{name:7s} {distance:.1e} from the equations")

# %% [markdown]
# ## 3. What it saves
#
# Equation (7) for a density $\rho=N/M$: one direction costs $(\rho+2)/3$ of a dense step, two cost $(2\rho+1)/3$. The
# first can never go below two thirds. Layers that cannot be grouped stay dense, so whole networks save a little less:
# counted here pass by pass with hooks, for one image, without computing anything.

# %%
images = {name: record.cell(f"images-{name}", partial(data.load, params, name)) for name in params.networks}
for loaded in images.values():
    record.data(loaded.name, sha256=loaded.provenance())
first = images[params.networks[0]]
work = {
    name: record.cell(f"work-{name}", partial(experiment.count, params, name, images.get(name, first)))
    for name in experiment.counted_networks(params)
}
print(f"{'training, share of dense':24s}", *(f"{arm:>12s}" for arm in work[params.networks[0]]))
for name, rows in work.items():
    for arm, found in rows.items():
        recipe, arm_pattern = arm.split("/")
        gap = abs(found.layers_share - method.cost(recipe, *parse(arm_pattern)))
        record.metric("mac_share", found.share, variant=f"{name}/{arm}")
        record.metric("mac_gap", gap, variant=f"{name}/{arm}")
    dense_work = next(iter(rows.values())).whole_dense.total
    record.metric("dense_gigamacs", dense_work / 1e9, variant=name)
    print(f"{name:13s} {dense_work / 1e9:6.2f} GMAC", *(f"{found.share:12.4f}" for found in rows.values()))

# %%
bars = {"dense": Passes(1 / 3, 1 / 3, 1 / 3)}
for arm, found in work["resnet50"].items():
    total = found.whole_dense.total
    recipe, arm_pattern = arm.split("/")
    bars[f"{figures.LABELS[recipe]}\n{arm_pattern}"] = Passes(
        found.whole.forward / total, found.whole.input_gradient / total, found.whole.weight_gradient / total
    )
fig, ax = plt.subplots(figsize=(8, 4))
figures.work(ax, bars)
record.figure(
    "work",
    fig,
    "Multiply-accumulates of one training step of ResNet-50 by pass, dense first and last layers included. The second "
    "direction is what brings 2:8 to one half; the weight gradient stays dense in all of them.",
)

# %% [markdown]
# ## 4. The relatives
#
# **Bi-Mask** takes the forward mask and thins it further, so that the rest is N:M along the outputs. Much would be lost
# where large weights share a column of eight, so it looks for an order of the output channels in which they do not.
#
# **Transposable masks** are N:M along both axes at once. Forward and backward pass then use the same weight, and the
# gradient is exact, but the choice is tight. The best such mask of a tile is a minimum-cost flow. The released code
# looks for it in tiles that are runs of $M^2$ neighbours of the *flattened* weight, whose columns never run along the
# outputs. What that misses:

# %%
weight = torch.randn(256, 256, generator=random_states.generator(0, "tiles"))
tiles = {"released": method.released_transposable(weight, 2, 4), "true": nm.mask(weight, 2, 4, transposable=True)}
for name, kept in tiles.items():
    share = method.illegal_groups(kept, 2, 4, dim=0)
    record.metric("tiles_illegal", share, variant=name)
    print(f"{name:9s} {share:.1%} of the groups along the outputs hold more than two of four")

# %% [markdown]
# ## 5. The experiment
#
# Every arm is trained with every seed. Arms of one seed start from the same weights and see the same images in the same
# order, so differences are paired. Finished trainings are kept: after an interruption this notebook goes on where it
# stopped.

# %%
arm_of = experiment.arms(params)
for network, loaded in images.items():
    own = [name for name, arm in arm_of.items() if arm.network == network]
    steps_each = experiment.steps_of(params, arm_of[own[0]], loaded)
    print(f"{network} on {loaded.name}: {len(loaded)} images, {len(own)} arms, {steps_each} steps: {', '.join(own)}")

# %%
bar = {"progress": record.progress} if params.workers == 1 else {}
weights_of = {"dense": "dense", "bdwp": f"bdwp/{params.pattern}"}  # whose weights section 6 looks at
jobs = {
    f"{name}-seed{seed}": partial(
        experiment.fit, params, arm, images[arm.network], seed, keep=name in weights_of.values(), **bar
    )
    for seed in params.seeds
    for name, arm in arm_of.items()
}
done = record.cells(jobs, "trainings", workers=params.workers or None)
results = {name: [done[f"{name}-seed{seed}"] for seed in params.seeds] for name in arm_of}

# %%
for name, rows in results.items():
    for seed, found in zip(params.seeds, rows, strict=True):
        record.metric("top1", found["top1"], variant=name, seed=seed)
        record.metric("training_seconds", found["seconds"], variant=name, seed=seed)
        record.curve("loss", *zip(*found["loss"], strict=True), variant=name, seed=seed)
        for direction, share in found["illegal"].items():
            record.metric("illegal", share, variant=f"{name}/{direction}", seed=seed)
top1 = {name: [found["top1"] for found in rows] for name, rows in results.items()}
for name, row in top1.items():
    print(f"{name:22s} top-1 {sum(row) / len(row):6.2f} % ({min(row):.2f} to {max(row):.2f})")
for name in (f"sr_ste/{params.pattern}", f"bdwp/{params.pattern}"):
    broken = [found["illegal"]["backward"] for found in results[name]]
    print(f"{name}: {sum(broken) / len(broken):.0%} of the groups cannot be used by the input gradient")

# %% [markdown]
# ### Accuracy against the cost of training

# %%
main = {name: row for name, row in top1.items() if arm_of[name].network == params.networks[0]}
costs = {name: method.cost(arm_of[name].recipe, *parse(arm_of[name].pattern)) for name in main}
fig, ax = plt.subplots(figsize=(7.5, 4.5))
figures.accuracy(ax, main, costs)
record.figure(
    "accuracy",
    fig,
    "Top-1 against the multiply-accumulates of training by equation (7); bars are 95 % intervals of the mean over "
    "seeds. Arms of one cost are set side by side.",
)

# %% [markdown]
# The bars show each arm's own spread. Claims compare *paired* differences, whose spread is smaller: what a seed does to
# one arm it does in part to the other.

# %%
pairs = {}
for prefix in ("", *(f"{network}/" for network in params.networks[1:])):
    for one, other in (
        (f"sr_ste/{params.pattern}", "dense"),
        (f"bdwp/{params.pattern}", "dense"),
        (f"bdwp/{params.pattern}", f"sr_ste/{params.pattern}"),
        (f"bdwp/{params.pattern}", f"bdwp_ste/{params.pattern}"),
        (f"bdwp/{params.pattern}", f"bi_mask/{params.pattern}"),
        (f"bdwp/{params.pattern}", f"transposable/{params.pattern}"),
        (f"bi_mask/{params.pattern}", f"transposable/{params.pattern}"),
        ("bdwp/2:4", "transposable/2:4"),
    ):
        if prefix + one in top1 and prefix + other in top1:
            both = zip(top1[prefix + one], top1[prefix + other], strict=True)
            pairs[f"{prefix}{one} - {other}"] = [a - b for a, b in both]
fig, ax = plt.subplots(figsize=(8, 0.42 * len(pairs) + 0.8))
figures.differences(ax, pairs)
record.figure(
    "differences", fig, "Paired differences in top-1: a dot a seed, beside them the 95 % interval of the mean."
)

# %% [markdown]
# ## 6. How wrong are the cheap gradients?
#
# Three recipes on the same weights, without training: those of the dense arm and those of BDWP's own. First each layer
# alone. Its output's gradient is handed on by the backward view, and compared with what the dense weight would hand on,
# and with what the forward view would: the exact gradient of the network that is run. Then the whole network, where the
# errors of the layers above reach the weight gradients of those below.

# %%
looked = {
    f"{origin}-seed{seed}": partial(fidelity.compare, params, first, found["state"])
    for origin, name in weights_of.items()
    for seed, found in zip(params.seeds, results[name], strict=True)
}
compared = {key: record.cell(f"fidelity-{key}", job) for key, job in looked.items()}
names = {"energy": "energy", "dense": "cosine_dense", "own": "cosine_own", "network": "cosine_network"}
print(f"{'weights of':10s} {'recipe':13s} |W_back|^2   to dense   to its own   whole network")
for origin in weights_of:
    for recipe in fidelity.COMPARED:
        rows = [compared[f"{origin}-seed{seed}"][recipe] for seed in params.seeds]
        for seed, found in zip(params.seeds, rows, strict=True):
            for field, metric in names.items():
                record.metric(metric, getattr(found, field), variant=f"{origin}/{recipe}", seed=seed)
        means = [sum(getattr(found, field) for found in rows) / len(rows) for field in names]
        print(f"{origin:10s} {recipe:13s}", *(f"{value:11.3f}" for value in means))

# %%
fig, axes = plt.subplots(1, len(weights_of), figsize=(10, 3.6), sharey=True)
for ax, origin in zip(axes, weights_of, strict=True):
    drawn = {}
    for recipe in fidelity.COMPARED:
        table = [compared[f"{origin}-seed{seed}"][recipe].by_layer for seed in params.seeds]
        drawn[figures.LABELS[recipe]] = (range(1, len(table[0]) + 1), table)
    plots.curves(ax, drawn)
    ax.set(xlabel="sparse layer, from the input", title=f"weights trained: {origin}")
axes[0].set_ylabel("cosine with the exact gradient")
record.figure(
    "fidelity",
    fig,
    "Weight gradients against those of the same forward pass with an exact backward pass. The last layer's is exact; "
    "each layer passed on the way down adds its error, unless one mask serves both directions.",
)

# %% [markdown]
# BDWP's view is the best that is N:M along the outputs *for the dense weight*. Bi-Mask's keeps less of that, but what
# it keeps is part of the network that is run.
#
# ## 7. How long our kernels take
#
# The paper's times are those of an accelerator of its own, which we do not have. What we do have are packed products
# for a CPU. BDWP's point shows in how the input gradient is called: packed along the outputs and transposed, it is a
# forward-type product, `linear(dy, pack(W_BP^T))`. The alternative is to scatter with the weight that was packed for
# the forward pass. Dense products, packed ones and steps take turns in this process, on one thread, in single
# precision. The last two bars are whole steps of one layer, without and with the generation of both views.

# %%
times = {layer: timing.seconds(layer, params.timed, params.repeats) for layer in params.layers}
for layer, rows in times.items():
    for name, values in rows.items():
        for repeat, value in enumerate(values):
            record.metric("kernel_seconds", value, variant=f"{layer}/{name}", seed=repeat)
    for name, values in rows.items():
        print(f"{layer:10s} {name:22s} {sorted(values)[len(values) // 2] * 1000:8.2f} ms")

# %%
against = {
    "forward": ("forward", "forward"),
    "input gradient\nby W_BP": ("input", "input"),
    "input gradient\nby W_FF": ("input", "scattered"),
    "step": ("step", "step"),
    "step with\ngeneration": ("step", "step_generated"),
}
fig, axes = plt.subplots(len(params.layers), 1, figsize=(8, 3.2 * len(params.layers)), squeeze=False)
for ax, (layer, rows) in zip(axes[:, 0], times.items(), strict=True):
    ratios, ideal = {}, {}
    for timed_pattern in params.timed:
        density = parse(timed_pattern)[0] / parse(timed_pattern)[1]
        ratios[timed_pattern] = {
            label: [a / b for a, b in zip(rows[f"dense/{dense}"], rows[f"{timed_pattern}/{ours}"], strict=True)]
            for label, (dense, ours) in against.items()
        }
        ideal[timed_pattern] = [1 / density] * 3 + [1 / method.cost("bdwp", *parse(timed_pattern))] * 2
    figures.times(ax, ratios, ideal)
    channels, tokens = parse_layer(layer)
    ax.set_title(f"{channels} x {channels} weights, {tokens} tokens")
record.figure(
    "times",
    fig,
    "Dense time over ours for the passes of one layer on one CPU core, 95 % intervals over repeats; dotted lines are "
    "what the count of multiply-accumulates promises.",
)

# %% [markdown]
# ## 8. Verdicts
#
# Each claim, judged. *Not tested* names what a claim would need; *refuted* is a result. Remember the scale: at `laptop`
# a network of 75 thousand weights has seen twelve thousand small photographs four times, and what half of a large
# network's weights can do without, a small one may need.

# %%
record.close()
