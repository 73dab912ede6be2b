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
# # Quantize a model, step by step
#
# We train a small convolutional network on real handwritten digits, make every layer compute on 8-bit integers, train a
# little more, freeze it, and check that the frozen model gives *exactly* the same outputs as the one that was trained.
# Then the same at 4 bits and at 1. All of it takes some seconds on two CPU cores, and downloads nothing.

# %%
import copy
import tempfile
from pathlib import Path

import torch
from IPython.display import HTML
from sklearn.datasets import load_digits
from torch import nn

import qat
from qat.reporting.html import line_chart

torch.manual_seed(0)
torch.set_num_threads(2)

# %% [markdown]
# ## The data
#
# scikit-learn brings 1,797 digits of 8 x 8 pixels along. Every fifth one is for testing.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
test = torch.arange(len(images)) % 5 == 0
train_x, train_y, test_x, test_y = images[~test], labels[~test], images[test], labels[test]
print(tuple(train_x.shape), tuple(test_x.shape))

# %% [markdown]
# ## A float model
#
# An ordinary network: nothing in it knows about quantization.

# %%
def block(inputs, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


model = nn.Sequential(
    block(1, 32, 1), block(32, 64, 2), block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
)


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def train(model, epochs, learning_rate):
    """Cross-entropy and AdamW; the losses of all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    losses = []
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(train_x)).split(64):
            loss = nn.functional.cross_entropy(model(train_x[index]), train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


float_losses = train(model, epochs=8, learning_rate=3e-3)
print(f"float: {accuracy(model):.1%} of {len(test_x)} test digits")

# %% [markdown]
# ## Prepare
#
# `prepare` returns a copy in which each layer has been swapped for one that computes on integers, in training as in
# deployment. The example input lets it see what feeds what: batch norms are folded into the convolution in front of
# them, and ReLUs are absorbed by the quantizer behind them.
#
# `coverage` accounts for every parameter and every matrix product: quantized, or kept in floating point, and why.

# %%
calibration = list(train_x[:512].split(128))
prepared = qat.prepare(model, "w8a8", example_inputs=test_x[:1])
print(qat.coverage(prepared))

# %% [markdown]
# ## Calibrate
#
# Static activation ranges come from data. That alone is post-training quantization.

# %%
qat.calibrate(prepared, calibration)
print(f"8 bits, calibrated: {accuracy(prepared):.1%}")

# %% [markdown]
# ## Train with integers
#
# The training loop is the one from above. The forward pass computes with integers; gradients go straight through the
# rounding to the float master weights.

# %%
losses_8 = train(prepared, epochs=2, learning_rate=1e-4)
print(f"8 bits, trained: {accuracy(prepared):.1%}")

# %% [markdown]
# ## Convert: freeze, and prove it
#
# `convert` puts packed integer codes in the place of the float weights. The certificate compares codes and outputs of
# the two models on the data that it is given; `convert` raises `ParityError` if anything differs.

# %%
deployed, certificate = qat.convert(prepared, [test_x])
print(certificate)
with torch.no_grad():
    print("logits equal bit for bit:", torch.equal(prepared.eval()(test_x), deployed(test_x)))
{name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in deployed[1].named_buffers() if "weight" in name}

# %% [markdown]
# ## Save and load
#
# A deployed checkpoint is a safetensors file and a JSON manifest: the recipe, the coverage, the certificate and a
# checksum. Loading executes nothing from it; it needs only the architecture.

# %%
def size_on_disk(deployed):
    """Bytes of the weights file; the loaded model must give the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        qat.save(deployed, Path(folder) / "out")
        loaded = qat.load(Path(folder) / "out", copy.deepcopy(model))
        with torch.no_grad():
            assert torch.equal(loaded(test_x), deployed(test_x))
        return (Path(folder) / "out" / "model.safetensors").stat().st_size


float_bytes = sum(p.numel() * p.element_size() for p in model.state_dict().values())
print(f"float: {float_bytes:,} bytes; 8 bits: {size_on_disk(deployed):,}")

# %% [markdown]
# ## Four bits, and one
#
# Another preset is another word. `w4a4` learns its scales (LSQ); `w1a8` keeps nothing of a weight but its sign. Both
# run the first and the last layer at 8 bits; `edges="same"` would make no exception for them. Four bits are no trouble
# for so easy a task. With one bit, calibration alone breaks the model, and training mends it.

# %%
deployed_models, losses = {"float": model, "w8a8": deployed}, {"w8a8": losses_8}
for name in ("w4a4", "w1a8"):
    prepared = qat.prepare(model, qat.Recipe.preset(name), example_inputs=test_x[:1])
    qat.calibrate(prepared, calibration)
    before = accuracy(prepared)
    losses[name] = train(prepared, epochs=8, learning_rate=1e-3)
    deployed_models[name], certificate = qat.convert(prepared, [test_x])
    print(f"{name}: calibrated {before:.1%}, trained and deployed {accuracy(deployed_models[name]):.1%}; {certificate}")

# %% [markdown]
# The weights of a layer really are -1 and +1 times a scale for each channel, and the checkpoint stores eight of them in
# a byte.

# %%
layer = deployed_models["w1a8"][1][0]
print("levels:", layer.quantized_weight().codes.unique().tolist())
print(f"{layer.quantized_weight().codes.numel():,} weights in {layer.weight_codes.numel():,} bytes")

# %% [markdown]
# ## What it cost
#
# The loss of each quantized training step, averaged over 10 steps; then accuracies and sizes side by side.

# %%
def smooth(losses, width=10):
    return [(step, sum(losses[step - width : step]) / width) for step in range(width, len(losses) + 1)]


chart = line_chart({name: smooth(values) for name, values in losses.items()})
HTML(f"<div style='--line: #dfe5ec; --soft: #66758a; max-width: 30rem; font: 11px sans-serif'>{chart}</div>")

# %%
for name, network in deployed_models.items():
    size = float_bytes if name == "float" else size_on_disk(network)
    print(f"{name:<6}{accuracy(network):>7.1%}{size:>10,} bytes{size / float_bytes:>7.2f}x")

# %% [markdown]
# From here: `python train.py` does all of this from the command line with checkpoints, logs, a float control and a
# report; the README shows how to bring your own data and model.
