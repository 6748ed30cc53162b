"""The trace estimators against the Jacobian written out."""

import math
from functools import partial

import pytest
import torch

import flowsolve as fs
from flowsolve.likelihood.result import student
from flowsolve.likelihood.trace import Exact, Hutchinson, HutchPP, Trace, XTrace, resolve
from flowsolve.noise import Noise

SIZE = 12
MATRIX = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def field(x):
    return torch.sin(x @ MATRIX) * x


JACOBIANS = torch.stack([torch.func.jacrev(field)(row) for row in X])
TRACES = JACOBIANS.diagonal(dim1=1, dim2=2).sum(1)
ESTIMATORS = [Exact(), Hutchinson(4), Hutchinson(4, kind="gaussian"), HutchPP(6), XTrace(6)]
Names = partial(pytest.mark.parametrize, ids=lambda e: f"{type(e).__name__}-{e.kind}")


def found(estimator, function=field, x=X, seed=0, **options):
    """The output and the traces of some samples."""
    return estimator(function, x, estimator.draw(x, Noise.of(seed, len(x))), **options)


def once(estimator, function, row, count=4000):
    """The mean estimate of one sample's trace for each of many draws of the probes."""
    x = row.expand(count, *row.shape)
    return found(estimator, function, x)[1].mean(1)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_exact_is_the_sum_of_the_diagonal(mode):
    output, traces = found(Exact(mode=mode))
    assert torch.allclose(traces[:, 0], TRACES, rtol=1e-12)
    assert torch.equal(output, field(X))


@Names("estimator", ESTIMATORS[1:])
def test_estimators_are_unbiased(estimator):
    """Within 4 standard errors over 4,000 draws, for two samples."""
    for i in (0, 3):
        draws = once(estimator, field, X[i])
        assert abs(draws.mean() - TRACES[i]) < 4 * draws.std() / math.sqrt(len(draws))
        assert draws.std() > 1e-3


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_has_its_textbook_variance(kind):
    """2(‖A‖² − Σ A_ii²) and 2‖A‖², A the symmetric part; 4 standard errors of a variance from its own fourth moment."""
    count = 8000
    draws = once(Hutchinson(1, kind=kind), field, X[0], count)
    a = 0.5 * (JACOBIANS[0] + JACOBIANS[0].T)
    variance = 2.0 * (a.square().sum() - (a.diagonal().square().sum() if kind == "rademacher" else 0.0))
    squares = (draws - TRACES[0]).square()
    assert abs(squares.mean() - variance) < 4 * squares.std() / math.sqrt(count)


@Names("estimator", ESTIMATORS[1:4])
def test_the_standard_error_is_that_of_the_mean(estimator):
    """Its square is an unbiased estimate of the variance of the mean, where columns are independent."""
    x = X[:1].expand(4000, SIZE)
    totals = found(estimator, x=x)[1]
    said = estimator.stderr(totals).square()
    real = (totals.mean(1) - TRACES[0]).square()
    assert abs(said.mean() - real.mean()) < 4 * math.hypot(said.std(), real.std()) / math.sqrt(len(x))


def test_xtrace_tells_no_error_of_its_own():
    """Its estimates share a range: where that misses one of a few equal directions, their spread is far too small."""
    q = torch.linalg.qr(MATRIX)[0]
    matrix = q[:, :5] @ q[:, :5].T
    totals = found(XTrace(8), lambda x: x @ matrix, X[:1].expand(2000, SIZE))[1]
    error = (totals.mean(1) - 5.0).square().mean().sqrt()
    spread = (totals.var(1).mean() / totals.shape[1]).sqrt()
    assert error > 1.25 * spread  # what a standard error from them would have to be within
    assert bool(XTrace(8).stderr(totals).isnan().all())


def test_deflation_pays_where_a_few_directions_rule():
    """Where singular values fall fast both have less than a tenth of Hutchinson's spread, at equal cost."""
    q = torch.linalg.qr(MATRIX)[0]
    matrix = q @ torch.diag(10.0 ** -torch.arange(SIZE, dtype=torch.float64)) @ q.T
    spread = [once(e, lambda x: x @ matrix, X[0], 500).std() for e in (Hutchinson(6), HutchPP(6), XTrace(6))]
    assert spread[1] < 0.1 * spread[0]
    assert spread[2] < 0.1 * spread[0]


@pytest.mark.parametrize(("estimator", "rank"), [(HutchPP, 0), (HutchPP, 2), (XTrace, 0), (XTrace, 1), (XTrace, 2)])
def test_deflation_is_exact_on_low_rank(estimator, rank):
    """Rank 2 <= probes/3 resp. <= probes/2 − 1, down to a network of zero weights."""
    left, right = MATRIX[:, :rank], MATRIX[rank : 2 * rank]
    traces = found(estimator(6), lambda x: x @ left @ right)[1]
    assert (traces - (left @ right).trace()).abs().max() < 1e-10


@pytest.mark.parametrize("estimator", [Hutchinson(1), HutchPP(6), XTrace(6)], ids=lambda e: type(e).__name__)
def test_multiples_of_the_identity_are_exact(estimator):
    """Most of what a denoiser's Jacobian is: what is left after deflation is tested by vectors of one length."""
    assert (found(estimator, lambda x: 3.0 * x)[1] - 3.0 * SIZE).abs().max() < 1e-10


@pytest.mark.parametrize("estimator", [HutchPP, XTrace])
def test_deflation_refuses_signs(estimator):
    with pytest.raises(ValueError, match=f"kind = 'rademacher'; {estimator.__name__} needs kind='gaussian'"):
        estimator(6, kind="rademacher")


def test_the_diagonal_is_exact_for_signs():
    scale = torch.arange(SIZE, dtype=torch.float64)
    assert (found(Hutchinson(1), lambda x: scale * x)[1] - scale.sum()).abs().max() < 1e-12


@Names("estimator", ESTIMATORS)
def test_forward_mode_equals_reverse_mode(estimator):
    """Hutchinson's form is vᵀJv either way; deflation takes the range of J or of Jᵀ, and is exact on a symmetric J."""
    other = type(estimator)(estimator.probes, kind=estimator.kind, mode="forward")
    if isinstance(estimator, HutchPP | XTrace):
        symmetric = MATRIX + MATRIX.T
        function = lambda x: torch.tanh(x) + x @ symmetric  # noqa: E731
    else:
        function = field
    reverse, forward = found(estimator, function)[1], found(other, function)[1]
    assert torch.allclose(reverse, forward, rtol=1e-9)


class Blind:
    """Networks whose graph reverse mode does not see."""

    @staticmethod
    def no_grad(x):
        with torch.no_grad():
            return field(x)

    @staticmethod
    def trained_head(x):
        with torch.no_grad():
            inner = field(x)
        return inner * torch.ones((), dtype=x.dtype, requires_grad=True)

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x @ MATRIX

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, tangent):
            return tangent @ MATRIX

    @staticmethod
    def forward_only(x):
        return torch.sin(Blind.Sine.apply(x)) * x


@pytest.mark.parametrize("net", [Blind.no_grad, Blind.trained_head, Blind.forward_only])
def test_networks_that_reverse_mode_does_not_see_go_forward(net):
    truth = found(Hutchinson(3))[1]
    estimator = Hutchinson(3)
    for _ in range(2):  # the second time it knows
        output, traces = found(estimator, net)
        assert torch.allclose(traces, truth, rtol=1e-12)
        assert torch.equal(output, field(X))
    with pytest.raises((ValueError, NotImplementedError)):
        found(Hutchinson(3, mode="reverse"), net)
    with pytest.raises((ValueError, NotImplementedError)):
        found(Hutchinson(3), net, x=X.clone().requires_grad_(), graph=True)


class Backward(torch.autograd.Function):
    """A sine with neither a forward mode nor a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


def backward(x):
    return Backward.apply(x) @ MATRIX


SINES = torch.stack([torch.func.jacrev(lambda x: x.sin() @ MATRIX)(row) for row in X])


def test_what_is_learnt_of_one_network_is_no_other_s():
    """One object for a network without a backward pass, one that vmap takes, and one with a backward pass alone."""
    given = Hutchinson(3)
    v = given.draw(X, Noise.of(0, 5))
    for net, truth in ((Blind.no_grad, JACOBIANS), (field, JACOBIANS), (backward, SINES)):
        again = resolve(given)
        assert again == given
        expected = torch.einsum("bki,bij,bkj->bk", v, truth, v)
        assert torch.allclose(found(again, net)[1], expected, rtol=1e-10)


@pytest.mark.parametrize(
    "net", [lambda x: torch.from_numpy(x.numpy().copy()), lambda x: torch.from_numpy(x.detach().numpy().copy())]
)
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_numpy_in_the_network_is_refused_with_words(net, mode):
    with pytest.raises(ValueError, match=r"does not depend on x for autograd.*remove no_grad, .* or NumPy"):
        found(Hutchinson(2, mode=mode), net)


@pytest.mark.parametrize("trainable", [False, True])
def test_an_output_that_autograd_cannot_trace_to_x_is_refused(trainable):
    weight = torch.ones((), requires_grad=trainable, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not depend on x for autograd, in reverse or in forward mode"):
        found(Exact(), lambda x: weight * x.detach())
    with pytest.raises(ValueError, match="does not depend on x for autograd"):
        found(Exact(), lambda x: weight * x.detach(), graph=True)


def test_a_network_s_own_errors_are_its_own():
    def broken(x):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        found(Hutchinson(2), broken)


@Names("estimator", [*ESTIMATORS, Hutchinson(1), Hutchinson(1, mode="forward")])
def test_one_call_gives_the_output_and_its_trace(estimator):
    calls = []

    def net(x):
        calls.append(len(x))
        return field(x)

    found(estimator, net)
    assert calls == [5]


@pytest.mark.parametrize("probes", [2, 5])
def test_batched_products_equal_single_ones(probes):
    """On a perceptron, which vmap takes, and on one with an operation that it does not."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(SIZE, 16), torch.nn.SiLU(), torch.nn.Linear(16, SIZE)).double()
    for net in (layers, lambda x: layers(Backward.apply(x))):
        estimator = Hutchinson(probes)
        v = estimator.draw(X, Noise.of(0, 5))
        together = estimator(net, X, v)[1]
        alone = torch.cat([Hutchinson(1)(net, X, v[:, k : k + 1])[1] for k in range(probes)], 1)
        assert torch.allclose(together, alone, rtol=1e-12)


def images(dtype=torch.float32):
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def convolutional():
    torch.manual_seed(0)
    conv = partial(torch.nn.Conv2d, kernel_size=3, padding=1)
    return torch.nn.Sequential(conv(2, 4), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), conv(4, 2))


@Names("estimator", [Exact(), Exact(mode="forward"), Hutchinson(3), HutchPP(6), XTrace(6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_images_of_any_memory_layout(estimator, layout):
    """The quadratic forms of the Jacobian written out; the rows of such tensors are no views of them."""
    net, x = convolutional().double(), images(torch.float64)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    plain = x.contiguous()
    jacobians = [torch.autograd.functional.jacobian(lambda z: net(z[None])[0], p).reshape(32, 32) for p in plain]
    traces = found(estimator, net, x)[1]
    if isinstance(estimator, Exact):
        expected = torch.stack([j.trace() for j in jacobians])[:, None]
    else:
        v = estimator.draw(plain, Noise.of(0, 3))
        linear = lambda z: torch.stack([j @ r for j, r in zip(jacobians, z, strict=True)])  # noqa: E731
        expected = estimator(linear, plain.flatten(1), v.flatten(2))[1]
    assert torch.allclose(traces, expected, rtol=1e-9)


def test_a_u_net_with_attention():
    """The bundled digits network: exact and Hutchinson's traces from its Jacobian, row by row."""
    flow = fs.adapters.load(fs.adapters.bundled("digits-condot"))
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    function = lambda v: flow.call(v, 0.6)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda z: function(z)[0], x, vectorize=False).reshape(64, 64)
    assert torch.allclose(found(Exact(), function, x)[1], jacobian.trace(), rtol=1e-4)
    v = Hutchinson(3).draw(x, Noise.of(0, 1))[0].flatten(1)
    expected = torch.einsum("ki,ij,kj->k", v, jacobian, v)
    assert torch.allclose(found(Hutchinson(3), function, x)[1][0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks(dtype):
    """Fed in their dtype, traced in float32: the float64 network's traces to the dtype's rounding."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(SIZE, 16), torch.nn.SiLU(), torch.nn.Linear(16, SIZE))
    traces = {}
    for kind in (dtype, torch.float64):
        fed = net.to(kind)
        flow = fs.Flow(lambda x, t, fed=fed: fed(x), fs.paths.CondOT(), dtype=kind)
        x = X.float() if kind == dtype else X
        for estimator in (Exact(), Hutchinson(3), Hutchinson(3, mode="forward")):
            traces.setdefault(kind, []).append(found(estimator, lambda v, flow=flow: flow.call(v, 0.5), x)[1])
    for half, full in zip(traces[dtype], traces[torch.float64], strict=True):
        assert half.dtype == torch.float32
        assert (half - full).abs().max() < 100 * torch.finfo(dtype).eps
        assert (half - full).abs().max() > 0.0


def test_probes_follow_their_samples():
    noise = Noise.of(3, 5)
    for estimator in (resolve("hutchinson", 2), HutchPP(6), XTrace(6)):
        whole = estimator(field, X, estimator.draw(X, noise))[1]
        index = torch.tensor([3, 0])
        part = estimator(field, X[index], estimator.draw(X[index], noise.select(index)))[1]
        assert torch.allclose(part, whole[index], rtol=1e-10)


def test_shared_probes_are_the_same_for_all_samples():
    own, shared = Hutchinson(3).draw(X, Noise.of(0, 5)), Hutchinson(3, shared=True).draw(X, Noise.of(0, 5))
    assert torch.equal(shared, shared[:1].expand_as(shared))
    assert not torch.equal(own[0], own[1])
    assert not torch.equal(shared[0, 0], shared[0, 1])
    again = Hutchinson(3, shared=True).draw(X[:2], Noise.of(0, [7, 4]))
    assert torch.equal(again[0], shared[0])


def test_a_sample_that_is_not_finite_disturbs_no_other():
    x = X.clone()
    x[1] = math.nan
    for estimator in ESTIMATORS:
        traces, clean = found(estimator, x=x)[1], found(estimator)[1]
        assert traces[1].isnan().all()
        assert torch.allclose(traces[[0, 2, 3, 4]], clean[[0, 2, 3, 4]], rtol=1e-9)


@Names("estimator", ESTIMATORS)
def test_derivatives_of_the_trace(estimator):
    """∂/∂x of an estimate by its graph is that by finite differences; without a graph there is none."""
    v = estimator.draw(X, Noise.of(0, 5))
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(estimator(field, x, v, graph=True)[1].sum(), x)
    e = torch.randn(X.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    up, down = (estimator(field, X + h * e, v)[1].sum() for h in (1e-5, -1e-5))
    assert abs((slope * e).sum() - (up - down) / 2e-5) < 1e-5 * (1.0 + slope.norm())
    output, traces = estimator(field, x, v)
    assert not output.requires_grad
    assert not traces.requires_grad


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: resolve("slq"), ValueError, "'slq' is not known; expected one of 'exact', 'hutchinson'"),
        (lambda: resolve("hutchinson", 0), ValueError, "probes = 0; expected an integer >= 1"),
        (lambda: resolve("hutchinson", 1.5), ValueError, "probes = 1.5; expected an integer"),
        (lambda: resolve("hutchinson", True), ValueError, "probes = True"),
        (lambda: resolve("hutch++", 3), ValueError, "probes = 3; expected an integer >= 6 and a multiple of 3"),
        (lambda: resolve("hutch++", 8), ValueError, "multiple of 3"),
        (lambda: resolve("xtrace", 5), ValueError, "probes = 5; expected an integer >= 4 and a multiple of 2"),
        (lambda: resolve("exact", 4), TypeError, "probes = 4 beside trace='exact', which draws none; drop it"),
        (lambda: resolve(Hutchinson(2), 3), TypeError, "probes = 3 beside Hutchinson.*give one"),
        (lambda: Hutchinson(2, kind="uniform"), ValueError, "kind = 'uniform'; expected one of 'rademacher'"),
        (lambda: Hutchinson(2, mode="jvp"), ValueError, "mode = 'jvp'; expected one of 'auto', 'reverse', 'forward'"),
        (lambda: found(XTrace(8), lambda x: x, X[:, :3]), ValueError, "8 products on 3 numbers; use trace='exact'"),
        (lambda: Hutchinson(2)(field, X, None), ValueError, "needs the probes that draw gives"),
        (lambda: found(Hutchinson(2, mode="forward"), graph=True), ValueError, "use mode='reverse' beside grad=True"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_names_and_objects_are_the_same_estimators():
    assert resolve("exact") == Exact()
    assert resolve("hutchinson") == Hutchinson(1)
    assert resolve("hutch++", 9) == HutchPP(9)
    assert resolve("xtrace", 4) == XTrace(4)
    assert isinstance(resolve("xtrace"), Trace)


@pytest.mark.parametrize("solver", ["auto", "rk4"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("count", [1, 4])
def test_autocast_reaches_the_network_alone(count: int, trace: str, solver: str) -> None:
    """Within autocast the result is, to the bit, that of a network which has autocast around itself."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))

    def inside(x, t):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    options = {"solver": solver, "trace": trace, "nfe": 24}
    x = torch.randn(count, 8)
    right = fs.log_prob(fs.Flow(inside, fs.paths.CondOT()), x, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = fs.log_prob(fs.Flow(lambda x, t: net(x).float(), fs.paths.CondOT()), x, **options)
    assert torch.equal(found.log_prob, right.log_prob)
    assert torch.equal(found.error, right.error) or bool(found.error.isnan().all())  # of Runge–Kutta solvers


def test_quantiles_of_student() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 7, 30, 200):
        for level in (0.5, 0.6827, 0.95, 0.99):
            right = stats.t.ppf(0.5 + 0.5 * level, freedom)
            assert student(level, freedom) == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("level", [0.6827, 0.95])
@pytest.mark.parametrize("probes", [2, 4, 8])
def test_intervals_cover(probes: int, level: float) -> None:
    """Of 512 Gaussian probes' means around the exact density, as many as they say, within three binomial errors.

    Gaussian probes in 64 dimensions, whose estimates are nearly normal.
    """
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.float64) / 8.0
    flow = fs.Flow(lambda x, t: -x + 0.3 * (x @ weight).sin(), fs.paths.CondOT())
    x = torch.randn(512, 64, dtype=torch.float64)
    kind = fs.likelihood.Hutchinson(probes, kind="gaussian")
    out = fs.log_prob(flow, x, solver="rk4", nfe=16, trace=kind)
    truth = fs.log_prob(flow, x, solver="rk4", nfe=16, trace="exact").log_prob
    low, high = out.interval(level)
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert abs(covered - level) < 3.0 * math.sqrt(level * (1.0 - level) / len(x)) + 0.01  # not quite normal
    single = fs.log_prob(flow, x[:2], solver="rk4", nfe=16)
    assert all(bool(end.isnan().all()) for end in single.interval())
    with pytest.raises(ValueError, match=r"level = 95"):
        single.interval(95)
