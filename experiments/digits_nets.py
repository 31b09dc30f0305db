"""The feature networks of the embedded digits in assets/, and the commands that made them.

    python experiments/digits_nets.py --kind cnn --seed 0 --out assets/digits_cnn.pt     the network of all tables
    python experiments/digits_nets.py --kind mlp --seed 1 --out assets/digits_mlp.pt     another family, trained apart: the referee
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import digits, to_float
from features import DigitsNet


def main(args, epochs=60):
    """Train on the first 1,437 digits, print the accuracy on the last 360 (other writers), save float16 weights."""
    data, g = digits(), torch.Generator().manual_seed(args.seed)
    x, y = to_float(data.x), data.y
    torch.manual_seed(args.seed)
    net = DigitsNet(args.kind)
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=epochs * 15)
    for _ in range(epochs):
        for index in torch.randperm(1437, generator=g)[:1425].view(15, 95):
            noisy = x[index] + 0.2 * torch.randn(95, 1, 8, 8, generator=g)
            loss = F.cross_entropy(net.head(net.body(noisy)), y[index])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    net.eval()
    right = net.head(net.body(x[1437:])).argmax(1) == y[1437:]
    print(f"{net.name}: accuracy {right.double().mean():.3f} on the 360 held-out digits")
    torch.save({k: v.half() for k, v in net.state_dict().items()}, args.out)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=["cnn", "mlp"], default="cnn")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True)
    main(p.parse_args())
