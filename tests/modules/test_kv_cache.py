"""Keys and values as packed codes: what is stored, how large it is, and that generation does not notice."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import SpecError, UnsupportedError
from qat.numerics.formats import TensorSpec

pytest.importorskip("transformers")

import hub
import transformers as hf

from qat.modules.attention_interface import carried
from qat.modules.kv_cache import Grid, QuantizedCacheLayer, Store, cache_spec

GROUPS = {"format": "uint4", "symmetric": False, "granularity": "per_group", "group_size": 4, "scale_dtype": "float16"}
SPECS: dict[str, Any] = {**{f: f for f in ("int8", "int4", "int3", "binary")},
                         "uint5": {"format": "uint5", "symmetric": False}, "groups": GROUPS}
DECODERS = ("llama", "gpt2", "opt", "qwen3", "mistral", "gpt_oss", "gemma2")
PAIRED = ("t5", "bart", "whisper")


def generate(model: Any, batch: dict[str, Tensor], cache: Any = None, tokens: int = 6, **options: Any) -> Any:
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder")}
    return model.generate(**batch, past_key_values=cache, **{
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True, **options})


def same(a: Any, b: Any) -> bool:
    """Equal tokens and, bit for bit, equal logits."""
    return torch.equal(a.sequences, b.sequences) and all(map(torch.equal, a.logits, b.logits))


def pair_of(name: str, preset: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """A prepared model and the deployed one. (Where a head stays float, torch chooses its kernel by requires_grad.)"""
    batch = hub.inputs(name)
    prepared = qat.calibrate(qat.prepare(hub.build(name), preset, example_inputs=batch), [batch])
    return prepared.eval().requires_grad_(False), qat.convert(prepared, [batch])[0], batch


def cache_of(model: Any, *specs: Any) -> Any:
    kind = qat.QuantizedCache
    return (kind.paired if model.config.is_encoder_decoder else kind)(model, *specs)


# ---------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_stored_is_within_half_a_scale(name: str, width: int) -> None:
    x = torch.randn(2, 3, 5, width) * torch.rand(2, 3, 5, 1).exp()
    spec = cache_spec(SPECS[name])
    store = Store.of(Grid(spec)(x))
    values, codes = store.values(summed=False), store.codes()
    scale = codes.scale.repeat_interleave(width // codes.scale.shape[-1], -1)
    assert store.packed.dtype == torch.uint8
    if name != "binary":                            # a sign's bound is the mean, not half a step
        assert bool(((values - x).abs() <= 0.502 * scale).all())
        span = x.abs().amax(-1, keepdim=True) * 2 / (2**spec.bits - 1)
        assert not spec.symmetric or torch.allclose(codes.scale, span)
    assert torch.equal(store.each(lambda t: t[:, :, 1:3]).values(summed=True), store.values(summed=True)[:, :, 1:3])
    joined = Store.of(Grid(spec)(x[:, :, :2])).followed_by(Store.of(Grid(spec)(x[:, :, 2:])))
    assert torch.equal(joined.values(summed=True), values), "a token depends on those that came with it"


def test_bytes() -> None:
    model = hub.llama(hidden_size=256, head_dim=64).eval()
    ids = torch.randint(3, hub.VOCABULARY, (2, 16))
    caches = {"float": hf.DynamicCache(config=model.config)}
    caches |= {str(spec): qat.QuantizedCache(model, spec, spec) for spec in ("int8", "int4")}
    with torch.no_grad():
        for cache in caches.values():
            model(ids, past_key_values=cache)
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches["float"].layers)
    assert caches["int8"].nbytes == whole * (64 + 4) // 256          # codes, and a float32 scale for each head
    assert caches["int4"].nbytes == whole * (32 + 4) // 256
    static = qat.calibrate(qat.prepare(model, "w8a8", example_inputs=(ids,)), [(ids,)])
    own = qat.QuantizedCache(static)
    with torch.no_grad():
        static(ids, past_key_values=own)
    assert own.nbytes == whole // 4                 # static ranges are the model's
    assert qat.QuantizedCache(model).nbytes == 0


def test_codes_travel_with_the_values_where_a_product_can_use_them() -> None:
    model = hub.build("llama")
    x = torch.randn(2, 2, 5, 8)
    for spec, usable in (("int4", (True, True)), (GROUPS, (False, False)),
                         ({"format": "uint8", "symmetric": False}, (True, False))):
        layer = qat.QuantizedCache(model, spec, spec).layers[0]
        for values, wanted in zip(layer.update(x, x), usable, strict=True):
            codes = carried(values)
            assert (codes is not None) == wanted
            assert codes is None or torch.equal(codes.dequantize(), values)
            assert carried(values[:, :, :2]) is None


@pytest.mark.parametrize("spec", [
    {"format": "int8", "learned": "lsq"}, {"format": "int8", "granularity": "per_tensor"},
    {"format": "int8", "observer": "mse"}, {"format": "uint8", "symmetric": True}], ids=str)
def test_specs_that_no_cache_can_carry_out(spec: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        qat.QuantizedCache(hub.build("llama"), keys=TensorSpec.from_dict(spec))


def test_models_that_have_no_such_cache() -> None:
    with pytest.raises(UnsupportedError, match="no config"):
        qat.QuantizedCache(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="paired"):
        qat.QuantizedCache(hub.build("t5"))
    hybrid = hub.build("llama")
    hybrid.config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(UnsupportedError, match=r"layer 1 .* 'hybrid'"):
        qat.QuantizedCache(hybrid)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qat.modules.kv_cache")
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    with pytest.raises(UnsupportedError, match=r"pip install .\[llm\]"):
        _ = qat.QuantizedCache


def test_training_wants_no_cache() -> None:
    model = hub.build("llama")
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model(**hub.text(), past_key_values=qat.QuantizedCache(model))


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", DECODERS + PAIRED)
def test_a_float_model_generates_with_codes(name: str) -> None:
    model, batch = hub.build(name), hub.inputs(name)
    expected = generate(model, batch)
    for spec, bound in (("int8", 0.08), ("int4", None)):
        cache = cache_of(model, spec, spec)
        got = generate(model, batch, cache)
        gap = float((got.logits[1] - expected.logits[1]).abs().max() / expected.logits[1].abs().max())
        assert 0 < gap < (bound or 2.0), spec       # int4 of random weights: only that it runs
        assert cache.nbytes > 0


@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic"])
@pytest.mark.parametrize("name", DECODERS)
def test_with_the_grids_of_attention_the_cache_changes_nothing(name: str, preset: str) -> None:
    prepared, deployed, batch = pair_of(name, preset)
    expected = generate(prepared, batch)
    assert same(generate(prepared, batch, qat.QuantizedCache(prepared)), expected)
    assert same(generate(deployed, batch, qat.QuantizedCache(deployed)), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek", *PAIRED])
def test_prepared_and_deployed_generate_the_same(name: str) -> None:
    prepared, deployed, batch = pair_of(name, "w8a8_dynamic")
    for specs in ((), ("int4", "int4"), (GROUPS, GROUPS)):
        assert same(*(generate(m, batch, cache_of(m, *specs)) for m in (prepared, deployed)))


@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic"])
def test_a_prompt_and_its_tokens_one_by_one(preset: str) -> None:
    model, _, _ = pair_of("opt", preset)
    ids = hub.text(8, padded=0)["input_ids"]
    cache = qat.QuantizedCache(model)
    with torch.no_grad():
        whole = model(ids).logits
        steps = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8)], 1)
    assert torch.equal(steps, whole)


@pytest.mark.parametrize("name", ["llama", "mistral", "bart"])
def test_beams_and_samples(name: str) -> None:
    prepared, deployed, batch = pair_of(name, "w8a8")
    expected = generate(prepared, batch, num_beams=3).sequences
    for model in (prepared, deployed):
        got = generate(model, batch, cache_of(model), num_beams=3).sequences
        assert name == "bart" or torch.equal(got, expected)
    sampled = []
    for model in (prepared, deployed):
        torch.manual_seed(7)
        sampled.append(generate(model, batch, cache_of(model), do_sample=True, num_return_sequences=2).sequences)
    assert torch.equal(*sampled)


@pytest.mark.parametrize("window", [None, 4, 20])
@pytest.mark.parametrize("spec", [{"format": "uint8", "symmetric": False}, GROUPS], ids=["tokens", "groups"])
def test_a_layer_does_what_transformers_own_does(spec: Any, window: int | None) -> None:
    """On values whose grid has the step 1 nothing is rounded, so both hold and return the same."""
    grid = Grid(cache_spec(spec))
    ours: Any = QuantizedCacheLayer(grid, grid, window)
    theirs: Any = hf.cache_utils.DynamicLayer() if window is None else hf.cache_utils.DynamicSlidingWindowLayer(window)

    def both(act: Any) -> None:
        got, expected = act(ours), act(theirs)
        if isinstance(got, tuple):
            assert all(map(torch.equal, got, expected))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_max_length() == theirs.get_max_length()
        for length in (1, 3):
            assert ours.get_mask_sizes(length) == theirs.get_mask_sizes(length)
        if ours.get_seq_length() and theirs.keys.shape[2]:
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)

    def more(tokens: int) -> None:
        rows = 2 if ours.stores is None else ours.stores[0].packed.shape[0]
        x = torch.randint(0, grid.spec.fmt.hi + 1, (rows, 3, tokens, 8)).float()
        x[..., 0::4], x[..., 1::4] = 0.0, grid.spec.fmt.hi
        both(lambda layer: layer.update(x, x))

    for tokens in (3, 1, 1, 2, 1):
        more(tokens)
    both(lambda layer: layer.reorder_cache(torch.tensor([1, 1])))
    both(lambda layer: layer.batch_repeat_interleave(2))
    both(lambda layer: layer.batch_select_indices(torch.tensor([0, 3, 2])))
    if window in (None, 20):
        both(lambda layer: layer.crop(-2))
    else:
        with pytest.raises(UnsupportedError, match="window is full"):
            ours.crop(-1)
    more(1)
    both(lambda layer: layer.reset())
    if window is not None:
        both(lambda layer: layer.activate_past_recording())
    for tokens in (6, 1, 2):
        more(tokens)
    both(lambda layer: layer.crop(-2))
    more(2)
    with pytest.raises(ValueError, match="negative"):
        ours.crop(1)


def test_a_copy_of_a_prompt_s_cache_goes_on_by_itself() -> None:
    model, _, _ = pair_of("llama", "w8a8")
    prompt, cache = hub.text(padded=0)["input_ids"], qat.QuantizedCache(model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        twin = copy.deepcopy(cache)
        first = model(prompt[:, :2], past_key_values=cache).logits
        assert twin.get_seq_length() == prompt.shape[1]
        assert torch.equal(model(prompt[:, :2], past_key_values=twin).logits, first)
        cache.crop(-2)
        assert torch.equal(model(prompt[:, :2], past_key_values=cache).logits, first)
        cache.reset()
        assert cache.nbytes == 0
