# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design
#
# **A stub, not yet a re-measurement.** What follows runs from top to bottom with a placeholder in place of the paper's
# method: a sparse signal under noise, with and without soft thresholding. Replace it section by section.
#
# *The idea in one paragraph:* which problem, what is new, and what a reader should remember.

# %% tags=["parameters"]
# None: the value of the profile, from params.yaml
profile = "smoke"
seeds = None
dataset = None
length = None
nonzeros = None
noise = None

# %%
import matplotlib.pyplot as plt

from common import params
from common.record import Record
from common.seeds import generator
from papers.bdwp import method
from papers.bdwp.settings import Params

given = {name: globals()[name] for name in Params.__dataclass_fields__}
p = params.load(Params, "bdwp", profile, given)
record = Record.open("bdwp", profile, p)

# %% [markdown]
# ## The data
#
# Where it comes from, its shape and units. Real data is registered in `common/data/registry.yaml`.


# %%
def signal_and_measurement(seed):
    """A signal with `p.nonzeros` entries of size 1 among `p.length`, and the same under noise; both [length]."""
    signal = method.sparse_signal(p.length, p.nonzeros, generator(seed, "signal"))
    return signal, method.disturb(signal, p.noise, generator(seed, "noise"))


# %% [markdown]
# ## The method
#
# Equation by equation, with the paper's symbols; the code is in `method.py`.


# %%
def errors(seed):
    """Root mean square error of the measurement itself and of the method's estimate."""
    signal, measured = signal_and_measurement(seed)
    estimate = method.soft_threshold(measured, 2 * p.noise)
    return {name: (x - signal).square().mean().sqrt().item() for name, x in [("raw", measured), ("method", estimate)]}


# %% [markdown]
# ## The measurement
#
# Compared arms share their seeds. `record.cell` keeps finished work, so that a killed run goes on where it stopped.

# %%
for seed in p.seeds:
    for variant, value in record.cell(f"errors-seed{seed}", lambda seed=seed: errors(seed)).items():
        record.metric("rmse", value, variant=variant, seed=seed)

# %%
signal, measured = signal_and_measurement(p.seeds[0])
fig, axes = plt.subplots(figsize=(7, 2.5))
axes.plot(measured, color="0.7", label="measured")
axes.plot(method.soft_threshold(measured, 2 * p.noise), label="estimate")
axes.set(xlabel="sample", ylabel="value")
axes.legend()
record.figure("signal", fig, "A placeholder: a sparse signal under noise, and its estimate by soft thresholding.")

# %% [markdown]
# ## What it says
#
# One paragraph a reader can quote, with the limits of the evidence. The verdicts follow from `claims.yaml`.

# %%
record.close()
