"""Recurrent layers over sequences [T, N, features], T steps of N sequences, and their cells for bodies of
one's own.

The products with the inputs of all steps are one matrix product before the loop; what is left inside is the
recurrent one. Several layers, both directions, sequences of unequal length and states carried over from call
to call are options of all three.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from graphflow import init
from graphflow.autocast import master_type
from graphflow.compiler.plan.dims import product
from graphflow.compiler.plan.dtypes import BOOL
from graphflow.compiler.plan.errors import DTypeError, ShapeError, UseError
from graphflow.control import scan
from graphflow.creation import arange, zeros
from graphflow.nn.dropout import dropout
from graphflow.nn.geometry import check_count, check_float, fixed_extent
from graphflow.nn.parameters import layer_parameter
from graphflow.products import matmul
from graphflow.scope import here
from graphflow.shapes import concatenate, expand_dims, reshape, stack
from graphflow.state import Naming
from graphflow.tensor import Tensor, cast, elementwise

State = tuple[Tensor, ...]
_orthogonal = init.orthogonal()


class _Cell(NamedTuple):
    """A kind of recurrent unit: how many gates (blocks of `units` columns), how many carries, the parts of
    its parameters beside Wx, Wh and b, and ``step(z, state, weights) -> new state``, whose first is the
    output; `z` is x Wx + b."""
    op: str
    gates: int
    carries: int
    step: Callable[[Tensor, State, dict[str, Tensor]], State]
    extra: tuple[str, ...] = ()


def _lstm_step(z: Tensor, state: State, weights: dict[str, Tensor]) -> State:
    h, c = state
    i, f, g, o = _gates(z + matmul(h, weights["Wh"]), 4)
    c = _sigmoid(f) * c + _sigmoid(i) * _tanh(g)
    return _sigmoid(o) * _tanh(c), c


def _gru_step(z: Tensor, state: State, weights: dict[str, Tensor]) -> State:
    h, = state
    zr, zu, zn = _gates(z, 3)
    ar, au, an = _gates(matmul(h, weights["Wh"]), 3)
    reset, update = _sigmoid(zr + ar), _sigmoid(zu + au)
    new = _tanh(zn + reset * (an + weights["bn"]))
    return (new + update * (h - new),)


def _simple_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    return lambda z, state, weights: (activation(z + matmul(state[0], weights["Wh"])),)


def _tanh(x: Tensor) -> Tensor:
    return elementwise("tanh", x)


def _sigmoid(x: Tensor) -> Tensor:
    return elementwise("sigmoid", x)


def _gates(z: Tensor, count: int) -> list[Tensor]:
    units = z.shape[-1] // count
    return [z[:, units * i:units * (i + 1)] for i in range(count)]


_LSTM = _Cell("lstm", 4, 2, _lstm_step)
_GRU = _Cell("gru", 3, 1, _gru_step, ("bn",))


def rnn(x: Tensor, units: int, activation: Callable[[Tensor], Tensor] = _tanh, **options: Any
        ) -> tuple[Tensor, Tensor]:
    """A simple recurrent layer: h_t = activation(x_t Wx + h_(t-1) Wh + b); (outputs, last states).

    x: [T, N, features]; outputs: [T, N, units · directions]. Options: see `lstm`. Elman, "Finding structure
    in time", Cognitive Science 14, 1990.
    """
    outputs, (h,) = _recurrent(_Cell("rnn", 1, 1, _simple_step(activation)), x, units, **options)
    return outputs, h


def lstm(x: Tensor, units: int, **options: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory: (outputs, (last h, last c)).

    i, f, o = σ(x Wx + h Wh + b), g = tanh(…) in the order i, f, g, o of the columns; c = f c + i g;
    h = o tanh(c). x: [T, N, features]; outputs: h of every step, [T, N, units · directions]; the last states
    are [layers · directions, N, units]. Hochreiter and Schmidhuber, Neural Computation 9, 1997; with forget
    gates: Gers, Schmidhuber and Cummins, 2000.

    Options:

    - ``layers=1``: so many on top of each other; ``dropout=0.0``: the rate of dropout between them;
    - ``bidirectional=False``: a second set of weights reads the steps from the last to the first, and the
      outputs of both stand side by side; ``reverse=False``: the only direction is that one;
    - ``initial``: the states before the first step, such as a call returned; zeros without. What carries
      states over from call to call feeds them again (through `gf.stop_gradient` within one program);
    - ``lengths``: integers [N], the length of each sequence: after its end a sequence keeps its state, its
      outputs are 0, and the backward direction starts at its last step; or ``mask``: bools [T, N];
    - ``checkpoint``: see `gf.scan`;
    - ``weight_init`` (glorot_uniform), ``recurrent_init`` (orthogonal), ``bias_init`` (0), ``name``. The
      parameters are ``NAME.Wx`` [features, gates · units], ``NAME.Wh`` [units, gates · units] and ``NAME.b``
      [gates · units]; with several layers or directions ``NAME.0.Wx``, ``NAME.0.backward.Wx``, ``NAME.1.Wx``
    """
    outputs, (h, c) = _recurrent(_LSTM, x, units, **options)
    return outputs, (h, c)


def gru(x: Tensor, units: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Gated recurrent units: (outputs, last states).

    r, u = σ(x Wx + h Wh + b), n = tanh(x Wx + b + r (h Wh + bn)) in the order r, u, n of the columns;
    h = (1 - u) n + u h. x: [T, N, features]; outputs: [T, N, units · directions]. Options: see `lstm`;
    ``NAME.bn`` [units] is one parameter more. Cho et al., EMNLP 2014, with the reset gate behind the product
    as in cuDNN.
    """
    outputs, (h,) = _recurrent(_GRU, x, units, **options)
    return outputs, h


def lstm_cell(x: Tensor, state: tuple[Tensor, Tensor], *, name: str | None = None, **inits: Any
              ) -> tuple[Tensor, Tensor]:
    """One step of `lstm` for the body of a loop of one's own. x: [N, features]; state: (h, c), [N, units]
    each; the new state, whose first is the output. Keyword arguments: the initialisers."""
    h, c = _cell(_LSTM, x, tuple(state), name, inits)
    return h, c


def gru_cell(x: Tensor, state: Tensor, *, name: str | None = None, **inits: Any) -> Tensor:
    """One step of `gru` for the body of a loop of one's own. x: [N, features]; state: [N, units]; the new
    state, which is the output. Keyword arguments: the initialisers."""
    return _cell(_GRU, x, (state,), name, inits)[0]


def _cell(cell: _Cell, x: Tensor, state: State, name: str | None, inits: dict[str, Any]) -> State:
    if len(state) != cell.carries:
        raise UseError(f"{cell.op}_cell takes {cell.carries} states, not {len(state)}", op=cell.op,
                       where=here(), hint="(h, c)")
    features = fixed_extent(cell.op, x, -1, "features", 2)
    units = fixed_extent(cell.op, state[0], -1, "units", 2)
    weights = _weights(cell, Naming.of(name, cell.op), "", features, units, x, **inits)
    return cell.step(_input_product(x, weights), state, weights)


def _weights(cell: _Cell, naming: Naming, prefix: str, features: int, units: int, x: Tensor, *,
             weight_init: Any = init.glorot_uniform, recurrent_init: Any = _orthogonal,
             bias_init: Any = 0.0) -> dict[str, Tensor]:
    columns = cell.gates * units
    shapes = {"Wx": ((features, columns), weight_init), "Wh": ((units, columns), recurrent_init),
              "b": ((columns,), bias_init), **{part: ((units,), 0.0) for part in cell.extra}}
    return {part: layer_parameter(naming, prefix + part, shape, value, x.dtype)
            for part, (shape, value) in shapes.items()}


def _input_product(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    out = matmul(x, weights["Wx"])
    return out + cast(weights["b"], out.dtype)


def _recurrent(cell: _Cell, x: Tensor, units: int, *, layers: int = 1, bidirectional: bool = False,
               reverse: bool = False, initial: Any = None, lengths: Tensor | None = None,
               mask: Tensor | None = None, dropout: float = 0.0, checkpoint: int | None = None,
               name: str | None = None, **inits: Any) -> tuple[Tensor, State]:
    """What the layers have in common."""
    _check(cell, x, units, layers, bidirectional and reverse)
    naming = Naming.of(name, cell.op)
    ways = (False, True) if bidirectional else (reverse,)
    seen = _mask(cell, x, lengths, mask)
    given = _initial(cell, x, units, initial, layers * len(ways))
    ends: list[State] = []
    for layer in range(layers):
        if layer and dropout:
            x = _dropout(x, dropout)
        outputs = []
        for way in ways:
            prefix = f"{layer}." if layers > 1 or bidirectional else ""
            prefix += "backward." * (bidirectional and way)
            weights = _weights(cell, naming, prefix, fixed_extent(cell.op, x, -1, "features", 3), units, x,
                               **inits)
            out, last = _run(cell, x, weights, given[len(ends)], seen, way, checkpoint)
            outputs.append(out)
            ends.append(last)
        x = concatenate(outputs, 2) if len(outputs) > 1 else outputs[0]
    return x, tuple(stack([end[i] for end in ends]) for i in range(cell.carries))


_dropout = dropout                               # which an option of the layers hides


def _run(cell: _Cell, x: Tensor, weights: dict[str, Tensor], state: State, seen: Tensor | None, way: bool,
         checkpoint: int | None) -> tuple[Tensor, State]:
    """One layer in one direction."""
    steps, count, features = x.shape
    z = _input_product(reshape(x, (product((steps, count)), features)), weights)
    z = reshape(z, (steps, count, z.shape[-1]))

    def body(old: State, inputs: tuple[Tensor, ...]) -> tuple[State, Tensor]:
        new = cell.step(inputs[0], old, weights)
        if seen is None:
            return new, new[0]
        valid = expand_dims(inputs[1], 1)
        kept = tuple(elementwise("where", valid, n, o) for n, o in zip(new, old))
        return kept, elementwise("where", valid, new[0], 0.0)

    last, outputs = scan(body, state, (z,) if seen is None else (z, seen), reverse=way, checkpoint=checkpoint)
    return outputs, last


def _check(cell: _Cell, x: Tensor, units: int, layers: int, both: bool) -> None:
    check_float(cell.op, x)
    if x.ndim != 3:
        raise ShapeError(f"{cell.op} takes sequences [T, N, features], not {x.ndim} axes", op=cell.op,
                         shapes=[x.shape], where=here(),
                         hint="for [N, T, features] use gf.swapaxes(x, 0, 1)")
    check_count(cell.op, "units", units)
    check_count(cell.op, "layers", layers)
    if both:
        raise UseError(f"{cell.op}: bidirectional runs both ways already", op=cell.op, where=here(),
                       hint="leave reverse=True out")


def _initial(cell: _Cell, x: Tensor, units: int, initial: Any, count: int) -> list[State]:
    """The state before the first step, for each layer and direction."""
    if initial is None:
        nothing = zeros((x.shape[1], units), master_type(x.dtype))
        return [(nothing,) * cell.carries] * count
    states = tuple(initial) if isinstance(initial, (tuple, list)) else (initial,)
    wanted = (count, x.shape[1], units)
    if len(states) != cell.carries:
        raise UseError(f"{cell.op}: initial holds {len(states)} states, not {cell.carries}", op=cell.op,
                       where=here(), hint="pass what the layer returned as its last states")
    for s in states:
        if not isinstance(s, Tensor) or s.shape != wanted:
            found = s.shape if isinstance(s, Tensor) else repr(s)
            raise ShapeError(f"{cell.op}: an initial state is [layers · directions, N, units]", op=cell.op,
                             shapes=[wanted] + [s.shape] * isinstance(s, Tensor), where=here(),
                             hint=f"expected {list(wanted)}, got {found}")
    return [tuple(s[i] for s in states) for i in range(count)]


def _mask(cell: _Cell, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which steps of which sequences there are: bools [T, N], or None for all."""
    if lengths is not None and mask is not None:
        raise UseError(f"{cell.op} takes lengths or a mask, not both", op=cell.op, where=here())
    if lengths is not None:
        if not lengths.dtype.is_integer or lengths.shape != x.shape[1:2]:
            raise ShapeError(f"{cell.op}: lengths are integers [N]", op=cell.op,
                             shapes=[x.shape, lengths.shape], where=here())
        mask = expand_dims(arange(x.shape[0], dtype="int64"), 1) < cast(lengths, "int64")
    if mask is not None and mask.dtype != BOOL:
        raise DTypeError(f"{cell.op}: the mask holds bools, not {mask.dtype.full_name}", op=cell.op,
                         shapes=[mask.shape], where=here(), hint="compare it with 0")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ShapeError(f"{cell.op}: the mask is [T, N]", op=cell.op, shapes=[x.shape, mask.shape],
                         where=here())
    return mask


__all__: Sequence[str] = ("gru", "gru_cell", "lstm", "lstm_cell", "rnn")
