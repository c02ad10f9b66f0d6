import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import products
from nmt_moe.kernels import _batches
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder
from nmt_moe.planning import Batch, Product

BATCH = Batch(sentences=2, length=5, vocab_size=11)


def config(wiring="recurrent", attention="product", moe=True):
    moe_config = MoEConfig(model_dim=4, hidden_dim=6, num_experts=4, top_k=2)
    return GNMTConfig(
        model_dim=4,
        lstm_hidden_dim=8,
        attention=attention,
        attention_wiring=wiring,
        moe=moe_config if moe else None,
    )


def test_flops_of_the_recurrent_wiring_by_hand():
    # B = 2, S = T = 5, V = 11, D = 4, LSTM hidden 8 (gates 32), 4 experts of width 6, 2 per token.
    # The factors are 2 (multiplications and additions) and 3 (forward pass and two gradients).
    assert products.flops_by_group(products.model_products(config(), BATCH)) == {
        # Three LSTMs over 10 source tokens and two over 10 target tokens map width D to the gates.
        "LSTM input": 6 * 5 * 10 * 4 * 32,
        # The recurrent input has width D, or 2 D in decoder LSTM 1, which also reads the context.
        "LSTM recurrent": 6 * (3 * 10 * 4 + 10 * 8 + 10 * 4) * 32,
        "LSTM projection": 6 * 5 * 10 * 8 * 4,
        # The logits and the noise each have one product, over 20 tokens and 4 experts.
        "MoE gate": 6 * 2 * 20 * 4 * 4,
        # There are 40 rows, and each expert has two matrices.
        "MoE experts": 6 * 2 * 40 * 4 * 6,
        # Keys and queries are computed for 10 tokens each. Each query is used twice, with 5 source
        # tokens.
        "attention": 6 * (20 * 4 * 4 + 2 * 10 * 5 * 4),
        "softmax": 6 * 10 * 4 * 11,
    }


def test_the_wirings_differ_in_where_the_context_goes_but_not_in_operations():
    recurrent = products.flops_by_group(products.model_products(config(), BATCH))
    parallel = products.flops_by_group(products.model_products(config("parallel"), BATCH))
    # LSTM 2 reads the contexts of all 10 target tokens (D = 4) in one product with its 32 gates. In
    # the recurrent wiring, LSTM 1 reads them step by step.
    moved = 6 * 10 * 4 * 32
    recurrent["LSTM input"] += moved
    recurrent["LSTM recurrent"] -= moved
    assert parallel == recurrent


def test_a_dense_model_has_no_moe_products():
    groups = products.flops_by_group(products.model_products(config(moe=False), BATCH))
    assert not [name for name in groups if "MoE" in name]


@pytest.mark.usefixtures("torch_operations")
def test_the_list_agrees_with_what_the_model_computes(monkeypatch):
    monkeypatch.setattr(_batches, "SPARE_ROWS", 0)  # products of padding are not necessary
    # At each LSTM's first step, torch omits the gradient of the zero state, which would take
    # B D 4 H operations. In the recurrent wiring, decoder LSTM 1 computes this gradient because of
    # the context, but torch omits the gradient of its query.
    zero_state, zero_query = 2 * 2 * 4 * 32, 2 * 2 * 4 * 4
    for wiring, left_out in (
        ("parallel", 5 * zero_state),
        ("recurrent", 4 * zero_state + zero_query),
    ):
        for moe in (True, False):
            sizes = config(wiring, moe=moe)
            listed = products.training_flops(products.model_products(sizes, BATCH))
            assert counted_flops(sizes) == listed - left_out, (wiring, moe)


def count_addmm(_, left, right, **kwargs):
    return 2 * left[0] * left[1] * right[1]


def counted_flops(sizes):
    """Count the operations of all products that torch runs in one training step."""
    embedding = nn.Embedding(11, sizes.model_dim)
    encoder, decoder = GNMTEncoder(sizes, embedding), GNMTDecoder(sizes, embedding)
    output = nn.Linear(sizes.model_dim, 11, bias=False)
    source = torch.randint(11, (BATCH.sentences, BATCH.length))
    target = torch.randint(11, (BATCH.sentences, BATCH.length))
    # By itself, torch's counter leaves out products that add to a tensor in place.
    in_place = {torch.ops.aten.addmm_: count_addmm}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        encoded = encoder(source, torch.zeros_like(source, dtype=torch.bool))
        output(decoder(target, encoded).features).sum().backward()
    return counter.get_total_flops()


def test_the_bare_run_does_the_listed_operations():
    for attention in ("product", "additive"):
        listed = products.model_products(config(attention=attention), BATCH)
        bare = products.BareProducts(listed, products.Pool("cpu"))
        with FlopCounterMode(display=False) as counter:
            bare()
        assert counter.get_total_flops() == products.training_flops(listed)


def test_stepwise_products_have_one_weight_gradient():
    product = Product("LSTM", "weight_hh_l0", rows=2, inner=3, cols=4, steps=5)
    calls = []
    bare = products.BareProducts([product], products.Pool("cpu"))
    bare._multiply = lambda left, right: calls.append((left.shape[1:], right.shape[1:]))
    bare()
    forward, backward = ((2, 3), (3, 4)), ((2, 4), (4, 3))
    assert calls == [forward] * 5 + [((3, 10), (10, 4))] + [backward] * 5
