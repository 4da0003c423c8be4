"""The error function and its relatives, cube root and hypotenuse as vector code."""

from __future__ import annotations

from graphflow.compiler.emit.builder import F32, Builder, Value, constant
from graphflow.compiler.emit.math_exp import exp_core, exp_parts, log
from graphflow.compiler.emit.math_parts import (
    INF,
    bits_of,
    by_accuracy,
    choose_lanes,
    clamp,
    either,
    float_of,
    form,
    in_double,
    magnitude,
    nearest,
    polynomial,
    power_of_two,
    quotient,
    scaled,
    table,
    to_float,
    with_sign,
)

# (erf(x) - x) / x in x² up to 0.92² (float64: 1), and for float32 -log(erfc(x)) in x from there to 4.
_ERF = table(
    "0x1.06eba8p-3 -0x1.812740p-2 0x1.ce2d64p-4 -0x1.b8011ap-6 0x1.544a1ap-8 -0x1.a60a2ep-11 0x1.4f6760p-14",
    "0x1.06eba8214db69p-3 -0x1.812746b0379e6p-2 0x1.ce2f21a042b33p-4 -0x1.b82ce31284f1ap-6 "
    "0x1.565bcd0dbd454p-8 -0x1.c02db3db3af52p-11 0x1.f9a321e2fdaa8p-14 -0x1.f4d1e4121cb8fp-17 "
    "0x1.b9df2e8f7c46ep-20 -0x1.5f1f312afe75ep-23 0x1.f7b8edd7142e7p-27 -0x1.38a9f33e264bdp-30 "
    "0x1.0621461b713f1p-34")
_ERF_LARGE = [float.fromhex(c) for c in (
    "-0x1.6e5654p-13 0x1.2127e4p+0 0x1.44460cp-1 0x1.bb83e2p-4 "
    "-0x1.9b8e78p-6 0x1.115ac0p-8 -0x1.c790ecp-12 0x1.61ea2ep-16").split()]
# (1 + 2x)·exp(x²)·erfc(x) in (x - c) / (x + c), c = 3 (float64: 4), for all x where erfc is not 0.
_ERFC = table(
    "0x1.40c522dacc7b2p+0 -0x1.15c0859d921dp-3 -0x1.85a18c9ebe57ep-5 0x1.0983890ca1a56p-3 "
    "-0x1.e8895be15cb35p-4 0x1.17c7f848b8ffap-4 -0x1.85bd0fdf84c93p-6 0x1.4b96dda031302p-9 "
    "0x1.ff4a1b5d1b3cfp-10 -0x1.84d257588f5e5p-11 -0x1.7fe8cbf69c595p-13 0x1.27528cbbfa54ap-15",
    "0x1.3ba5916e9fd7fp+0 -0x1.1df1ad154a29bp-3 0x1.f7f5df66fd7bap-7 0x1.16ecefcfa5fa8p-4 "
    "-0x1.9ddb23c3e8edap-4 0x1.7fee004df7cb4p-4 -0x1.0fb06dfe52253p-4 0x1.3079edf9dd506p-5 "
    "-0x1.09623881b56a5p-6 0x1.49c671970872cp-8 -0x1.8d4a9edda04f8p-11 -0x1.a1de8581fc057p-13 "
    "0x1.3be0c116c61d1p-13 -0x1.9969e1f5cbfccp-16 -0x1.78a5a18931229p-17 0x1.7fb0eef08bdadp-18 "
    "0x1.43b44e177ccc2p-22 -0x1.c014f115179a8p-21 0x1.0d77a31373e3p-24 0x1.edde1832ac11p-24 "
    "-0x1.0cc1c0783706fp-27 -0x1.d25cf45356c59p-27 -0x1.e83edae63ed4ep-30")
# erfinv(x) / x in w = -log(1 - x²) up to a limit; beyond it in √w.
_ERFINV = table(
    "0x1.9fa072e2b6571p+0 0x1.eedbe6e043271p-3 -0x1.780dacde35e95p-8 -0x1.b657514c0d646p-11 "
    "0x1.9910ac0e7f1bbp-13 -0x1.addac67af8d0cp-17 -0x1.d8a82f595328ap-20 0x1.01b027bc12c74p-21 "
    "-0x1.187fe9a39f7abp-26 -0x1.2e0f116aa9488p-27",
    "0x1.a755e7c99ae86p+0 0x1.ebd80d9b13dfap-3 -0x1.8b6c33114ead6p-8 -0x1.84576948356a9p-11 "
    "0x1.879c2a20b529bp-13 -0x1.d1d1f7ca223d7p-17 -0x1.6e8a53cde9a0bp-20 0x1.c6b4f88befd57p-22 "
    "-0x1.f36ced46716d8p-26 -0x1.1a9eb0f08d275p-28 0x1.20f5363d7e17ap-30 -0x1.dc3f137b20c77p-35 "
    "-0x1.c8a3f8f63024p-37 0x1.7235dfc7854e4p-39 -0x1.6bdbe9dc902d1p-44 -0x1.686e5e247030ap-45 "
    "0x1.d6c6f261f02a9p-48 -0x1.6fd0846de755fp-55 -0x1.1ca77a928e3ep-53 0x1.1ec251f9b3396p-56 "
    "0x1.9aa9975e7d4f6p-61 -0x1.9bc03f4b6323ep-62 0x1.38665498357dcp-66 0x1.e6809d1bf42bep-69 "
    "-0x1.6ad9c2a9aed2p-72")
_ERFINV_TAIL = table(
    "0x1.6a9efbd64eebbp+1 0x1.006dca0266dedp+0 0x1.3582c58e3b044p-7 -0x1.f4e41e2a80488p-8 "
    "0x1.7493cb189755ap-8 -0x1.d3566bf8072e6p-9 0x1.8592143f2a932p-10 -0x1.0868009c01f2dp-13 "
    "-0x1.36e45f7eb6eb2p-12 0x1.68b5ba934a85ep-13 -0x1.2ad2972c37764p-16 -0x1.0ed19f704f08cp-17",
    "0x1.8abcc380d5a48p+1 0x1.0158a6d641d55p+0 0x1.5ffcfe5b6cd7bp-8 -0x1.ebadabba0239ap-9 "
    "0x1.468eeca942c3p-9 -0x1.ba9240d8972e9p-10 0x1.f3cc545e5a1f6p-11 -0x1.7448bcc19f19cp-12 "
    "0x1.932e8eb9a5c9ep-16 0x1.1e6abb04b214ap-14 -0x1.8cf45f8c65a38p-15 0x1.a241e6ff3ff72p-17 "
    "0x1.8999a7b3c74f8p-19 -0x1.0b7a9812f6c1p-18 0x1.8dbb9812a0b1dp-20 -0x1.d956aee4d5b1ep-26 "
    "-0x1.07b89cf256d71p-22 0x1.1a748dc7746c7p-23 -0x1.65af1af432d68p-26 -0x1.0691e7baa9ed3p-26 "
    "0x1.06b7b5ccf5ddp-27")
_ERFINV_END = [float.fromhex(c) for c in (
    "0x1.3664ddd1ad7fbp+2 0x1.02a30d1fba10dp+0 -0x1.22ea5df1ce88ap-13 -0x1.c2f36aa25c0efp-13 "
    "0x1.3ebf4efb8357fp-14 -0x1.4a348fb95e0cap-16 0x1.2fbcfd590ef7p-18 -0x1.0a9077c5f23e9p-20 "
    "0x1.ebe32d5688946p-23 -0x1.222640d44ca08p-24 0x1.f2891fae43e92p-26 -0x1.0619fe903191fp-26 "
    "0x1.0cbb5e622221cp-27 -0x1.dcde893321c09p-29 0x1.69ed219e84ea8p-30 -0x1.e2538177f874dp-32 "
    "0x1.2f7785553be16p-34 0x1.7bb45f0c85b71p-35 -0x1.63b8f3d838e36p-36").split()]
# ∛x on [1, 2], roughly.
_CBRT = [float.fromhex(c) for c in ("0x1.1b0ba4p-1", "0x1.2c9a4ep-1", "-0x1.4dc334p-3", "0x1.7a8d86p-6")]


def erf(b: Builder, x: Value) -> Value:
    """The error function."""
    size = magnitude(b, x)
    if x.type.scalar == F32:
        n, p = exp_core(b, b.neg(polynomial(b, clamp(b, size, 0.0, 4.0), _ERF_LARGE)))
        large = b.fma(b.neg(p), power_of_two(b, n, x), 1.0)
    else:
        large = b.sub(1.0, _erfc_large(b, size, "double"))
    return with_sign(b, b.select(b.compare("lt", size, either(x, 0.92, 1.0)), _erf_small(b, x), large), x)


def _erf_small(b: Builder, x: Value) -> Value:
    return b.fma(polynomial(b, b.mul(x, x), _ERF), x, x)


@by_accuracy
def erfc(b: Builder, x: Value, accuracy: str) -> Value:
    """1 - erf(x), accurate where that is tiny."""
    size = magnitude(b, x)
    result = _erfc_large(b, size, accuracy)
    result = b.select(b.compare("lt", x, 0.0), b.sub(2.0, result), result)
    return b.select(b.compare("lt", size, 0.75), b.sub(1.0, _erf_small(b, x)), result)


def _erfc_large(b: Builder, x: Value, accuracy: str) -> Value:
    """erfc of float64 x >= 0 as exp(-x²) times a slowly varying function (Shepherd and Laframboise 1981)."""
    limit, centre = (10.2, 3.0) if accuracy == "float" else (27.5, 4.0)
    x = clamp(b, x, 0.0, limit)
    square = b.mul(x, x)
    square_rest = b.fma(x, x, b.neg(square))  # which exp would magnify
    n, tail = exp_parts(b, b.neg(square), b.neg(square_rest))
    t = b.div(b.sub(x, centre), b.add(x, centre))
    first, *others = _ERFC[accuracy]
    rest = polynomial(b, t, others)
    above, below = b.fma(t, rest, first), b.fma(x, 2.0, 1.0)
    above_rest = b.fma(t, rest, b.sub(first, above))  # what rounding took from the two
    below_rest = b.fma(x, 2.0, b.sub(1.0, below))
    factor = quotient(b, above, below, below_rest, above_rest)
    return scaled(b, b.fma(factor, tail, factor), n)


@by_accuracy
def erfinv(b: Builder, x: Value, accuracy: str) -> Value:
    """The inverse of erf on [-1, 1], NaN outside, after Giles, Approximating the erfinv function (2011)."""
    limit, centre, tail_centre = (5.0, 3.0, 3.0) if accuracy == "float" else (6.25, 3.125, 3.25)
    w = b.neg(log(b, b.mul(b.sub(1.0, x), b.add(x, 1.0))))

    def tail() -> Value:
        root = b.intrinsic("sqrt", w)
        low = b.div(b.fma(b.neg(root), root, w), b.add(root, root))  # what rounding took from it
        factor = polynomial(b, b.add(b.sub(root, tail_centre), low), _ERFINV_TAIL[accuracy])
        if accuracy == "double":
            end = polynomial(b, b.add(b.sub(root, 5.0), low), _ERFINV_END)
            factor = b.select(b.compare("gt", w, 16.0), end, factor)
        return b.select(b.compare("eq", w, INF), INF, factor)

    factor = choose_lanes(b, b.compare("gt", w, limit), tail,
                          lambda: polynomial(b, b.sub(w, centre), _ERFINV[accuracy]))
    return b.mul(factor, x)


@in_double
def cbrt(b: Builder, x: Value) -> Value:
    """∛x: a guess for the mantissa, then Halley's iteration twice."""
    size = magnitude(b, x)
    denormal = b.compare("lt", size, form(x).tiny)
    bits = bits_of(b, b.select(denormal, b.mul(size, 2.0**54), size))
    exponent = to_float(b, b.sub(b.lshr(bits, 52), 1023), x)
    exponent = b.sub(exponent, b.select(denormal, constant(x.type, 54.0), constant(x.type, 0.0)))
    third, n = nearest(b, b.sub(exponent, 1.0), 1 / 3)         # rounded down: no remainder lies half-way
    rest = b.fma(third, -3.0, exponent)                        # 0, 1 or 2
    one, two = b.compare("eq", rest, 1.0), b.compare("eq", rest, 2.0)
    mantissa = float_of(b, b.or_(b.and_(bits, (1 << 52) - 1), 1023 << 52), x)
    root = b.select(two, 2.0 ** (2 / 3), b.select(one, 2.0 ** (1 / 3), constant(x.type, 1.0)))
    root = b.mul(polynomial(b, mantissa, _CBRT), root)
    mantissa = b.mul(mantissa, b.select(two, 4.0, b.select(one, 2.0, constant(x.type, 1.0))))
    for _ in range(2):
        square = b.mul(root, root)
        error = b.fma(square, root, b.neg(mantissa))
        root = b.sub(root, b.mul(root, b.div(error, b.fma(square, b.add(root, root), mantissa))))
    root = with_sign(b, b.mul(root, power_of_two(b, n, x)), x)
    plain = b.and_(b.compare("lt", size, INF), b.compare("gt", size, 0.0))
    return b.select(plain, root, x)


@in_double
def hypot(b: Builder, x: Value, y: Value) -> Value:
    """√(x² + y²) without overflow; infinite if either is, even with NaN."""
    x, y = magnitude(b, x), magnitude(b, y)
    greater = b.compare("gt", x, y)
    most, least = b.select(greater, x, y), b.select(greater, y, x)
    large, small = b.compare("gt", most, 2.0**500), b.compare("lt", most, 2.0**-400)
    factor = b.select(large, 2.0**-600, b.select(small, 2.0**600, constant(x.type, 1.0)))
    most, least = b.mul(most, factor), b.mul(least, factor)
    root = b.div(b.intrinsic("sqrt", b.fma(most, most, b.mul(least, least))), factor)
    infinite = b.or_(b.compare("eq", x, INF), b.compare("eq", y, INF))
    return b.select(infinite, INF, root)
