# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sentence embeddings
#
# The example `sentence_embeddings.py` step by step: MiniLM in int8, and with a part of it cut and recovered by
# distillation. At size `tiny` it runs in a minute and learns nothing; `full` takes MiniLM and its real weights.

# %%
import sys

sys.path.insert(0, "..")

from sentence_embeddings import Batches, embeddings, fidelity, sentences
from texts import encoder

import graphopt

size = "tiny"

# %%
module, tokenizer = encoder("AutoModel", None, size)
number = 512 if size == "full" else 16
train = Batches(tokenizer, sentences(number, seed=1), 8)
dev = Batches(tokenizer, sentences(number // 2, seed=0), 8)
exact = embeddings(module, dev)

# %% [markdown]
# ## int8 alone
#
# Static quantization takes the ranges of activations from the batches of `calibration=`.

# %%
int8 = graphopt.optimize(module, "quantize{scheme=static}", calibration=train, calibration_steps=8, verbose=False)
int8

# %%
fidelity(exact, embeddings(int8, dev))

# %% [markdown]
# The graph before and after:

# %%
int8.diff()

# %% [markdown]
# ## Cut and recovered
#
# Half of the neurons and a quarter of the heads go. The student keeps the module paths of its teacher, so their blocks
# are compared without a word about which belong together (`hidden=1`).

# %%
steps = "epochs=2" if size == "full" else "steps=1"
cut = graphopt.optimize(
    module,
    f"prune{{neurons=0.5 heads=0.25}},distill{{{steps} lr=2e-4 hidden=1}},quantize{{scheme=static}}",
    training=train,
    calibration=train,
    calibration_steps=8,
    verbose=False,
)
cut

# %%
fidelity(exact, embeddings(cut, dev))
