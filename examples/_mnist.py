"""What the examples on MNIST and Fashion-MNIST share: reading the data, training, and telling how it went."""
from __future__ import annotations

from argparse import Namespace

import numpy as np

import graphflow as gf


def load(args: Namespace, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Images as float32 of that shape, 0 to 1, and labels; a small part of both with --quick."""
    if not args.data:
        raise gf.UseError("this example needs --data FOLDER: the four files of MNIST or Fashion-MNIST in "
                          "IDX form")
    arrays = gf.data.load_idx_folder(args.data)
    for part, rows in (("train", 2000), ("test", 1000)):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.shape[1:] != (28, 28):
            raise gf.DataError(f"{args.data}: the images are {list(images.shape[1:])}, not [28, 28]")
        if args.quick:
            images, labels = images[:rows], labels[:rows]
        arrays[f"{part}_images"] = (images.reshape(-1, *shape) / 255).astype(np.float32)
        arrays[f"{part}_labels"] = labels.astype(np.int64)
    return arrays


def train(model: gf.Model, args: Namespace, shape: tuple[int, ...], epochs: int, batch_size: int) -> None:
    """Trains, and prints what came of it."""
    data = load(args, shape)
    epochs = args.epochs or (1 if args.quick else epochs)
    train_data = (data["train_images"], data["train_labels"])
    history = model.fit(train_data, epochs, batch_size)
    steps = epochs * -(-len(train_data[0]) // batch_size)
    found = model.evaluate((data["test_images"], data["test_labels"]), 500)
    print(f"{steps} steps in {sum(history['seconds']):.1f} s, loss {history['loss'][-1]:.4f}")
    print(f"test accuracy {found['accuracy']:.2%}")


def classifier(x: gf.Tensor, logits: gf.Tensor, optimizer: gf.optim.Optimizer,
               args: Namespace | None) -> gf.Model:
    """A model that predicts the probabilities of 10 classes, trained with the cross-entropy."""
    y = gf.input("y", x.shape[:1], "int64")
    return gf.Model(x, gf.softmax(logits), gf.loss.softmax_cross_entropy(logits, y), targets=y,
                    optimizer=optimizer,
                    metrics={"accuracy": gf.metrics.accuracy(logits, y)},
                    device=args.device if args else "cpu",
                    threads=args.threads if args else None, tune=args.tune if args else False)
