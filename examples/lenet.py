"""LeNet, in its modern form, on MNIST or Fashion-MNIST: two convolutions, max-pooling, two dense layers."""
from __future__ import annotations

import sys
from argparse import Namespace

import graphflow as gf
from graphflow.examples._mnist import classifier, train


def build(args: Namespace | None = None) -> gf.Model:
    """20 and 50 channels of 5x5 windows, 500 hidden units, half of them dropped while training. LeCun,
    Bottou, Bengio and Haffner, 1998."""
    x = gf.input("x", (gf.dim("N"), 1, 28, 28))
    h = gf.nn.max_pool2d(gf.nn.conv2d(x, 20, 5), 2)
    h = gf.nn.relu(gf.nn.max_pool2d(gf.nn.conv2d(h, 50, 5), 2))
    h = gf.nn.dense(gf.nn.flatten(h), 500, gf.nn.relu, weight_init=gf.init.he_normal)
    return classifier(x, gf.nn.dense(gf.nn.dropout(h, 0.5), 10), gf.optim.Adam(0.001), args)


def main(args: Namespace) -> None:
    """Trains and tests."""
    train(build(args), args, (1, 28, 28), epochs=10, batch_size=64)


if __name__ == "__main__":
    from graphflow.cli import main as cli
    sys.exit(cli(["run", "lenet", *sys.argv[1:]]))
