"""models.py and solvers.py work when each is the only file of ours in a folder."""
import shutil

import pytest
from conftest import ROOT
from processes import script

SOLVERS = """
import torch
from solvers import guide, make_schedule, predictor, sample_states, solver_grid

class Net:
    num_classes = 10
    def __call__(self, x, t, y):
        return torch.tanh(x + y.view(-1, 1, 1, 1) / 10) * (t.view(-1, 1, 1, 1) / 1000)

torch.manual_seed(0)
schedule = make_schedule("linear")
y = torch.tensor([1, 2])
predict = predictor(guide(Net(), 2.0), y, schedule)
grid = solver_grid(schedule, "ddim", 10)
states = sample_states(predict, torch.randn(2, 3, 4, 4), schedule, grid)
assert len(states) == 11 and all(x.shape == (2, 3, 4, 4) for x in states)
assert states[-1].isfinite().all() and not torch.equal(states[0], states[-1])
"""

MODELS = """
import torch
from models import build, fill_random, make_arch

net = fill_random(build(make_arch("DiT-Ti/2", 8, 3, 10, False)))
seen = []

def tap(l, h):
    seen.append((l, h.shape[0]))
    return h

x = torch.randn(2, 3, 8, 8)
t = torch.tensor([3, 700])
y = torch.tensor([1, 10])
out = net(x, t, y, tap=tap)
assert out.shape == x.shape and out.abs().sum() > 0
assert seen == [(l, 2) for l in range(len(net.blocks) + 1)]
torch.testing.assert_close(out, net(x, t, y))
"""


@pytest.mark.parametrize("name, program", [("solvers.py", SOLVERS), ("models.py", MODELS)])
def test_copied_alone(tmp_path, name, program):
    shutil.copy(ROOT / name, tmp_path)
    script("-c", program, cwd=tmp_path, env={"PYTHONPATH": ""})
