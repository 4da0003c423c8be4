"""A convolutional net that reads handwritten digits; trains in seconds, on data that comes along."""
from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

import graphflow as gf

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
OUT = Path("out", "digits")
BATCH = 32


def build(args: Namespace | None = None) -> gf.Model:
    """Two 3x3 convolutions, max-pooling, two dense layers."""
    n = gf.dim("N")
    x, y = gf.input("x", (n, 1, 8, 8)), gf.input("y", (n,), "int64")
    h = gf.nn.conv2d(x, 16, 3, padding="same", activation=gf.nn.relu)
    h = gf.nn.conv2d(h, 32, 3, padding="same", activation=gf.nn.relu)
    h = gf.nn.flatten(gf.nn.max_pool2d(h, 2))
    h = gf.nn.dropout(gf.nn.dense(h, 64, gf.nn.relu, weight_init=gf.init.he_normal), 0.3)
    logits = gf.nn.dense(h, 10)
    return gf.Model(x, gf.softmax(logits), gf.loss.softmax_cross_entropy(logits, y), targets=y,
                    optimizer=gf.optim.Adam(0.002), metrics={"accuracy": gf.metrics.accuracy(logits, y)},
                    device=args.device if args else "cpu", threads=args.threads if args else None,
                    tune=args.tune if args else False)


def load(path: Path = DATA) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """((images, digits) to train on, (images, digits) held out): every fifth row of a fixed random order is
    held out. Images are [rows, 1, 8, 8], 0 to 1."""
    table = gf.data.load_csv(path)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(table))
    images = (table[:, :64] / 16).reshape(-1, 1, 8, 8)
    digits = table[:, 64].astype(np.int64)
    held, rest = order[::5], np.delete(order, np.s_[::5])
    return (images[rest], digits[rest]), (images[held], digits[held])


def main(args: Namespace) -> None:
    """Trains, tests, and writes the misread digits and the compiler's stages to out/digits."""
    train, test = load(Path(args.data) if args.data else DATA)
    model = build(args)
    epochs = args.epochs or (3 if args.quick else 20)
    history = model.fit(train, epochs, BATCH)
    steps = -(-len(train[0]) // BATCH)
    print(f"test accuracy {model.evaluate(test)['accuracy']:.2%} on {len(test[0])} digits that were held out")
    peak = model.step.peak_bytes(N=BATCH)
    print(f"working memory of a training step: {peak / 1024:.0f} KiB, planned ahead")
    print(f"{min(history['seconds']) / steps * 1000:.3f} ms a step with batches of {BATCH} on {args.device}")
    print(f"misread digits: {_show_misread(test, model.predict(test[0]))}")
    print(f"the compiler's stages: {model.step.dump(OUT / 'dump')[0].parent}")


def _show_misread(test: tuple[np.ndarray, np.ndarray], chances: np.ndarray) -> Path:
    """Draws the digits that were read wrongly; as text where matplotlib is missing. Returns the file's
    path."""
    said = chances.argmax(1)
    wrong = np.flatnonzero(said != test[1])[:24]
    captions = [f"{test[1][i]} read as {said[i]}" for i in wrong]
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        path = OUT / "misread.txt"
        shades = np.array(list(" .:-=+*#%@"))
        drawn = ["\n".join("".join(row) for row in shades[(test[0][i, 0] * 9).astype(int)]) for i in wrong]
        path.write_text("\n\n".join(f"{c}\n{d}" for c, d in zip(captions, drawn)) + "\n")
        return path
    columns = min(max(len(wrong), 1), 6)
    rows = max(-(-len(wrong) // columns), 1)
    figure = Figure(figsize=(1.5 * columns, 1.7 * rows))
    for place, (i, caption) in enumerate(zip(wrong, captions), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(test[0][i, 0], cmap="gray_r")
        axes.set_title(caption, fontsize=8)
        axes.set_axis_off()
    path = OUT / "misread.png"
    figure.savefig(path)
    return path


if __name__ == "__main__":
    from graphflow.cli import main as cli
    sys.exit(cli(["run", "digits", *sys.argv[1:]]))
