"""The reference networks of sequences: what may depend on what, and that their recipes reach every product."""

import copy

import pytest
import torch

import qat
from qat.errors import ConfigError
from qat.training.models import ByteTransformer, CausalAttention, RecurrentClassifier


def transformer(**options):
    return ByteTransformer(**{"num_classes": 256, "width": 16, "heads": 2, "layers": 2} | options).eval()


def test_no_position_sees_what_lies_ahead():
    network, x = transformer(), torch.randint(0, 256, (2, 12))
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 256
    before, after = network(x), network(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 300), (0, 4)])
def test_any_number_of_positions(shape):
    assert transformer()(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 256)


def test_attention_is_that_of_torch_with_a_bias():
    attention, x = CausalAttention(12, 3), torch.randn(2, 7, 12)
    q, k, v = (layer(x).view(2, 7, 3, 4).transpose(1, 2)
               for layer in (attention.query, attention.key, attention.value))  # fmt: skip
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention.bias(7))
    torch.testing.assert_close(attention(x), attention.out(mixed.transpose(1, 2).flatten(2)))
    assert attention.bias(3)[0].tolist() == [[0, -torch.inf, -torch.inf], [-1, 0, -torch.inf], [-2, -1, 0]]
    assert "slopes" not in attention.state_dict()


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w2a8", "w8a8_dynamic"])
def test_every_product_of_the_transformer_is_quantized(recipe):
    network, x = transformer(), torch.randint(0, 256, (3, 9))
    prepared = qat.prepare(network, recipe, x)
    qat.calibrate(prepared, [x])
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    rows = {row.name: row for row in qat.coverage(prepared).rows}
    products = [name for name in rows if not name.endswith(("norm", "norm1", "norm2"))]
    assert len(products) == 2 * (4 + 2 + 2) + 2  # of each block; embedding and head
    assert all(rows[name].status == "quantized" for name in products)
    with torch.no_grad():
        assert torch.equal(deployed(x), prepared.eval()(x))


def test_training_moves_every_parameter():
    network, x = transformer().train(), torch.randint(0, 256, (4, 9))
    prepared = qat.prepare(network, "w4a8", x)
    qat.calibrate(prepared, [x])
    qat.set_observing(prepared, False)
    prepared(x).square().mean().backward()
    silent = [name for name, p in prepared.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # adding a constant to all scores of a position changes nothing, so the bias of the keys has no gradient
    assert all(name.endswith("key.bias") for name in silent)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_padding_has_no_influence(cell):
    network = RecurrentClassifier(5, cell, width=8, hidden=12, layers=2).eval()
    tokens, lengths = torch.randint(1, 256, (4, 10)), torch.tensor([10, 3, 1, 0])
    expected = network(tokens, lengths)
    assert expected.shape == (4, 5)
    for row, length in enumerate(lengths.tolist()):
        tokens[row, max(length, 1) :] = 7
    assert torch.equal(network(tokens, lengths), expected)
    alone = network(tokens[1:2, :3], lengths[1:2])
    torch.testing.assert_close(alone, expected[1:2])
    assert network(tokens[:0], lengths[:0]).shape == (0, 5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_classifier_deploys_as_it_was_prepared(cell):
    network = RecurrentClassifier(5, cell, width=8, hidden=12)
    batch = (torch.randint(1, 256, (6, 10)), torch.randint(1, 11, (6,)))
    before = copy.deepcopy(network.state_dict())
    prepared = qat.prepare(network, "w4a8", batch)
    qat.calibrate(prepared, [batch])
    deployed, certificate = qat.convert(prepared, [batch])
    assert certificate.equal
    status = {row.name: row.status for row in qat.coverage(deployed).rows}
    assert status["embedding"] == status["head"] == "quantized"
    assert any(name.startswith("recurrent") for name in status)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_impossible_networks_are_refused():
    with pytest.raises(ConfigError, match="3 heads do not divide a width of 16"):
        ByteTransformer(width=16, heads=3)
    with pytest.raises(ConfigError, match="did you mean 'lstm'"):
        RecurrentClassifier(cell="lstn")
