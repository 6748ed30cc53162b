"""A trained model of a uniform density has no likelihood above it: the ×2 checkerboard's floor is ln 32 nats."""

import math

import pytest
import torch
from torch import nn

import flowsolve as fs
from flowsolve import problems, solvers
from flowsolve.training import cfm_loss

BOARD = problems.checkerboard()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        )

    def forward(self, x, t):
        return self.layers(torch.cat((x, t.unsqueeze(1)), 1))


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    net = Net()
    made = fs.Flow(net, fs.paths.CondOT(), "velocity")
    steps, generator = 1500, torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        loss = cfm_loss(made, BOARD.sample(512, seed=step), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return made


def test_a_trained_flow_stays_above_the_floor(flow):
    """−E log p_model = ln 32 + KL: above ln 32 by more than its error, below the ln 64 of the bare square."""
    x = BOARD.sample(1000, seed=10**6)
    out = fs.log_prob(flow, x, solver=solvers.Dopri5(1e-4, 1e-4), trace="exact")
    nats = -out.log_prob.double()
    error = float(nats.std()) / math.sqrt(len(x))
    assert BOARD.entropy == pytest.approx(math.log(32.0))
    assert float(nats.mean()) - 3 * error > math.log(32.0)
    assert float(nats.mean()) < math.log(64.0)


def test_its_variational_bound_is_no_better_than_the_floor(flow):
    x = BOARD.sample(1000, seed=10**6 + 1)
    out = fs.variational_bound(flow, x, draws=32, data_std=2.3)
    assert out.mean + 4 * out.mean_draw_stderr > math.log2(32.0) / 2
