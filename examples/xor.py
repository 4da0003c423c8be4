"""Exclusive or, the smallest net that needs a hidden layer: no data file, done in a second."""
from __future__ import annotations

import sys
from argparse import Namespace

import numpy as np

import graphflow as gf


def build(args: Namespace | None = None) -> gf.Model:
    """Two inputs, 8 hidden units, one output."""
    n = gf.dim("N")
    x, y = gf.input("x", (n, 2)), gf.input("y", (n, 1))
    logit = gf.nn.dense(gf.nn.dense(x, 8, gf.nn.tanh), 1)
    loss = gf.loss.binary_cross_entropy_from_logits(logit, y)
    return gf.Model(x, gf.sigmoid(logit), loss, targets=y, optimizer=gf.optim.SGD(0.5, momentum=0.9),
                    metrics={"accuracy": gf.metrics.binary_accuracy(logit, y)},
                    device=args.device if args else "cpu", threads=args.threads if args else None,
                    tune=args.tune if args else False)


def main(args: Namespace) -> None:
    """Trains on the four cases and prints what the net says to each."""
    model = build(args)
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    y = np.array([[0], [1], [1], [0]], np.float32)
    history = model.fit((x, y), args.epochs or (100 if args.quick else 300), batch_size=4, progress=False)
    for (a, b), said in zip(x, model.predict(x)[:, 0]):
        print(f"{a:.0f} xor {b:.0f} = {said:.3f}")
    print(f"loss {history['loss'][-1]:.5f}, accuracy {history['accuracy'][-1]:.0%}")


if __name__ == "__main__":
    from graphflow.cli import main as cli
    sys.exit(cli(["run", "xor", *sys.argv[1:]]))
