"""What each op must compute, by NumPy and SciPy alone: name -> function(arrays, attrs)."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import signal, special

from graphflow.compiler.plan.dtypes import BOOL

Oracle = Callable[[list, dict], Any]


def plain(function: Callable) -> Oracle:
    """An oracle of the operands alone."""
    return lambda arrays, attrs: function(*arrays)


def over_axes(function: Callable) -> Oracle:
    """A reduction, one axis after another from the last."""
    def oracle(arrays: list, attrs: dict) -> Any:
        out = arrays[0]
        for axis in sorted(attrs["axes"], reverse=True):
            out = function(out, axis=axis)
        return out
    return oracle


def divide_down(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Floor division, element by element in Python's numbers; 0 for an integer divided by 0."""
    out = [0 if b == 0 else a // b for a, b in zip(x.ravel().tolist(), y.ravel().tolist())]
    return np.array(out, x.dtype).reshape(x.shape)


def modulo(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The remainder of `divide_down`."""
    out = [0 if b == 0 else a % b for a, b in zip(x.ravel().tolist(), y.ravel().tolist())]
    return np.array(out, x.dtype).reshape(x.shape)


def literal(arrays: list, attrs: dict) -> np.ndarray:
    """The elements of an `array` constant, each unpacked by Python."""
    import struct
    codes = {"f32": "f", "f64": "d", "i32": "i", "i64": "q", "u32": "I", "u8": "B", "bool": "?"}
    code = codes[attrs["dtype"].name]
    count = math.prod(attrs["shape"])
    return np.array(struct.unpack(f"<{count}{code}", attrs["data"])).reshape(attrs["shape"])


def pad(arrays: list, attrs: dict) -> np.ndarray:
    """Inner padding by a Kronecker-like stretch of each axis, outer padding by np.pad."""
    x = arrays[0]
    fill = bool(attrs["value"]) if x.dtype == bool else attrs["value"]
    for axis, (low, high, gap) in enumerate(zip(attrs["low"], attrs["high"], attrs["interior"])):
        n = x.shape[axis]
        if n == 0:
            shape = list(x.shape)
            shape[axis] = low + high - gap
            x = np.full(shape, fill, x.dtype)
            continue
        for at in range(n - 1, 0, -1):
            x = np.insert(x, [at] * gap, fill, axis=axis)
        widths = [(0, 0)] * x.ndim
        widths[axis] = (low, high)
        x = np.pad(x, widths, constant_values=fill)
    return x


def threefry(arrays: list, attrs: dict) -> np.ndarray:
    """The first words of Threefry-2x32-20 at (element, stream); each index makes a new key first."""
    key = [int(arrays[0]), int(arrays[1])]
    for index in arrays[2:]:
        key = threefry_block(key, [int(index), 2 ** 32 - 1])
    counters = ([element, attrs["stream"]] for element in range(math.prod(attrs["shape"])))
    words = [threefry_block(key, counter)[0] for counter in counters]
    return np.array(words, np.uint32).reshape(attrs["shape"])


def threefry_block(key: list[int], counter: list[int]) -> list[int]:
    """Threefry-2x32-20 with Python's integers, after the paper's definition."""
    mask = 2 ** 32 - 1
    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1]]
    x = [(counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask]
    for r in range(20):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[r % 8]
        x[0] = (x[0] + x[1]) & mask
        x[1] = (((x[1] << turn) | (x[1] >> (32 - turn))) & mask) ^ x[0]
        if r % 4 == 3:
            s = r // 4 + 1
            x = [(x[0] + keys[s % 3]) & mask, (x[1] + keys[(s + 1) % 3] + s) & mask]
    return x


def cast(arrays: list, attrs: dict) -> np.ndarray:
    """Truncation towards zero for integers, x != 0 for bools."""
    x, dtype = arrays[0], attrs["dtype"]
    if dtype == BOOL:
        return x != 0
    return (np.trunc(x) if dtype.is_integer and x.dtype.kind == "f" else x).astype(dtype.numpy)


def where(condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Selection by np.copyto."""
    out = y.copy()
    np.copyto(out, x, where=condition)
    return out


def concatenate(arrays: list, attrs: dict) -> np.ndarray:
    """Slice by slice."""
    axis = attrs["axis"]
    slices = [part.take(at, axis) for part in arrays for at in range(part.shape[axis])]
    return np.stack(slices, axis)


def matmul(arrays: list, attrs: dict) -> np.ndarray:
    """Einstein's sum."""
    left = "km" if attrs["transpose_x"] else "mk"
    right = "nk" if attrs["transpose_y"] else "kn"
    return np.einsum(f"...{left},...{right}->...mn", *arrays)


def conv(x: np.ndarray, w: np.ndarray, attrs: dict) -> np.ndarray:
    """SciPy's correlation of each input channel with a kernel stretched by the dilation, at every stride-th
    place."""
    axes, groups = x.ndim - 2, attrs["groups"]

    def each(given: Any) -> tuple:
        return tuple(given) if isinstance(given, (tuple, list)) else (given,) * axes

    sides = [tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in each(attrs["padding"])]
    padded = np.pad(x, [(0, 0), (0, 0), *sides])
    dilation = each(attrs["dilation"])
    wide = np.zeros((*w.shape[:2], *(d * (k - 1) + 1 for k, d in zip(w.shape[2:], dilation))))
    wide[(..., *(slice(None, None, d) for d in dilation))] = w
    places = tuple(slice(None, None, s) for s in each(attrs["stride"]))
    full = tuple(n - k + 1 for n, k in zip(padded.shape[2:], wide.shape[2:]))
    out = np.zeros((x.shape[0], w.shape[0], *np.zeros(full)[places].shape))
    per_group = w.shape[0] // groups
    for n, o, c in np.ndindex(x.shape[0], w.shape[0], w.shape[1]):
        channel = padded[n, o // per_group * w.shape[1] + c] if per_group else 0
        out[n, o] += signal.correlate(channel, wide[o, c], mode="valid", method="direct")[places]
    return out


def adjoint(linear: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], y: np.ndarray) -> np.ndarray:
    """The transpose of a linear map of arrays of that shape, at y: its inner product with the map of each
    unit array."""
    out = np.zeros(shape)
    for at in np.ndindex(*shape):
        unit = np.zeros(shape)
        unit[at] = 1
        out[at] = np.sum(linear(unit) * y)
    return out


def conv_input_grad(arrays: list, attrs: dict) -> np.ndarray:
    """The transpose of `conv` as a map of its input."""
    dy, w = arrays
    shape = (dy.shape[0], w.shape[1] * attrs["groups"], *attrs["spatial"])
    return adjoint(lambda x: conv(x, w, attrs), shape, dy)


def conv_weight_grad(arrays: list, attrs: dict) -> np.ndarray:
    """The transpose of `conv` as a map of its weights."""
    x, dy = arrays
    shape = (dy.shape[1], x.shape[1] // attrs["groups"], *attrs["kernel"])
    return adjoint(lambda w: conv(x, w, attrs), shape, dy)


Places = list["tuple[int, ...] | None"]


def windows(spatial: tuple[int, ...], attrs: dict) -> dict[tuple[int, ...], Places]:
    """For each window's index, the input places that it covers, row by row; None where there is padding."""
    axes = len(spatial)

    def each(given: Any) -> tuple:
        return tuple(given) if isinstance(given, (tuple, list)) else (given,) * axes

    size, stride = each(attrs["window"]), each(attrs["stride"])
    sides = [tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in each(attrs["padding"])]
    starts = [range(-low, n + high - k + 1, s) for n, (low, high), k, s in zip(spatial, sides, size, stride)]
    out: dict[tuple[int, ...], Places] = {}
    for index in np.ndindex(*map(len, starts)):
        corner = [start[i] for start, i in zip(starts, index)]
        places = [tuple(c + r for c, r in zip(corner, inside)) for inside in np.ndindex(*size)]
        out[index] = [p if all(0 <= i < n for i, n in zip(p, spatial)) else None for p in places]
    return out


def over_images(shape: tuple[int, ...], found: dict[tuple[int, ...], Places]) -> Any:
    """(index of a window's result, the places in the whole input) for every image and channel."""
    for image in np.ndindex(*shape[:2]):
        for index, places in found.items():
            yield (*image, *index), [None if p is None else (*image, *p) for p in places]


def pooled_shape(shape: tuple[int, ...], found: dict) -> tuple[int, ...]:
    return (*shape[:2], *(max(index[i] for index in found) + 1 for i in range(len(shape) - 2)))


def max_pool(arrays: list, attrs: dict) -> list:
    """The first largest element of each window, looked at one by one."""
    x, found = arrays[0], windows(arrays[0].shape[2:], attrs)
    values = np.zeros(pooled_shape(x.shape, found), x.dtype)
    switches = np.zeros(values.shape, int)
    for at, places in over_images(x.shape, found):
        real = [i for i, p in enumerate(places) if p is not None]
        switches[at] = max(real, key=lambda i: (x[places[i]], -i))
        values[at] = x[places[switches[at]]]
    return [values, switches]


def unpool(arrays: list, attrs: dict) -> np.ndarray:
    """Each value added where its switch points."""
    dy, switches = arrays
    out = np.zeros((*dy.shape[:2], *attrs["spatial"]))
    for at, places in over_images(out.shape, windows(attrs["spatial"], attrs)):
        if places[switches[at]] is not None:
            out[places[switches[at]]] += dy[at]
    return out


def pool_take(arrays: list, attrs: dict) -> np.ndarray:
    """The element where each switch points."""
    x, switches = arrays
    out = np.zeros(switches.shape)
    for at, places in over_images(x.shape, windows(x.shape[2:], attrs)):
        place = places[switches[at]]
        out[at] = 0 if place is None else x[place]
    return out


def window_sum(arrays: list, attrs: dict) -> np.ndarray:
    """The elements of each window, added one by one."""
    x, found = arrays[0], windows(arrays[0].shape[2:], attrs)
    out = np.zeros(pooled_shape(x.shape, found))
    for at, places in over_images(x.shape, found):
        out[at] = sum(x[p] for p in places if p is not None)
    return out


def window_sum_grad(arrays: list, attrs: dict) -> np.ndarray:
    """Each window's value added to every element of the window."""
    dy = arrays[0]
    out = np.zeros((*dy.shape[:2], *attrs["spatial"]))
    for at, places in over_images(out.shape, windows(attrs["spatial"], attrs)):
        for p in places:
            if p is not None:
                out[p] += dy[at]
    return out


def gather(arrays: list, attrs: dict) -> np.ndarray:
    """The slices stacked one by one."""
    x, indices = arrays
    axis = attrs["axis"]
    slices = [x.take(int(i), axis) for i in indices.ravel()]
    rest = (*x.shape[:axis], *x.shape[axis + 1:])
    stacked = np.stack(slices, axis) if slices else np.zeros((*rest[:axis], 0, *rest[axis:]), x.dtype)
    return stacked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1:]))


def scatter_add(arrays: list, attrs: dict) -> np.ndarray:
    """A product with the matrix of ones where an index says."""
    indices, updates = arrays
    axis = attrs["axis"]
    chosen = np.arange(attrs["size"])[:, None] == indices.ravel()[None, :]
    flat = updates.reshape(*updates.shape[:axis], indices.size, *updates.shape[axis + indices.ndim:])
    return np.moveaxis(np.tensordot(chosen.astype(updates.dtype), flat, axes=(1, axis)), 0, axis)


def take_along_axis(arrays: list, attrs: dict) -> np.ndarray:
    """Element by element."""
    x, indices = arrays
    axis = attrs["axis"]
    out = np.zeros(indices.shape, x.dtype)
    for at in np.ndindex(*indices.shape):
        out[at] = x[(*at[:axis], int(indices[at]), *at[axis + 1:])]
    return out


def put_along_axis_add(arrays: list, attrs: dict) -> np.ndarray:
    """Element by element."""
    indices, updates = arrays
    axis, shape = attrs["axis"], indices.shape
    out = np.zeros((*shape[:axis], attrs["size"], *shape[axis + 1:]), updates.dtype)
    for at in np.ndindex(*shape):
        out[(*at[:axis], int(indices[at]), *at[axis + 1:])] += updates[at]
    return out


def scatter_set(arrays: list, attrs: dict) -> np.ndarray:
    """The product with a matrix that takes, for each place, its last update, or else x."""
    x, indices, updates = arrays
    axis = attrs["axis"]
    out = np.moveaxis(x, axis, 0).copy()
    flat = updates.reshape(*x.shape[:axis], indices.size, *x.shape[axis + 1:])
    given = dict(zip(indices.ravel().tolist(), np.moveaxis(flat, axis, 0)))
    for at, value in given.items():
        out[at] = value
    return np.moveaxis(out, 0, axis)


def running(function: Callable) -> Oracle:
    """A reduction of each prefix along the axis, or of each suffix."""
    def oracle(arrays: list, attrs: dict) -> np.ndarray:
        x = np.moveaxis(arrays[0], attrs["axis"], 0)
        parts = [x[n:] if attrs["reverse"] else x[:n + 1] for n in range(len(x))]
        out = np.array([function(p, axis=0) for p in parts], x.dtype).reshape(x.shape)
        return np.moveaxis(out, 0, attrs["axis"])
    return oracle


def linear_recurrence(arrays: list, attrs: dict) -> np.ndarray:
    """Each element as the sum of all terms before it times the factors between: a triangular matrix."""
    a, b = (np.moveaxis(x, attrs["axis"], 0) for x in arrays)
    if attrs["reverse"]:
        a, b = a[::-1], b[::-1]
    out = np.zeros_like(b)
    for t in range(len(b)):
        for s in range(t + 1):
            out[t] += np.prod(a[s + 1:t + 1], axis=0) * b[s]
    return np.moveaxis(out[::-1] if attrs["reverse"] else out, 0, attrs["axis"])


def unfold(arrays: list, attrs: dict) -> np.ndarray:
    """The windows one by one."""
    x = np.moveaxis(arrays[0], attrs["axis"], -1)
    reach = attrs["dilation"] * (attrs["size"] - 1)
    starts = range(0, x.shape[-1] - reach, attrs["stride"])
    windows = [x[..., start:start + reach + 1:attrs["dilation"]] for start in starts]
    return np.moveaxis(np.stack(windows, -2), -2, attrs["axis"])


def fold(arrays: list, attrs: dict) -> np.ndarray:
    """The windows' elements added one window after another."""
    x = np.moveaxis(arrays[0], attrs["axis"], -2)
    out = np.zeros((*x.shape[:-2], attrs["extent"]), x.dtype)
    for p in range(x.shape[-2]):
        at = p * attrs["stride"] + np.arange(x.shape[-1]) * attrs["dilation"]
        out[..., at] += x[..., p, :]
    return np.moveaxis(out, -1, attrs["axis"])


def argsort(arrays: list, attrs: dict) -> np.ndarray:
    """Python's sort of each row, with a sign for falling order."""
    def row(x: np.ndarray) -> np.ndarray:
        sign = -1 if attrs["descending"] else 1
        return np.array(sorted(range(len(x)), key=lambda n: sign * x[n].item()), np.int64)

    x = arrays[0]
    return np.apply_along_axis(row, attrs["axis"], x) if x.size else np.zeros(x.shape, np.int64)


def identity(x: np.ndarray) -> np.ndarray:
    return x


ORACLES: dict[str, Oracle] = {
    "constant": lambda arrays, attrs: attrs["value"],
    "array": literal,
    "update": plain(identity),
    "add": plain(lambda x, y: x + y), "sub": plain(lambda x, y: x - y), "mul": plain(lambda x, y: x * y),
    "div": plain(lambda x, y: x / y), "mod": plain(modulo), "floordiv": plain(divide_down),
    "hypot": plain(lambda x, y: np.abs(x + 1j * y.astype(np.float64))),
    "atan2": plain(lambda y, x: np.angle(x + 1j * y.astype(np.float64))),
    "copysign": plain(lambda x, y: np.abs(x) * np.where(np.signbit(y), -1, 1)),
    "logaddexp": plain(lambda x, y: np.log(np.exp(x.astype(np.float64)) + np.exp(y))),
    "pow": plain(lambda x, y: np.exp(y * np.log(x.astype(np.float64)))),
    "minimum": plain(lambda x, y: np.where(x < y, x, y)),
    "maximum": plain(lambda x, y: np.where(x > y, x, y)),
    "neg": plain(lambda x: np.zeros_like(x) - x),
    "abs": plain(lambda x: np.where(x < 0, np.zeros_like(x) - x, x)),
    "sign": plain(lambda x: (x > 0).astype(int) - (x < 0).astype(int)),
    "relu": plain(lambda x: x * (x > 0)),
    "sqrt": plain(lambda x: x.astype(np.float64) ** 0.5),
    "rsqrt": plain(lambda x: x.astype(np.float64) ** -0.5),
    "exp": plain(lambda x: np.e ** x.astype(np.float64)), "expm1": plain(lambda x: special.exprel(x) * x),
    "log": plain(lambda x: special.xlogy(np.ones_like(x), x)),
    "log1p": plain(lambda x: special.xlog1py(np.ones_like(x), x)),
    "tanh": plain(lambda x: 1 - 2 / (1 + np.exp(2 * x.astype(np.float64)))), "sigmoid": plain(special.expit),
    "softplus": plain(lambda x: -special.log_expit(-x)), "erf": plain(special.erf),
    "erfc": plain(special.erfc), "erfinv": plain(special.erfinv),
    "exp2": plain(special.exp2), "cbrt": plain(special.cbrt),
    "log2": plain(lambda x: np.log(x.astype(np.float64)) / np.log(2)),
    "log10": plain(lambda x: np.log(x.astype(np.float64)) / np.log(10)),
    "sinh": plain(lambda x: (np.exp(x.astype(np.float64)) - np.exp(-x.astype(np.float64))) / 2),
    "cosh": plain(lambda x: (np.exp(x.astype(np.float64)) + np.exp(-x.astype(np.float64))) / 2),
    "tan": plain(lambda x: np.tan(x.astype(np.complex128)).real),
    "asin": plain(lambda x: np.arcsin(x.astype(np.complex128)).real),
    "acos": plain(lambda x: np.arccos(x.astype(np.complex128)).real),
    "atan": plain(lambda x: np.arctan(x.astype(np.complex128)).real),
    "asinh": plain(lambda x: np.arcsinh(x.astype(np.complex128)).real),
    "acosh": plain(lambda x: np.arccosh(x.astype(np.complex128)).real),
    "atanh": plain(lambda x: np.arctanh(x.astype(np.complex128)).real),
    "sin": plain(lambda x: np.exp(1j * x.astype(np.float64)).imag),
    "cos": plain(lambda x: np.exp(1j * x.astype(np.float64)).real),
    "floor": plain(lambda x: x // 1), "ceil": plain(lambda x: -(-x // 1)), "round": plain(np.around),
    "trunc": plain(np.fix),
    "isnan": plain(lambda x: x != x), "isfinite": plain(lambda x: np.abs(x) < np.inf),
    "eq": plain(lambda x, y: x == y), "ne": plain(lambda x, y: x != y), "lt": plain(lambda x, y: x < y),
    "le": plain(lambda x, y: x <= y), "gt": plain(lambda x, y: x > y), "ge": plain(lambda x, y: x >= y),
    "logical_and": plain(lambda x, y: x & y), "logical_or": plain(lambda x, y: x | y),
    "logical_not": plain(lambda x: ~x),
    "bit_and": plain(lambda x, y: x & y), "bit_or": plain(lambda x, y: x | y),
    "bit_xor": plain(lambda x, y: x ^ y),
    "shift_left": plain(lambda x, y: x * np.left_shift(1, y).astype(x.dtype)),
    "shift_right": plain(lambda x, y: x // np.left_shift(1, y.astype(np.int64)).astype(np.int64)),
    "where": plain(where), "cast": cast, "stop_gradient": plain(identity),
    "reduce_sum": over_axes(lambda x, axis: np.add.reduce(x, axis=axis, dtype=x.dtype)),
    "reduce_prod": over_axes(lambda x, axis: np.multiply.reduce(x, axis=axis, dtype=x.dtype)),
    "reduce_max": over_axes(np.maximum.reduce), "reduce_min": over_axes(np.minimum.reduce),
    "reduce_any": over_axes(np.logical_or.reduce), "reduce_all": over_axes(np.logical_and.reduce),
    "argmax": lambda arrays, attrs: np.argsort(-arrays[0], axis=attrs["axis"],
                                               kind="stable").take(0, attrs["axis"]),
    "argmin": lambda arrays, attrs: np.argsort(arrays[0], axis=attrs["axis"],
                                               kind="stable").take(0, attrs["axis"]),
    "broadcast_to": lambda arrays, attrs: np.zeros(attrs["shape"], arrays[0].dtype) + arrays[0],
    "reshape": lambda arrays, attrs: np.array(arrays[0].ravel().tolist(),
                                              arrays[0].dtype).reshape(attrs["shape"]),
    "transpose": lambda arrays, attrs: np.einsum(arrays[0], list(range(arrays[0].ndim)), list(attrs["perm"])),
    "slice": lambda arrays, attrs: arrays[0][np.ix_(*map(range, attrs["starts"], attrs["stops"],
                                                         attrs["steps"]))],
    "flip": lambda arrays, attrs: arrays[0][np.ix_(*(range(n)[::-1] if axis in attrs["axes"] else range(n)
                                                     for axis, n in enumerate(arrays[0].shape)))],
    "pad": pad, "concatenate": concatenate,
    "iota": lambda arrays, attrs: np.indices(attrs["shape"])[attrs["axis"]],
    "random_bits": threefry,
    "matmul": matmul, "conv": lambda arrays, attrs: conv(*arrays, attrs),
    "conv_input_grad": conv_input_grad, "conv_weight_grad": conv_weight_grad,
    "max_pool": max_pool, "unpool": unpool, "pool_take": pool_take,
    "window_sum": window_sum, "window_sum_grad": window_sum_grad,
    "gather": gather, "scatter_add": scatter_add,
    "unfold": unfold, "fold": fold,
    "take_along_axis": take_along_axis, "put_along_axis_add": put_along_axis_add,
    "scatter_set": scatter_set, "argsort": argsort, "linear_recurrence": linear_recurrence,
    "cumsum": running(lambda x, axis: np.add.reduce(x, axis=axis, dtype=x.dtype)),
    "cumprod": running(lambda x, axis: np.multiply.reduce(x, axis=axis, dtype=x.dtype)),
    "cummax": running(np.maximum.reduce), "cummin": running(np.minimum.reduce),
}
