"""Both attention functions, compared with the paper's equations."""

import pytest
import torch

from nmt_moe.nn import ATTENTIONS, AttentionKeys


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_scores_are_the_papers(kind):
    torch.manual_seed(0)
    keys, attention = AttentionKeys(5, kind).double(), ATTENTIONS[kind](5).double()
    torch.nn.init.normal_(attention.scale)
    source, query = (torch.randn(2, n, 5, dtype=torch.float64) for n in (4, 3))
    padding = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    context, weights = attention(query, keys(source), source, padding)
    u, w, v = keys.projection.weight, attention.projection.weight, attention.scale
    for b in range(2):
        real = (~padding[b]).nonzero().flatten()
        for t in range(3):
            if kind == "additive":  # eq. 21
                scores = [v @ torch.tanh(u @ source[b, s] + w @ query[b, t]) for s in real]
            else:  # eq. 22
                scores = [
                    v @ (torch.tanh(u @ source[b, s]) * torch.tanh(w @ query[b, t])) for s in real
                ]
            expected = torch.stack(scores).softmax(0)
            torch.testing.assert_close(weights[b, t, real], expected)
            torch.testing.assert_close(context[b, t], expected @ source[b, real])
    assert not weights[1, :, [0, 3]].any()


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_gradients_agree_with_finite_differences(kind):
    torch.manual_seed(0)
    keys, attention = AttentionKeys(3, kind).double(), ATTENTIONS[kind](3).double()
    source = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False, False, True]])
    assert torch.autograd.gradcheck(lambda s, q: attention(q, keys(s), s, padding), (source, query))
