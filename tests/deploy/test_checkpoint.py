"""Checkpoints: same bytes, nothing executed, nothing harmed, and every kind of damage refused before it does any."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

import qat
from qat.errors import CheckpointError

TENSORS, MANIFEST = "model.safetensors", "manifest.json"


def deployed(model: str = "conv", recipe: Any = "w8a8") -> nn.Module:
    torch.manual_seed(0)
    x = zoo.inputs(model, 4)
    return qat.convert(zoo.prepared(zoo.build(model), recipe, [x]), [x])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of the MLP with ternary weights and an affine input."""
    path = tmp_path / "out"
    qat.save(deployed("mlp", zoo.every_layer("ternary", "uint8")), path)
    return path


def skeleton() -> nn.Module:
    return zoo.build("mlp")


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------ the good way


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8_dynamic", "w4a16", "w4a4", "w1a8", "fp16", "mixed_w8a8_bf16"])
@pytest.mark.parametrize("model", zoo.ZOO)
def test_round_trip(tmp_path: Path, model: str, recipe: str) -> None:
    before = deployed(model, recipe)
    x = zoo.inputs(model, 5)
    qat.save(before, tmp_path / "out")
    fresh = zoo.build(model)
    kept = {k: v.clone() for k, v in fresh.state_dict().items()}
    after = qat.load(tmp_path / "out", fresh)
    assert torch.equal(after(x), before(x))
    assert not any(p.requires_grad for p in after.parameters())
    assert str(qat.coverage(after)) == str(qat.coverage(before))
    assert all(torch.equal(v, kept[k]) for k, v in fresh.state_dict().items()), "the skeleton was changed"
    qat.save(after, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_chained_models_and_narrow_models(tmp_path: Path) -> None:
    for i, (recipe, dtype) in enumerate([(zoo.every_layer(output="int8"), torch.float32), ("w8a8", torch.bfloat16)]):
        x = zoo.inputs("conv", 3, dtype)
        model = qat.convert(zoo.prepared(zoo.build("conv", dtype), recipe, [x]), [x])[0]
        qat.save(model, tmp_path / str(i))
        assert torch.equal(qat.load(tmp_path / str(i), zoo.build("conv", dtype))(x), model(x))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        qat.save(deployed(), tmp_path / name / "deep")
    first, second = tree(tmp_path / "a" / "deep"), tree(tmp_path / "b" / "deep")
    assert set(first) == {TENSORS, MANIFEST}
    assert first == second
    assert str(tmp_path).encode() not in first[MANIFEST]


def test_the_manifest_holds_what_it_promises(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    data = (folder / TENSORS).read_bytes()
    assert manifest["files"] == {TENSORS: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert manifest["certificate"]["equal"] is True
    assert manifest["certificate"]["layers"]
    assert manifest["recipe"]["rules"]
    assert manifest["coverage"]["rows"]
    for name, value in load_file(folder / TENSORS).items():
        assert manifest["tensors"][name]["shape"] == list(value.shape)


def test_the_file_is_smaller_than_the_float_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    x = torch.randn(2, 256)
    qat.save(qat.convert(zoo.prepared(model, zoo.every_layer("int4"), [x]), [x])[0], tmp_path / "out")
    assert (tmp_path / "out" / TENSORS).stat().st_size < 256 * 256 * 4 / 6


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = deployed("tied")
    qat.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / TENSORS)
    assert sum(name.endswith("weight_codes") for name in stored) == 2       # the table (and head), and the body
    after = qat.load(tmp_path / "out", zoo.build("tied"))
    assert after.head.weight_codes is after.table.weight_codes


def test_an_old_checkpoint_is_replaced(tmp_path: Path) -> None:
    qat.save(deployed("mlp"), tmp_path / "out")
    qat.save(deployed("mlp", "w4a16"), tmp_path / "out")
    assert "w4a16" in (tmp_path / "out" / MANIFEST).read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    qat.save(deployed("mlp"), tmp_path / "empty")
    assert len(tree(tmp_path / "empty")) == 2


# ------------------------------------------------------------------------------------------------ fault 28


def test_only_deployed_models_are_saved(tmp_path: Path) -> None:
    x = zoo.inputs("mlp", 2)
    for model in (zoo.build("mlp"), zoo.prepared(zoo.build("mlp"), "w8a8", [x])):
        with pytest.raises(CheckpointError, match="deployed"):
            qat.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_people_s_directories_and_files_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for target in (mine, tmp_path / "file", tmp_path / "file" / "below"):
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match=target.name):
            qat.save(deployed("mlp"), target)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdtemp"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_or_read_only_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str,
                                                        existing: bool) -> None:
    if existing:
        qat.save(deployed("mlp"), tmp_path / "out")
    before, model = tree(tmp_path), deployed("mlp", "w4a16")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC if call != "mkdtemp" else errno.EROFS, "No space left on device")

    if call == "write":
        real = open

        class Full:
            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def write(self, data: bytes) -> int:
                self.file.write(data[: len(data) // 2])
                return fail()

        monkeypatch.setattr("builtins.open", lambda f, mode="r", *a, **k: Full(real(f, mode, *a, **k)) if "w" in mode
                            else real(f, mode, *a, **k))
    elif call == "mkdtemp":
        monkeypatch.setattr("tempfile.mkdtemp", fail)
    elif call == "rename":
        monkeypatch.setattr("os.rename", fail)
        monkeypatch.setattr("ctypes.CDLL", lambda *a, **k: object())
    else:
        monkeypatch.setattr(f"os.{call}", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        qat.save(model, tmp_path / "out")
    monkeypatch.undo()
    assert tree(tmp_path) == before
    assert existing or not list(tmp_path.iterdir())


def test_without_an_atomic_exchange_the_old_one_is_renamed_away(tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    qat.save(deployed("mlp"), tmp_path / "out")
    monkeypatch.setattr("ctypes.CDLL", lambda *a, **k: object())
    qat.save(deployed("mlp", "w4a16"), tmp_path / "out")
    assert "w4a16" in (tmp_path / "out" / MANIFEST).read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------ fault 22

KILLED = """
import sys, torch, qat
from torch import nn
torch.manual_seed(0)
x = torch.randn(3, 256)
models = []
for preset in ("w8a8", "w8a16"):
    p = qat.calibrate(qat.prepare(nn.Sequential(nn.Linear(256, 256)), preset, example_inputs=x), [x])
    models.append(qat.convert(p, [x])[0])
qat.save(models[0], sys.argv[1])
print("ready", flush=True)
while True:
    for model in models:
        qat.save(model, sys.argv[1])
"""


def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    loaded = set()
    for i in range(3):
        path = tmp_path / str(i) / "out"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.0137 * i)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        model = qat.load(path, nn.Sequential(nn.Linear(256, 256)))
        assert bool(torch.isfinite(model(torch.randn(2, 256))).all())
        loaded.add(json.loads((path / MANIFEST).read_text())["recipe"]["name"])
    assert loaded <= {"w8a8", "w8a16"}


# ------------------------------------------------------------------------------------------------ faults 24 to 27


def assert_refused(folder: Path, match: str | None = None) -> None:
    before = tree(folder)
    with pytest.raises(CheckpointError, match=match):
        qat.load(folder, skeleton())
    assert tree(folder) == before


def rewrite(folder: Path, data: bytes) -> None:
    """Put other tensors in place, with a manifest that vouches for them."""
    (folder / TENSORS).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {TENSORS: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors, and let the whole manifest say so."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tensors"] = {n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape),
                               "file": TENSORS}
                           for n, t in tensors.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    rewrite(folder, (folder / TENSORS).read_bytes())


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "truncated": lambda d: d[:-1],
    "half": lambda d: d[: len(d) // 2],
    "padded": lambda d: d + b"\0",
    "one bit": lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:],
    "header bit": lambda d: d[:20] + bytes([d[20] ^ 1]) + d[21:],
    "huge header": lambda d: struct.pack("<Q", 2**62) + d[8:],
    "long header": lambda d: struct.pack("<Q", 200_000_000) + d[8:],
    "garbage": lambda d: bytes(i * 7 % 256 for i in range(len(d))),
}


@pytest.mark.parametrize("vouched", [False, True], ids=["as it is", "with a recomputed checksum"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors(folder: Path, kind: str, vouched: bool) -> None:
    data = DAMAGE[kind]((folder / TENSORS).read_bytes())
    if vouched and kind == "one bit":
        data = data[:-9] + b"\xff" + data[-8:]
    if vouched:
        rewrite(folder, data)
    else:
        (folder / TENSORS).write_bytes(data)
    if vouched and kind == "one bit":
        return                # a changed value with a right checksum is a valid file: see the range checks below
    assert_refused(folder, TENSORS)


def test_a_pickle_is_not_opened(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    rewrite(folder, pickle.dumps(Bomb()))
    assert_refused(folder, "not a safetensors file")
    torch.save(Bomb(), folder / TENSORS)
    rewrite(folder, (folder / TENSORS).read_bytes())
    assert_refused(folder, "not a safetensors file")
    assert not marker.exists()


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(n for n in sorted(tensors) if n.endswith(end))


TAMPERED: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "ternary code 3": ("weight_codes", lambda t: t | 0xFF),
    "codes too short": ("weight_codes", lambda t: t[:-1].clone()),
    "codes of another type": ("weight_codes", lambda t: t.to(torch.int64)),
    "scale NaN": ("weight_scale", lambda t: t * torch.nan),
    "scale infinite": ("weight_scale", lambda t: t / 0),
    "scale of another shape": ("weight_scale", lambda t: t[None].clone()),
    "scale of another type": ("weight_scale", lambda t: t.double()),
    "scale whole number": ("weight_scale", lambda t: torch.ones_like(t, dtype=torch.int32)),
    "input scale zero": ("input_quantizer.scale", lambda t: t * 0),
    "input scale negative": ("input_quantizer.scale", lambda t: -t),
    "input scale NaN": ("input_quantizer.scale", lambda t: t * torch.nan),
    "input scale infinite": ("input_quantizer.scale", lambda t: t / 0),
    "input scale of another type": ("input_quantizer.scale", lambda t: t.double()),
    "zero point beyond": ("input_quantizer.zero_point", lambda t: t * 0 + 256),
    "zero point below": ("input_quantizer.zero_point", lambda t: t * 0 - 1),
    "zero point floating": ("input_quantizer.zero_point", lambda t: t.float() + 0.5),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_values_out_of_range_are_refused_by_name(folder: Path, kind: str) -> None:
    end, change = TAMPERED[kind]

    def tamper(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, end)
        tensors[name] = change(tensors[name])

    retensor(folder, tamper)
    assert_refused(folder, end)


def test_missing_and_unexpected_tensors_are_named(folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["4.surprise"] = tensors.pop("4.bias")

    retensor(folder, rename)
    assert_refused(folder, r"missing 4\.bias; unexpected 4\.surprise")


def test_another_architecture(folder: Path) -> None:
    others = [nn.Sequential(nn.Linear(12, 7)),
              nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.GELU(), nn.Linear(5, 3)),
              zoo.build("conv"), nn.ReLU(),
              nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))]
    for other in others:
        with pytest.raises(CheckpointError, match="architecture"):
            qat.load(folder, other)
    with pytest.raises(CheckpointError, match="prepared already"):
        qat.load(folder, qat.prepare(skeleton(), "w8a8"))


def remanifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= changes
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


@pytest.mark.parametrize("version", [0, 1, 3, "1", None, [1], ...], ids=str)
def test_unknown_versions(folder: Path, version: Any) -> None:
    remanifest(folder, version=version)
    assert_refused(folder, "version")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000,
                                  b'{"format": "qat"}'], ids=lambda t: repr(t[:12]))
def test_manifests_that_are_none(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    assert_refused(folder, MANIFEST)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        qat.load(tmp_path / "nowhere", skeleton())
    (folder / TENSORS).unlink()
    assert_refused(folder, TENSORS)
    (folder / MANIFEST).unlink()
    assert_refused(folder, MANIFEST)


def test_a_manifest_too_large_to_be_one_is_not_read(folder: Path) -> None:
    with open(folder / MANIFEST, "wb") as file:
        file.truncate(2**33)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="too large"):
        qat.load(folder, skeleton())
    assert time.monotonic() - start < 2.0


JUNK: list[Any] = [..., None, 5, -1, "x", [], [None], [[]], {}, {"x": []}, {"0": 3}, {"": {}}, True, 1e400]


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_any_entry_of_the_manifest_may_be_junk(folder: Path, junk: Any) -> None:
    """Whatever stands in a top entry, the file loads or is refused: no other exception, ever."""
    good = (folder / MANIFEST).read_text()
    refused = 0
    for key in json.loads(good):
        remanifest(folder, **{key: junk})
        try:
            qat.load(folder, skeleton())
        except CheckpointError:
            refused += 1
        (folder / MANIFEST).write_text(good)
    assert refused >= 6


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [path, *(leaf for k, v in items for leaf in _leaves(v, (*path, k)))]
    return [path]


@pytest.mark.parametrize("key", ["plan", "recipe", "functions", "macs", "aliases"])
def test_any_value_of_the_plan_may_be_junk(folder: Path, key: str) -> None:
    good = json.loads((folder / MANIFEST).read_text())
    fresh = skeleton()
    for path in _leaves(good[key], (key,)):
        for junk in (None, 7, "zzz", [], [1, 2, 3], {"a": 1}, 1e9):
            manifest = json.loads(json.dumps(good))
            target = manifest
            for step in path[:-1]:
                target = target[step]
            target[path[-1]] = junk
            (folder / MANIFEST).write_text(json.dumps(manifest))
            try:
                qat.load(folder, fresh)
            except CheckpointError:
                continue
            except Exception as error:
                raise AssertionError(f"{path} = {junk!r}: {type(error).__name__}: {error}") from error


def test_a_plan_cannot_name_code(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["plan"]["layers"]["0"]["kind"] = "os.system"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(folder, "os.system")
    manifest["recipe"]["_target_"] = "os.system"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(folder)


def test_an_unbounded_clamp_can_be_saved(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Hardtanh(0.0, float("inf")), nn.Linear(3, 2)), torch.randn(4, 3)
    after = qat.convert(zoo.prepared(model, "w8a8", [x]), [x])[0]
    qat.save(after, tmp_path / "out")
    fresh = nn.Sequential(nn.Hardtanh(0.0, float("inf")), nn.Linear(3, 2))
    assert torch.equal(qat.load(tmp_path / "out", fresh)(x), after(x))
