"""The feature networks of the embedded digits in assets/, and the commands that made them.

    python -m experiments.digits_nets --kind cnn --seed 0 --out assets/digits_cnn.pt
    python -m experiments.digits_nets --kind mlp --seed 1 --out assets/digits_mlp.pt

The first is the network of all tables. The second is of another family and trained apart from it:
the referee.
"""
import argparse

import torch
import torch.nn.functional as F

from kit.data import digits, to_float
from kit.features import DigitsNet

TRAINING = 1437           # the other 360 digits are of other writers
BATCHES, BATCH = 15, 95   # of an epoch


def main(args, epochs=60):
    """Train on the first 1,437 digits, print the accuracy on the last 360, save float16 weights."""
    data = digits()
    x, y = to_float(data.x), data.y
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    net = DigitsNet(args.kind)
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=epochs * BATCHES)
    for _ in range(epochs):
        order = torch.randperm(TRAINING, generator=generator)
        for index in order[:BATCHES * BATCH].view(BATCHES, BATCH):
            noisy = x[index] + 0.2 * torch.randn(BATCH, 1, 8, 8, generator=generator)
            loss = F.cross_entropy(net.head(net.body(noisy)), y[index])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    net.eval()
    right = net.head(net.body(x[TRAINING:])).argmax(1) == y[TRAINING:]
    print(f"{net.name}: accuracy {right.double().mean():.3f} on the 360 held-out digits")
    torch.save({k: v.half() for k, v in net.state_dict().items()}, args.out)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=["cnn", "mlp"], default="cnn")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True)
    main(p.parse_args())
