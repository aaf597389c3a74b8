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
# # Text classification with BERT
#
# The example `text_classification.py` step by step: fine-tune, prune, distil, quantize, bundle, ask. At size `tiny`
# it runs in a minute and learns nothing; `full` takes MiniLM and its real weights.

# %%
import sys
from pathlib import Path

sys.path.insert(0, "..")

from text_classification import Batches, accuracy, templates
from texts import encoder

import graphopt
from graphopt.serving import Predictor

size = "tiny"
out = Path("out")

# %% [markdown]
# ## Texts and classes
#
# Sentences from templates; `text_classification.table("my.csv", "review", "kind")` reads your own.

# %%
rows = templates()
rows = rows[::2] if size == "full" else rows[::20]
classes = sorted({kind for _, kind in rows})
module, tokenizer = encoder(
    "AutoModelForSequenceClassification", None, size, id2label=dict(enumerate(classes)), label2id=None
)
dev, train = Batches(tokenizer, rows[::5], classes, 8), Batches(tokenizer, rows[1::5] + rows[2::5], classes, 8)
rows[:3]

# %% [markdown]
# ## Fine-tune
#
# `finetune` is a pass: it learns from the labels in the batches, and keeps the best weights by `evaluate=`.


# %%
def score(model):
    return accuracy(model, dev)


steps = "epochs=3" if size == "full" else "steps=1"
tuned = graphopt.optimize(
    module, f"finetune{{{steps} lr=1e-4}}", training=train, evaluate=score, measure=False, verbose=False
)
tuned

# %% [markdown]
# ## Compress
#
# Half of the neurons go, distillation from the model as it was brings the accuracy back, and what remains becomes int8.
# The report says what each pass did, and why a site stayed as it was.

# %%
small = graphopt.optimize(
    tuned,
    f"prune{{neurons=0.5 heads=0.25}},distill{{{steps} lr=1e-4}},quantize{{scheme=static}}",
    training=train,
    calibration=train,
    evaluate=score,
    verbose=False,
)
small

# %%
score(tuned), score(small)

# %% [markdown]
# ## Bundle and ask
#
# A bundle holds the model, the tokenizer and golden inputs, and checks itself when it is loaded. `graphopt serve
# out/bundle` answers over HTTP.

# %%
module.load_state_dict(tuned.state_dict())
module.save_pretrained(out / "checkpoint")
tokenizer.save_pretrained(out / "checkpoint")
predictor = Predictor(small.bundle(out / "bundle", tokenizer=out / "checkpoint"))
predictor.predict("To me the film was simply wonderful.")
