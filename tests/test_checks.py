"""flow.check() finds a wrong convention and names the right one."""

import pytest
import torch

import flowsolve as fs
from flowsolve import paths
from flowsolve.problems import GaussianMixture

MIXTURE = GaussianMixture(torch.tensor([[0.9, -0.7, 0.6], [-0.8, 0.5, -0.9], [0.7, 0.8, -0.6]]), 0.15)
DATA = MIXTURE.sample(64, seed=0)
PATHS = [paths.CondOT(), paths.VP(), paths.VE(sigma_min=0.02, sigma_max=20.0), paths.Discrete.linear(), paths.Cosine()]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data", "v"])
def test_right_conventions_pass_on_every_path(path, prediction):
    report = MIXTURE.flow(path, prediction).check(DATA)
    assert report.ok, report.message
    assert report.error < 0.8
    assert "fit" in str(report)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("true", ["velocity", "noise", "data", "v"])
def test_a_wrong_prediction_is_named(path, true):
    net = MIXTURE.flow(path, true).net
    for said in {"velocity", "noise", "data", "v"} - {true}:
        report = fs.Flow(net, path, said).check(DATA)
        assert not report.ok
        assert report.best == (true, "declared", "data as given")
        assert f"prediction '{true}' instead of '{said}'" in report.message


def test_a_wrong_time_direction_is_named():
    net = MIXTURE.flow(paths.CondOT()).net
    report = fs.Flow(lambda x, t: net(x, 1.0 - t), paths.CondOT()).check(DATA)
    assert not report.ok
    assert report.best[1] in ("flow, reversed", "native, reversed")


def test_the_velocity_towards_the_noise_is_named():
    """diffusers' convention: time runs from data to noise and the output is ε − z."""
    net = MIXTURE.flow(paths.CondOT()).net
    report = fs.Flow(lambda x, t: -net(x, 1.0 - t), paths.CondOT()).check(DATA)
    assert not report.ok
    assert report.best[0] == "minus velocity"
    assert "reversed" in report.best[1]


def test_a_clock_of_a_thousand_is_named():
    net = MIXTURE.flow(paths.CondOT()).net

    def counts_to_a_thousand(x, t):
        return net(x, (t / 1000.0).clamp(0, 1))

    report = fs.Flow(counts_to_a_thousand, paths.CondOT()).check(DATA)
    assert not report.ok
    assert report.best[1] == "1000 × flow"
    assert "time '1000 × flow' instead of 'declared'" in report.message


def test_a_native_clock_is_named():
    path = paths.Discrete.linear()
    net = MIXTURE.flow(path, "noise").net
    report = fs.Flow(lambda x, k: net(x, path.time_from_native(k.clamp(0, 999))), path, "noise").check(DATA)
    assert not report.ok
    assert report.best == ("noise", "native", "data as given")


def test_a_wrong_data_scale_is_named():
    report = MIXTURE.flow(paths.CondOT(), "data").check((DATA + 1) / 2)
    assert not report.ok
    assert report.best[2] == "data mapped from [0, 1] to [-1, 1]"


def test_an_embedding_table_that_ends_is_not_an_error():
    path = paths.Discrete.linear()
    net = MIXTURE.flow(path, "noise").net
    table = torch.nn.Embedding(1000, 1)

    def embeds(x, k):
        return net(x, path.time_from_native(k)) + 0.0 * table(k.long())

    flow = fs.Flow(embeds, path, "noise", time="native")
    assert flow.check(DATA).ok


def test_an_untrained_network_fits_nothing():
    report = fs.Flow(lambda x, t: torch.zeros_like(x), paths.CondOT()).check(DATA)
    assert not report.ok


def test_data_in_other_units_are_named_before_any_convention_is_blamed():
    report = MIXTURE.flow(paths.CondOT()).check(255 * (DATA + 1) / 2)
    assert not report.ok
    assert "far outside the declared data_range (-1, 1)" in report.message


def test_a_network_that_fails_as_declared_says_why():
    with pytest.raises(ValueError, match="the network returned shape"):
        fs.Flow(lambda x, t: x[:, :1], paths.CondOT()).check(DATA)


@pytest.mark.parametrize("name", fs.adapters.BUNDLED)
def test_the_bundled_checkpoints_are_what_their_files_declare(name):
    flow = fs.adapters.load(fs.adapters.bundled(name))
    images = fs.problems.digits.load("held_out").images[:32]
    data = fs.problems.digits.dequantize(images, torch.Generator().manual_seed(0))
    report = flow.check(data)
    assert report.ok, report.message
    wrong = fs.Flow(flow.net, flow.path, "velocity", time=flow.clock).check(data)
    assert not wrong.ok
