"""A multilayer perceptron on MNIST or Fashion-MNIST: 784-512-512-10 with ReLU, dropout and Adam."""
from __future__ import annotations

import sys
from argparse import Namespace

import graphflow as gf
from graphflow.examples._mnist import classifier, train


def build(args: Namespace | None = None) -> gf.Model:
    """Two hidden layers of 512 units."""
    x = gf.input("x", (gf.dim("N"), 784))
    h = gf.nn.dense(x, 512, gf.nn.relu, weight_init=gf.init.he_normal)
    h = gf.nn.dense(gf.nn.dropout(h, 0.2), 512, gf.nn.relu, weight_init=gf.init.he_normal)
    return classifier(x, gf.nn.dense(gf.nn.dropout(h, 0.2), 10), gf.optim.Adam(0.001), args)


def main(args: Namespace) -> None:
    """Trains and tests."""
    train(build(args), args, (784,), epochs=10, batch_size=128)


if __name__ == "__main__":
    from graphflow.cli import main as cli
    sys.exit(cli(["run", "mlp", *sys.argv[1:]]))
