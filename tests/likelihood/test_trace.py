"""The trace estimators against the Jacobian written out."""

from functools import partial

import pytest
import torch

from flowsolve.likelihood.trace import Exact, Hutchinson, resolve
from flowsolve.noise import Noise


def field(x):
    return torch.sin(x @ MATRIX) * x


MATRIX = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
JACOBIANS = torch.stack([torch.func.jacrev(field)(row) for row in X])


def test_exact_is_the_sum_of_the_diagonal():
    x = X.clone().requires_grad_()
    traces = Exact()(field(x), x, None, graph=False)
    assert torch.allclose(traces[:, 0], JACOBIANS.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12)


def test_a_convolutional_network_has_the_trace_of_its_jacobian():
    """Two channels, channels last: the rows of such a tensor are no view of it."""
    torch.manual_seed(0)
    conv = partial(torch.nn.Conv2d, kernel_size=3, padding=1)
    net = torch.nn.Sequential(conv(2, 4), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), conv(4, 2))
    images = torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last)
    x = images.clone().requires_grad_()
    traces = Exact()(net(x), x, None, graph=False)[:, 0]
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z: net(z[None])[0], images[i].contiguous())
        assert torch.allclose(traces[i], jacobian.reshape(32, 32).trace(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_an_output_that_autograd_cannot_trace_to_x_is_refused(trainable):
    weight = torch.ones((), requires_grad=trainable)
    x = torch.randn(2, 3).requires_grad_()
    with pytest.raises(ValueError, match="does not depend on x for autograd"):
        Exact()(weight * x.detach(), x, None, graph=False)


def test_hutchinson_has_its_textbook_mean_and_variance():
    """Rademacher: mean tr J, variance 2(‖A‖² − Σ A_ii²) with A the symmetric part; 4,000 probes, 5 standard errors."""
    count = 4_000
    noise = Noise.of(0, 1)
    signs = noise.rademacher(2, 0, X.new_empty(1, count * 7)).reshape(count, 1, 7)
    x = X[:1].clone().requires_grad_()
    draws = Hutchinson(count)(field(x), x, signs.transpose(0, 1), graph=False)[0]
    symmetric = 0.5 * (JACOBIANS[0] + JACOBIANS[0].T)
    variance = 2.0 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
    assert abs(draws.mean() - JACOBIANS[0].trace()) < 5 * (variance / count).sqrt()
    assert abs(draws.var() / variance - 1.0) < 0.1


def test_probes_follow_their_samples():
    noise = Noise.of(3, 5)
    estimator = resolve("hutchinson", 2)
    x = X.clone().requires_grad_()
    whole = estimator(field(x), x, estimator.draw(X, noise), False)
    index = torch.tensor([3, 0])
    part = X[index].clone().requires_grad_()
    probes = estimator.draw(X[index], noise.select(index))
    assert torch.allclose(estimator(field(part), part, probes, False), whole[index], rtol=1e-12)
