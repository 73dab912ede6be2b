"""Exported int8 in onnxruntime against what onnxruntime's own quantizer makes of the same float model.

    python benchmarks/exported.py                 # everything
    python benchmarks/exported.py digits block

Both get the same calibration data, neither is trained after quantizing. Medians of alternating calls in one process;
accuracy on the images that calibration did not see. Targets: at least as fast, and at least as accurate.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from harness import alternate, machine, own_int8, session_options, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qat
from qat import targets
from qat.training.models import ResidualNet

logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor | None]:
    """A network trained on half of the digits; calibration images, test images and their labels."""
    data = load_digits()
    x, y = torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    model = ResidualNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(400):
        batch = train[torch.randint(len(train), (128,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval(), x[train][:256], x[test], y[test]


def block() -> tuple[nn.Module, Tensor, Tensor, None]:
    """Three convolutions with batch norm and ReLU, 64 channels."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    x = torch.randn(16, 64, 28, 28)
    return nn.Sequential(*layers).eval(), x, x, None


def mlp() -> tuple[nn.Module, Tensor, Tensor, None]:
    """Linear layers with ReLU."""
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10))
    x = torch.randn(64, 512)
    return model.eval(), x, x, None


def encoder() -> tuple[nn.Module, Tensor, Tensor, None]:
    """Two layers of a transformer encoder."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, activation="relu")
    x = torch.randn(8, 64, 128)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), x, x, None


MODELS = {"digits": digits, "block": block, "mlp": mlp, "encoder": encoder}


def exported(model: nn.Module, calibration: Tensor, folder: Path) -> tuple[Any, Counter[str], nn.Module]:
    """A session on our file, the operators of its optimized graph, and the deployed model."""
    recipe = targets.default_recipe("onnxruntime")
    prepared = qat.calibrate(qat.prepare(model, recipe, calibration[:2]).eval(), [calibration])
    deployed, _ = qat.convert(prepared, [calibration])
    path = folder / "qat.onnx"
    qat.export(deployed, path, format="onnx", example_inputs=calibration[:2], target="onnxruntime")
    options = session_options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node), deployed


def main(names: list[str]) -> None:
    print(machine())
    for name in names or MODELS:
        torch.manual_seed(0)
        model, calibration, x, labels = MODELS[name]()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            session, operators, deployed = exported(model, calibration, Path(folder))
            ours, theirs = {session.get_inputs()[0].name: x.numpy()}, own_int8(model, calibration, x)
            assert theirs is not None
            times = alternate({"ours": lambda s=session, feed=ours: s.run(None, feed), "its own": theirs,
                               "float32 torch": lambda m=model, x=x: m(x)}, rounds=200, budget=15.0)
            wanted = model(x)
            results = {"float32 torch": wanted, "ours": torch.from_numpy(session.run(None, ours)[0]),
                       "its own": torch.from_numpy(theirs()[0])}
            same = torch.equal(results["ours"], deployed(x))
        rows = []
        for variant, seconds in times.items():
            error = float((results[variant] - wanted).norm() / wanted.norm())
            right = "" if labels is None else f"{float((results[variant].argmax(-1) == labels).float().mean()):.2%}"
            rows.append([variant, f"{seconds * 1e3:.3f}", f"{times['its own'] / seconds:.2f}", f"{error:.4f}", right])
        table(f"{name} (our file equals the deployed model: {'yes' if same else 'no'}; "
              f"{', '.join(f'{n} {k}' for k, n in operators.most_common(6))})",
              ["variant", "ms", "x of its own", "relative error", "accuracy"], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
