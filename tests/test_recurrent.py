"""Recurrent layers against PyTorch: outputs, last states, all gradients; masks, carried states, cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graphflow as gf

DEVICES = pytest.mark.parametrize(
    "device",
    [pytest.param("reference", marks=pytest.mark.reference), pytest.param("cpu", marks=pytest.mark.cpu)],
)
KINDS = pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
PRECISION = {"float64": 1e-10, "float32": 1e-5}
T, N, FEATURES, UNITS = 100, 3, 5, 8


def close(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert found.shape == expected.shape and found.dtype == dtype
    assert np.abs(found - expected).max() <= PRECISION[dtype] * np.abs(expected).max()


def net(kind: str, x: gf.Tensor, **options: Any) -> tuple[gf.Tensor, list[gf.Tensor]]:
    out, last = getattr(gf.nn, kind)(x, UNITS, name="r", **options)
    return out, [last] if isinstance(last, gf.Tensor) else list(last)


def torch_layer(
    torch: Any, kind: str, store: gf.Store, layers: int, both: bool
) -> tuple[Any, dict[str, Any]]:
    """PyTorch's layer with the weights of the Store, and its parameters by the Store's names."""
    made = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
    layer = made(FEATURES, UNITS, layers, bidirectional=both).to(
        getattr(torch, str(store[next(n for n in store if n.endswith("Wx"))].dtype))
    )
    named = {}
    for number in range(layers):
        for way in range(1 + both):
            ours = "r." + (f"{number}." if layers > 1 or both else "") + "backward." * way
            theirs = f"_l{number}" + "_reverse" * way
            named.update(
                {
                    ours + "Wx": getattr(layer, "weight_ih" + theirs),
                    ours + "b": getattr(layer, "bias_ih" + theirs),
                    ours + "Wh": getattr(layer, "weight_hh" + theirs),
                    ours + "bn": getattr(layer, "bias_hh" + theirs),
                }
            )
    with torch.no_grad():
        for name, p in named.items():
            if name.endswith("bn"):
                p.zero_()
                if kind == "gru":
                    p[2 * UNITS :] = torch.tensor(store[name])
            else:
                p.copy_(torch.tensor(store[name].T))
    return layer, named


@DEVICES
@KINDS
@pytest.mark.parametrize(
    "layers, both, dtype", [(1, False, "float64"), (2, True, "float64"), (2, True, "float32")]
)
def test_layers_and_their_gradients_equal_pytorchs(
    kind: str, layers: int, both: bool, dtype: str, device: str
) -> None:
    torch = pytest.importorskip("torch")
    rng, count = np.random.default_rng(0), layers * (1 + both)
    batch = gf.dim("N")
    states = 2 if kind == "lstm" else 1
    x = gf.input("x", (T, batch, FEATURES), dtype)
    initial = [gf.input(f"s{i}", (count, batch, UNITS), dtype) for i in range(states)]
    w = gf.input("w", (T, batch, UNITS * (1 + both)), dtype)
    out, last = net(
        kind, x, layers=layers, bidirectional=both, initial=initial, bias_init=gf.init.normal(0.5)
    )
    loss = (out * w).sum() + sum((s * s).sum() for s in last)
    parameters = gf.optim.trainable(loss)
    program = gf.function(
        [x, *initial, w], [out, *last, *gf.grad(loss, [x, *initial, *parameters])], device=device
    )
    arrays = [
        rng.standard_normal((T, N, FEATURES)),
        *(rng.standard_normal((count, N, UNITS)) for _ in initial),
        rng.standard_normal((T, N, UNITS * (1 + both))),
    ]
    arrays = [a.astype(dtype) for a in arrays]
    for name in program.store:
        if name.endswith("bn"):
            program.store[name] = rng.standard_normal(UNITS)
    found = program(*arrays)

    layer, named = torch_layer(torch, kind, program.store, layers, both)
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    state = tuple(tensors[1:-1])
    outputs, ends = layer(tensors[0], state if kind == "lstm" else state[0])
    ends = ends if isinstance(ends, tuple) else (ends,)
    ((outputs * tensors[-1]).sum() + sum((s * s).sum() for s in ends)).backward()
    expected = [outputs, *ends, *(t.grad for t in tensors[:-1])]
    for p in parameters:
        slope = named[p.name].grad.numpy().T
        expected.append(torch.tensor(slope[2 * UNITS :] if p.name.endswith("bn") else slope))
    assert len(parameters) == len(found) - 1 - 2 * states - 1 == (4 if kind == "gru" else 3) * count
    for f, e in zip(found, expected):
        close(f, e.detach().numpy(), dtype)


@DEVICES
@KINDS
def test_sequences_of_unequal_length_equal_packed_ones(kind: str, device: str) -> None:
    torch = pytest.importorskip("torch")
    rng, steps = np.random.default_rng(1), gf.dim("T")
    lengths = np.array([7, 1, 4])
    x, n = gf.input("x", (steps, 3, FEATURES), "float64"), gf.input("n", (3,), "int64")
    out, last = net(kind, x, layers=2, bidirectional=True, lengths=n)
    by_x = gf.grad((out * out).sum() + sum((s * s).sum() for s in last), x)
    program = gf.function([x, n], [out, *last, by_x], device=device)
    data = rng.standard_normal((7, 3, FEATURES))
    found = program(data, lengths)
    layer, _ = torch_layer(torch, kind, program.store, 2, True)
    tensor = torch.tensor(data, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(tensor, torch.tensor(lengths), enforce_sorted=False)
    outputs, ends = layer(packed)
    outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs)
    ends = ends if isinstance(ends, tuple) else (ends,)
    ((outputs * outputs).sum() + sum((s * s).sum() for s in ends)).backward()
    for f, e in zip(found, [outputs, *ends, tensor.grad]):
        close(f, e.detach().numpy(), "float64")


@DEVICES
@KINDS
def test_a_state_carried_over_continues_the_sequence(kind: str, device: str) -> None:
    rng = np.random.default_rng(2)
    x = gf.input("x", (10, 2, FEATURES), "float64")
    build = gf.nn.shared(lambda part, start: net(kind, part, initial=start))
    whole, end = build(x, None)
    first, middle = build(x[:6], None)
    second, late = build(x[6:], middle)
    found = gf.function([x], [whole, gf.concatenate([first, second]), *end, *late], device=device)(
        rng.standard_normal((10, 2, FEATURES))
    )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    for e, late_end in zip(found[2 : 2 + len(end)], found[2 + len(end) :]):
        np.testing.assert_allclose(e, late_end, rtol=1e-12)


@DEVICES
def test_reverse_reads_from_the_last_step(device: str) -> None:
    x = gf.input("x", (6, 2, FEATURES), "float64")
    build = gf.nn.shared(lambda part, way: gf.nn.gru(part, UNITS, reverse=way, name="r")[0])
    backward, mirrored = build(x, True), gf.flip(build(gf.flip(x, 0), False), 0)
    found = gf.function([x], [backward, mirrored], device=device)(
        np.random.default_rng(3).random((6, 2, FEATURES))
    )
    np.testing.assert_array_equal(*found)


@DEVICES
def test_cells_in_a_loop_are_the_layers(device: str) -> None:
    x = gf.input("x", (6, 2, FEATURES), "float64")
    zero = gf.zeros((2, UNITS), "float64")
    layer, _ = gf.nn.lstm(x, UNITS, name="a")
    weights = {f"{p}_init": v for p, v in zip(("weight", "recurrent", "bias"), gf.optim.trainable(layer))}

    def step(state: Any, row: gf.Tensor) -> Any:
        state = gf.nn.lstm_cell(row, state, **weights)
        return state, state[0]

    def gated(state: gf.Tensor, row: gf.Tensor) -> Any:
        state = gf.nn.gru_cell(row, state, name="cell")
        return state, state

    _, looped = gf.scan(step, (zero, zero), x)
    _, rows = gf.scan(gated, zero, x)
    found = gf.function([x], [layer, looped, rows], device=device)(
        np.random.default_rng(4).random((6, 2, FEATURES))
    )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert found[2].shape == (6, 2, UNITS) and np.abs(found[2]).max() < 1


@DEVICES
def test_checkpointed_gradients_are_the_same(device: str) -> None:
    x = gf.input("x", (11, 2, FEATURES), "float64")

    def slope(checkpoint: int | None) -> gf.Tensor:
        out = gf.nn.shared(lambda: gf.nn.lstm(x, UNITS, name="r", checkpoint=checkpoint)[0])()
        return gf.grad((out * out).sum(), x)

    data = np.random.default_rng(5).random((11, 2, FEATURES))
    stores = [gf.Store(seed=3) for _ in range(2)]
    plain, kept = (
        gf.function([x], slope(k), device=device, store=s)(data) for k, s in zip((None, 4), stores)
    )
    np.testing.assert_allclose(plain, kept, rtol=1e-12)


@pytest.mark.cpu
def test_dropout_lies_between_the_layers_in_training_only() -> None:
    x = gf.input("x", (4, 2, FEATURES))
    out, _ = gf.nn.lstm(x, UNITS, layers=2, dropout=0.5)
    loss = out.sum()
    step = gf.function([x], out, gf.optim.SGD(0.0).minimize(loss))
    still = gf.function([x], out, store=step.store)
    data = np.random.default_rng(6).random((4, 2, FEATURES)).astype(np.float32)
    assert not np.array_equal(step(data), step(data))
    np.testing.assert_array_equal(still(data), still(data))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda x: gf.nn.lstm(x[0], 4), "takes sequences \\[T, N, features\\], not 2 axes"),
        (lambda x: gf.nn.lstm(x, 4, initial=x), "initial holds 1 states, not 2"),
        (lambda x: gf.nn.gru(x, 4, initial=x), "expected \\[1, 2, 4\\], got"),
        (lambda x: gf.nn.gru(x, 4, bidirectional=True, reverse=True), "runs both ways already"),
        (lambda x: gf.nn.rnn(x, 4, mask=x[..., 0]), "the mask holds bools, not float32"),
        (lambda x: gf.nn.rnn(x, 4, lengths=gf.input("n", (3,), "int64")), "lengths are integers \\[N\\]"),
        (lambda x: gf.nn.rnn(x, 0), "units of rnn is 0"),
        (lambda x: gf.nn.lstm_cell(x[0], (x[0],)), "takes 2 states, not 1"),
    ],
)
def test_errors(build: Any, message: str) -> None:
    with pytest.raises(gf.UserError, match=message):
        build(gf.input("x", (6, 2, FEATURES)))
