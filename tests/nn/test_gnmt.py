"""Encoder and decoder: the paper's counts, padding, single steps and whole sentences."""

import pytest
import torch
from torch import nn

from nmt_moe.moe import MoEConfig
from nmt_moe.nn import ATTENTIONS, WIRINGS, GNMTConfig, GNMTDecoder, GNMTEncoder

VOCABULARY, PAD = 20, 1


def build(wiring="recurrent", attention="product", moe=True, **sizes):
    torch.manual_seed(0)
    sizes = {
        "model_dim": 6,
        "lstm_hidden_dim": 9,
        "encoder_layers": 4,
        "decoder_layers": 3,
        **sizes,
    }
    config = GNMTConfig(
        attention=attention,
        attention_wiring=wiring,
        init_range=0.5,
        moe=MoEConfig(sizes["model_dim"], 8, num_experts=5, top_k=2) if moe else None,
        **sizes,
    )
    embedding = nn.Embedding(VOCABULARY, config.model_dim, PAD)
    encoder, decoder = GNMTEncoder(config, embedding), GNMTDecoder(config, embedding)
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        if ".gate." in name:
            nn.init.normal_(parameter)
    return encoder.double().eval(), decoder.double().eval()


def tokens(*lengths, left_pad=False):
    torch.manual_seed(1)
    longest = max(lengths)
    batch = torch.full((len(lengths), longest), PAD)
    for row, length in enumerate(lengths):
        start = longest - length if left_pad else 0
        batch[row, start : start + length] = torch.randint(2, VOCABULARY, (length,))
    return batch


@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_number_of_operations_is_the_papers_85_million(wiring):
    # The operations are those of five LSTMs with the context input, two MoE layers with 4 active
    # experts each, and the softmax.
    with torch.device("meta"):
        config = GNMTConfig(attention_wiring=wiring, moe=MoEConfig(512, 2048, 32, 4))
        embedding = nn.Embedding(32768, 512)
        networks = GNMTEncoder(config, embedding), GNMTDecoder(config, embedding)
    lstm_weights = sum(
        parameter.numel()
        for network in networks
        for name, parameter in network.named_parameters()
        if ("bottom" in name or "layers" in name)
        and parameter.dim() == 2
        and "attention" not in name
    )
    experts = 2 * 4 * 2 * 512 * 2048
    assert round((lstm_weights + experts + 512 * 32768) / 1e6, 1) == 84.9


@pytest.mark.parametrize("left_pad", [False, True])
def test_padding_changes_no_encoding(left_pad):
    encoder, _ = build()
    batch = tokens(7, 3, 5, left_pad=left_pad)
    together = encoder(batch, batch.eq(PAD))
    for row in range(3):
        real = batch[row] != PAD
        alone = encoder(batch[row : row + 1, real], batch[row : row + 1, real].eq(PAD))
        torch.testing.assert_close(together.source[row, real], alone.source[0])
        torch.testing.assert_close(together.keys[row, real], alone.keys[0])
    assert not together.source[batch == PAD].any()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_padding_changes_no_decoding_and_attention_stays_on_the_sentence(wiring, attention):
    encoder, decoder = build(wiring, attention)
    source, target = tokens(7, 3, 5, left_pad=True), tokens(4, 6, 2)
    encoded = encoder(source, source.eq(PAD))
    together = decoder(target, encoded, padding_mask=target.eq(PAD))
    for row in range(3):
        real_source, real_target = source[row] != PAD, target[row] != PAD
        alone_source, alone_target = (
            source[row : row + 1, real_source],
            target[row : row + 1, real_target],
        )
        alone = decoder(alone_target, encoder(alone_source, alone_source.eq(PAD)))
        torch.testing.assert_close(together.features[row, real_target], alone.features[0])
        attended = together.attention[row, real_target]
        torch.testing.assert_close(attended[:, real_source], alone.attention[0])
        assert not attended[:, ~real_source].any()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_step_by_step_equals_all_steps_at_once(wiring, attention, moe):
    encoder, decoder = build(wiring, attention, moe)
    source, target = tokens(5, 5), tokens(6, 6)
    encoded = encoder(source, source.eq(PAD))
    whole = decoder(target, encoded)
    state = None
    for t in range(6):
        step = decoder(target[:, t : t + 1], encoded, state)
        state = step.state
        torch.testing.assert_close(step.features[:, 0], whole.features[:, t])
        torch.testing.assert_close(step.attention[:, 0], whole.attention[:, t])


@pytest.mark.parametrize("wiring", WIRINGS)
def test_reordered_hypotheses_continue_with_their_own_state(wiring):
    encoder, decoder = build(wiring)
    source, target = tokens(5, 5, 5), tokens(4, 4, 4)
    encoded = encoder(source, source.eq(PAD))
    order = torch.tensor([2, 0, 0])
    state = decoder(target[:, :3], encoded).state.reorder(order)
    step = decoder(target[order, 3:], encoded.reorder(order), state)
    expected = decoder(target, encoded).features[order, 3:]
    torch.testing.assert_close(step.features, expected)


def test_context_of_the_recurrent_wiring_starts_from_all_positions_equally():
    encoder, decoder = build("recurrent")
    source = tokens(4, 2)
    out = decoder(tokens(3, 3), encoder(source, source.eq(PAD)))
    expected = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(out.attention[:, 0], expected)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_cells_as_wide_as_the_model_need_no_projection(wiring):
    encoder, decoder = build(wiring, model_dim=6, lstm_hidden_dim=6)
    source = tokens(4, 4)
    out = decoder(tokens(3, 3), encoder(source, source.eq(PAD)))
    assert out.features.shape == (2, 3, 6)
    names = [name for name, _ in (*encoder.named_parameters(), *decoder.named_parameters())]
    assert not [name for name in names if "weight_hr" in name or "bottom.projection" in name]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_parameter_learns(wiring):
    encoder, decoder = (network.train() for network in build(wiring))
    source, target = tokens(7, 3, 5), tokens(4, 6, 2)
    out = decoder(target, encoder(source, source.eq(PAD)), padding_mask=target.eq(PAD))
    out.features[target != PAD].square().sum().backward()
    for network in (encoder, decoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_forget_gates_start_open_and_moe_gates_at_zero():
    config = GNMTConfig(model_dim=4, lstm_hidden_dim=6, moe=MoEConfig(4, 8, 3, 2))
    for network in (GNMTEncoder, GNMTDecoder):
        for name, parameter in network(config, nn.Embedding(9, 4)).named_parameters():
            if "bias_ih" in name:
                assert parameter.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12
            elif ".gate." in name:
                assert not parameter.any()
            elif parameter.dim() > 1 and "embedding" not in name:
                assert parameter.abs().max() <= config.init_range


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "dot"}, "`attention` must be one of 'product', 'additive', but is 'dot'"),
        ({"attention_wiring": "loop"}, "`attention_wiring` must be one of"),
        ({"lstm_hidden_dim": 100}, "`lstm_hidden_dim` must be at least 512, but is 100"),
        ({"encoder_layers": 1}, "`encoder_layers` must be at least 2"),
        ({"encoder_layers": 2, "moe": MoEConfig(512, 8, 2, 1)}, "`encoder_layers` .* at least 3"),
        ({"decoder_layers": 1}, "`decoder_layers` must be at least 2"),
        ({"dropout": 1.5}, "`dropout` must be from 0.0 to 1.0"),
        ({"init_range": -1}, "`init_range` must be at least 0"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GNMTConfig(**change)


def test_a_beam_whose_hypotheses_keep_their_sentences_copies_no_encoding():
    encoder, _ = build()
    source = tokens(4, 3)
    beams = encoder(source, source.eq(PAD)).reorder(torch.tensor([0, 0, 1, 1]))
    assert beams.reorder(torch.tensor([1, 0, 2, 2])) is beams
    second = beams.reorder(torch.tensor([2, 3]))
    torch.testing.assert_close(second.source, beams.source[2:])


def test_gradients_of_the_recurrent_wiring_agree_with_finite_differences():
    encoder, decoder = build("recurrent", model_dim=2, lstm_hidden_dim=3)
    source = tokens(3, 2)
    encoded = encoder(source, source.eq(PAD))
    lstm = decoder.bottom
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = [lstm.weight_x, lstm.weight_recurrent, lstm.bias_ih, lstm.projection.weight]

    def run(x, *_):
        return lstm(x, encoded)[:2]

    assert torch.autograd.gradcheck(run, (x, *weights))
