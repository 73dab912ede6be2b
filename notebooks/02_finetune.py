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
# # Fine-tune anybody's LightningModule, quantized
#
# You have a `LightningModule` that trains in floating point. One line makes it quantization-aware: its steps, its data,
# its optimizer and its checkpoints stay as they are. We train one on real handwritten digits, deploy it, save it and
# load it. Then we adapt it to new digits with low-rank adapters that are trained *inside* the quantizer, and are gone
# from what is deployed. All of it takes some seconds on two CPU cores, and downloads nothing.

# %%
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import qat
from qat.training import deploy, quantize

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|logging interval).*")
torch.set_num_threads(2)
L.seed_everything(0, verbose=False)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The stranger's module
#
# Nothing in it knows about quantization. It keeps its network in `self.net`, counts its accuracy, and has one optimizer
# under a one-cycle schedule.

# %%
class Classifier(L.LightningModule):
    def __init__(self, width: int = 24, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * width * 16, 10),
        )  # fmt: skip
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
test = torch.arange(len(images)) % 5 == 0
train = DataLoader(TensorDataset(images[~test], labels[~test]), 64, shuffle=True)
held_out = DataLoader(TensorDataset(images[test], labels[test]), 90)


def trainer(epochs):
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def accuracy(module, data=held_out):
    [scores] = trainer(1).validate(module, data, verbose=False)
    return scores["accuracy"]


module = Classifier()
trainer(6).fit(module, train, held_out)
print(f"float: {accuracy(module):.1%} of {int(test.sum())} held-out digits")

# %% [markdown]
# ## One line
#
# `quantize` returns the very object, with a mixin in front of its class. The layers are swapped when the trainer
# configures the model; activation ranges are set by running the module's own training step on a few batches, before
# Lightning's sanity check. Then it trains: here at 4-bit weights with learned scales, for two epochs at a third of the
# rate.

# %%
module = quantize(module, qat.Recipe.preset("w4a8", edges="same"))
module.hparams.lr = 1e-3
fit = trainer(2)
fit.fit(module, train, held_out)
print(f"4-bit weights, trained: {accuracy(module):.1%}")
print(qat.coverage(module.quantized_network))

# %% [markdown]
# The learned scales were in the list of parameters that the optimizer was given. They got a group of their own: no
# weight decay, and a tenth of the learning rate at every step of the one-cycle schedule.

# %%
for group in fit.optimizers[0].param_groups:
    names = ("role", "weight_decay", "max_lr")
    print(f"{len(group['params']):>2} parameters ", {name: group.get(name) for name in names})

# %% [markdown]
# ## Checkpoints are Lightning's
#
# They hold what was decided about each layer beside the weights. So `load_from_checkpoint`, `test(ckpt_path=...)` and
# resuming rebuild the quantized module; nobody has to remember the recipe.

# %%
fit.save_checkpoint(folder / "classifier.ckpt")
loaded = quantize(Classifier).load_from_checkpoint(folder / "classifier.ckpt", weights_only=True)
with torch.no_grad():
    print("reloaded logits equal bit for bit:", torch.equal(loaded.eval()(images[test]), module.eval()(images[test])))

# %% [markdown]
# ## Deploy
#
# `deploy` takes batches as the data loader gives them. It freezes the network into packed integers and proves that
# nothing changed. To load what was saved takes the float network only, and no Lightning.

# %%
deployed, certificate = deploy(module, held_out)
print(certificate)
qat.save(deployed, folder / "deployed")
served = qat.load(folder / "deployed", Classifier().net)
with torch.no_grad():
    print("logits equal bit for bit:", torch.equal(served(images[test]), module.eval()(images[test])))
float_bytes = sum(p.numel() * p.element_size() for p in Classifier().net.state_dict().values())
print(f"{float_bytes:,} bytes as float, {(folder / 'deployed' / 'model.safetensors').stat().st_size:,} deployed")

# %% [markdown]
# ## Adapt it to other data: low-rank adapters inside the quantizer
#
# Another camera: the digits are rotated by a quarter, and inverted. The model has never seen such.
# `adapters=` freezes every weight and adds to each layer a correction of low rank, `base + alpha / rank * up @ down`.
# What is put on the 4-bit grid is that sum. So the adapters are trained against the very codes that will be deployed;
# adapters that are merged into a quantized model *after* training move its weights to where no training has been.

# %%
rotated = 1 - torch.rot90(images, 1, (2, 3))
new_train = DataLoader(TensorDataset(rotated[~test], labels[~test]), 64, shuffle=True)
new_held_out = DataLoader(TensorDataset(rotated[test], labels[test]), 90)
print(f"before: {accuracy(module, new_held_out):.1%}")


def start():
    """The classifier that was trained above, as the float module that it was."""
    torch.manual_seed(0)
    again = Classifier(lr=1e-2)
    again.load_state_dict({name: value for name, value in module.state_dict().items() if name in again.state_dict()})
    return again


# names are those of the network: the norms and the last bias are trained as they are
adapters = {"rank": 4, "also_train": ("1.*", "4.*", "7.bias")}
adapted = quantize(start(), qat.Recipe.preset("w4a8", edges="same"), adapters=adapters)
trainer(6).fit(adapted, new_train, new_held_out)
trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
print(f"adapted: {accuracy(adapted, new_held_out):.1%}, training {trained:,} of "
      f"{sum(p.numel() for p in start().net.parameters()):,} parameters")

# %% [markdown]
# The frozen weights did not move. What training changed fits in a small file, `qat.adapter_state`, to be put on top of
# the same base again with `qat.load_adapter_state`.

# %%
print("base weights unchanged:", all(
    torch.equal(value, module.net.state_dict()[name])
    for name, value in adapted.net.state_dict().items() if name in ("0.weight", "3.weight", "7.weight")
))  # fmt: skip
state = qat.adapter_state(adapted.net)
print(f"{sum(t.numel() * t.element_size() for t in state.values()):,} bytes:", *list(state)[:6], "...")

# %% [markdown]
# `deploy` merges: the codes of `base + correction` are frozen as they were trained, bit for bit. No adapter is left.

# %%
deployed, certificate = deploy(adapted, new_held_out)
print(certificate)
print("tensors of adapters in the deployed model:", sum("adapter" in name for name in deployed.state_dict()))
with torch.no_grad():
    same = torch.equal(deployed(rotated[test]), adapted.eval()(rotated[test]))
    print("logits equal bit for bit:", same)
    right = (deployed(rotated[test]).argmax(1) == labels[test]).float().mean()
print(f"deployed: {right:.1%}")

# %% [markdown]
# The ordinary way is to train adapters in floating point, merge them, and quantize what comes out. The same adapters,
# data and number of steps, for comparison at 4 bits, at 2 and at 1:

# %%
def afterwards(recipe):
    """Adapters trained in floating point, merged; then quantized and calibrated."""
    other = start()
    qat.add_adapters(other.net, **adapters, inplace=True)
    trainer(6).fit(other, new_train, new_held_out)
    network = qat.prepare(qat.merge_adapters(other.net), recipe, rotated[:2])
    return qat.calibrate(network, [rotated[~test][:512]])


def inside(recipe):
    """Adapters trained inside the quantizer."""
    other = quantize(start(), recipe, adapters=adapters)
    trainer(6).fit(other, new_train, new_held_out)
    return deploy(other, new_held_out)[0]


for name in ("w4a8", "w2a8", "w1a8"):
    recipe, found = qat.Recipe.preset(name, edges="same"), []
    for network in (afterwards(recipe), inside(recipe)):
        with torch.no_grad():
            found.append((network.eval()(rotated[test]).argmax(1) == labels[test]).float().mean())
    print(f"{name}: adapters, then quantized {found[0]:.1%}; adapters inside the quantizer {found[1]:.1%}")
