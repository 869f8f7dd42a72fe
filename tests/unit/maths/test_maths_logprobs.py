"""Log-probs and entropies against the plain formulas, chunked and not, and with garbage where nothing counts."""

from __future__ import annotations

import pytest
import torch

from rayalign.maths.logprobs import mean_logprob, mean_prob, sequence_logprob, token_entropy, token_logprobs

torch.set_num_threads(1)
CHUNKS = [None, 1, 2, 5, 100]


def logits_of(dtype=torch.float64, scale=3.0):
    return (scale * torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype)


LABELS = torch.tensor([[0, 6, 3, 3, 1], [2, 2, 5, 4, 0]])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_log_softmax(chunk, temperature):
    logits = logits_of().requires_grad_()
    logp = torch.log_softmax(logits / temperature, -1)
    weight = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)
    for mine, plain in [
        (
            token_logprobs(logits, LABELS, temperature=temperature, chunk=chunk),
            logp.gather(-1, LABELS[..., None])[..., 0],
        ),
        (token_entropy(logits, temperature=temperature, chunk=chunk), -(logp.exp() * logp).sum(-1)),
    ]:
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
        mine_grad, plain_grad = (
            torch.autograd.grad((out * weight).sum(), logits, retain_graph=True)[0] for out in (mine, plain)
        )
        torch.testing.assert_close(mine_grad, plain_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck(chunk):
    logits = logits_of().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, LABELS, temperature=0.8, chunk=chunk), logits)
    assert torch.autograd.gradcheck(lambda z: token_entropy(z, temperature=0.8, chunk=chunk), logits)


@pytest.mark.parametrize("chunk", [None, 2])
def test_an_output_without_gradient_gives_none_to_nan_logits(chunk):
    logits = logits_of()
    logits[0, 1], logits[1, 4] = torch.nan, torch.inf
    logits.requires_grad_()
    mask = torch.ones(2, 5)
    mask[0, 1] = mask[1, 4] = 0
    for out in (token_logprobs(logits, LABELS, chunk=chunk), token_entropy(logits, chunk=chunk)):
        total = sequence_logprob(out, mask).sum()
        (grad,) = torch.autograd.grad(total, logits)
        assert torch.isfinite(total) and torch.isfinite(grad).all()
        assert (grad[0, 1] == 0).all() and (grad[1, 4] == 0).all() and (grad[0, 0] != 0).any()


def test_banned_tokens_add_nothing_to_the_entropy():
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]], requires_grad=True)
    entropy = token_entropy(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0.6931472) and torch.isfinite(logits.grad).all()


def test_extreme_logits():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    logps = token_logprobs(logits.expand(1, 3, 3), torch.tensor([[0, 1, 2]]))
    assert logps.tolist() == [[0.0, -2e4, -1e4]]
    (logps.sum() + token_entropy(logits).sum()).backward()
    assert torch.isfinite(logits.grad).all() and token_entropy(logits).item() == 0


def test_dtypes():
    assert token_logprobs(logits_of(torch.float64), LABELS).dtype == torch.float64
    half = logits_of(torch.bfloat16).requires_grad_()
    out = token_logprobs(half, LABELS, chunk=2)
    torch.testing.assert_close(out, token_logprobs(half.detach().float(), LABELS))
    out.sum().backward()
    assert out.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert token_entropy(half).dtype == torch.float32


def test_without_gradients_and_without_rows():
    logits = logits_of()
    with torch.no_grad():
        assert not token_logprobs(logits.clone().requires_grad_(), LABELS, chunk=2).requires_grad
    assert not token_logprobs(logits, LABELS).requires_grad
    assert token_logprobs(logits[:, :0], LABELS[:, :0]).shape == (2, 0)
    assert token_entropy(logits[:0], chunk=2).shape == (0, 5)


def test_what_is_saved_for_backward_holds_no_second_vocabulary_block():
    logits = logits_of(torch.bfloat16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_logprobs(logits, LABELS, chunk=1)
        token_entropy(logits, chunk=1)
    blocks = [x for x in saved if x.shape == logits.shape]
    assert len(blocks) == 2 and all(x.data_ptr() == logits.data_ptr() for x in blocks)


def test_a_negative_label_reads_as_zero():
    labels = LABELS.clone()
    labels[0, 1] = -100
    assert token_logprobs(logits_of(), labels)[0, 1] == torch.log_softmax(logits_of(), -1)[0, 1, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"chunk": 0},
        {"labels": LABELS[:, :4]},
        {"labels": LABELS + 1},
        {"labels": LABELS.double()},
        {"logits": logits_of()[0]},
    ],
)
def test_bad_arguments(change):
    arguments = {"logits": logits_of(), "labels": LABELS, **change}
    with pytest.raises(ValueError):
        token_logprobs(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_sums_and_means():
    logps = torch.tensor([[-1.0, torch.nan, -2.0], [torch.inf, -torch.inf, torch.nan]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert sequence_logprob(logps, mask).tolist() == [-3, 0]
    assert mean_logprob(logps, mask).tolist() == [-1.5, 0]
    probs = mean_prob(logps, mask)
    assert probs.tolist() == pytest.approx([(0.36787944 + 0.13533528) / 2, 0])
    (sequence_logprob(logps, mask) + mean_logprob(logps, mask) + probs).sum().backward()
    assert torch.isfinite(logps.grad).all() and (logps.grad[1] == 0).all() and logps.grad[0, 1] == 0
    with pytest.raises(ValueError):
        sequence_logprob(logps, mask[:, :2])


def test_a_long_mask_in_sixteen_bits_is_counted_exactly():
    ones = torch.ones(1, 301, dtype=torch.bfloat16)
    assert mean_logprob(-ones, ones).item() == -1
