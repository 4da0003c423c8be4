"""Softmax regression on MNIST or Fashion-MNIST: one dense layer, plain gradient descent."""
from __future__ import annotations

import sys
from argparse import Namespace

import graphflow as gf
from graphflow.examples._mnist import classifier, train


def build(args: Namespace | None = None) -> gf.Model:
    """784 pixels to 10 classes."""
    x = gf.input("x", (gf.dim("N"), 784))
    return classifier(x, gf.nn.dense(x, 10), gf.optim.SGD(0.1), args)


def main(args: Namespace) -> None:
    """Trains and tests."""
    train(build(args), args, (784,), epochs=10, batch_size=128)


if __name__ == "__main__":
    from graphflow.cli import main as cli
    sys.exit(cli(["run", "softmax_regression", *sys.argv[1:]]))
