"""CUDA C for expressions and dimensions: types, literals and helper functions of the generated text, and a
writer that turns the expressions of a kernel into statements."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphflow.compiler.emit.half import half_bits
from graphflow.compiler.kernel.form import (
    Apply,
    Argument,
    Const,
    Expr,
    Guarded,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Reduce,
)
from graphflow.compiler.plan.dims import Dim, DimLike, Symbol
from graphflow.compiler.plan.dtypes import BF16, BOOL, F16, F32, F64, I32, I64, U8, U32, DType

C_TYPES = {F32: "float", F64: "double", I32: "int", I64: "long long", U32: "unsigned int",
           U8: "unsigned char", BOOL: "bool", F16: "unsigned short", BF16: "unsigned short"}
WARP, THREADS = 32, 256

_INLINE = "static __device__ __forceinline__"
_TEMPLATE = f"template <class T> {_INLINE}"

HELPERS = {
    "gf_from_f16": f"""\
// halves are their bits
{_INLINE} float gf_from_f16(unsigned short x)
{{
  const unsigned magnitude = (x & 0x7fffu) << 13;
  const float scaled = __int_as_float((int)magnitude) * 0x1p112f;
  const unsigned bits =
      magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : (unsigned)__float_as_int(scaled);
  return __int_as_float((int)(bits | (x & 0x8000u) << 16));
}}""",
    "gf_to_f16": f"""\
{_INLINE} unsigned short gf_to_f16(float x)
{{
  const unsigned bits = (unsigned)__float_as_int(x), magnitude = bits & 0x7fffffffu;
  unsigned out = (magnitude + 0xfffu - (112u << 23) + (magnitude >> 13 & 1u)) >> 13;
  if (magnitude < 0x38800000u)  // a denormal: the addition rounds it
    out = (unsigned)__float_as_int(__int_as_float((int)magnitude) + 0.5f) - 0x3f000000u;
  if (magnitude >= 0x477ff000u) out = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (unsigned short)(out | (bits ^ magnitude) >> 16);
}}""",
    "gf_from_bf16": f"""\
{_INLINE} float gf_from_bf16(unsigned short x) {{ return __int_as_float((int)((unsigned)x << 16)); }}""",
    "gf_to_bf16": f"""\
{_INLINE} unsigned short gf_to_bf16(float x)
{{
  const unsigned bits = (unsigned)__float_as_int(x);
  return (unsigned short)(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : bits >> 16 | 0x40u);
}}""",
    "gf_floordiv": f"// for b > 0\n{_INLINE} idx gf_floordiv(idx a, idx b) {{ return a / b - (a % b < 0); }}",
    "gf_floormod": f"""\
// for b > 0
{_INLINE} idx gf_floormod(idx a, idx b) {{ return a % b + (a % b < 0 ? b : 0); }}""",
    "gf_max": f"{_TEMPLATE} T gf_max(T a, T b) {{ return (a > b || a != a) ? a : b; }}",
    "gf_min": f"{_TEMPLATE} T gf_min(T a, T b) {{ return (a < b || a != a) ? a : b; }}",
    "gf_sign": f"{_TEMPLATE} T gf_sign(T a) {{ return a > T(0) ? T(1) : a == a && a != T(0) ? T(-1) : a; }}",
    "gf_idiv": f"""\
// rounds down; 0 for y = 0; the least integer by -1 wraps
{_TEMPLATE} T gf_idiv(T x, T y)
{{
  const i64 a = x, b = y;
  if (b == 0) return T(0);
  if (b == -1) return T(0ull - (unsigned long long)a);
  return T(a / b - ((a % b != 0) & ((a % b < 0) != (b < 0))));
}}""",
    "gf_imod": f"""\
// has y's sign; 0 for y = 0
{_TEMPLATE} T gf_imod(T x, T y)
{{
  const i64 a = x, b = y;
  if (b == 0 || b == -1) return T(0);
  return T(a % b + ((a % b != 0) & ((a % b < 0) != (b < 0)) ? b : 0));
}}""",
    "gf_mod": f"""\
// has b's sign
{_TEMPLATE} T gf_mod(T a, T b)
{{
  const T rest = fmod(a, b);
  if (rest == 0) return copysign(rest, b);
  return (rest < 0) != (b < 0) && rest == rest ? rest + b : rest;
}}""",
    "gf_div": f"""\
// rounds down, exactly: a / b itself may round up
{_TEMPLATE} T gf_div(T a, T b)
{{
  const T rest = fmod(a, b);
  if (b == 0) return a / b;
  const T quotient = (a - rest) / b - T(rest != 0 && (rest < 0) != (b < 0));
  if (quotient == 0) return copysign(T(0), a / b);
  const T whole = floor(quotient);
  return quotient - whole > T(0.5) ? whole + T(1) : whole;
}}""",
    "gf_sigmoid": f"""\
{_TEMPLATE} T gf_sigmoid(T x)
{{
  const T z = exp(-fabs(x));
  return (x >= 0 ? T(1) : z) / (T(1) + z);
}}""",
    "gf_softplus": f"{_TEMPLATE} T gf_softplus(T x) {{ return gf_max(x, T(0)) + log1p(exp(-fabs(x))); }}",
    "gf_pack": """\
// neighbouring elements, loaded and stored at once where `wide`
template <class T, int N> struct __align__(sizeof(T) * N) gf_pack { T at[N]; };
template <int N> struct gf_width { static constexpr int value = N; };""",
    "gf_load": f"""\
template <int N, class T> {_INLINE} gf_pack<T, N> gf_load(const T* from, bool wide = true)
{{
  if (wide) return *(const gf_pack<T, N>*)from;
  gf_pack<T, N> out;
  for (int i = 0; i < N; i++) out.at[i] = from[i];
  return out;
}}""",
    "gf_store": f"""\
template <int N, class T> {_INLINE} void gf_store(T* to, const gf_pack<T, N>& pack, bool wide = true)
{{
  if (wide) *(gf_pack<T, N>*)to = pack;
  else
    for (int i = 0; i < N; i++) to[i] = pack.at[i];
}}""",
    "gf_last_block": """\
// Called by every thread of a block that has written its part: whether the other parts are written, too, and
// can be read. `done` counts the parts of one result; it is 0 before and after.
static __device__ __forceinline__ bool gf_last_block(int* done, int parts)
{
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(done, 1) == parts - 1;
    if (last) *done = 0;
  }
  last = __syncthreads_or(last);
  __threadfence();
  return last;
}""",
}
"""Device functions by name, each emitted where something uses it; those that use another come later."""

_FLOAT_FUNCTIONS = {**{name: name for name in (
    "sqrt", "cbrt", "hypot", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sin", "cos",
    "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
    "erfinv", "floor", "ceil", "trunc", "copysign", "fma")}, "round": "rint", "abs": "fabs"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
          "gt": ">", "ge": ">=", "and": "&&", "or": "||", "bit_and": "&", "bit_or": "|", "bit_xor": "^",
          "shift_left": "<<", "shift_right": ">>"}
_CALLS = {"maximum": "gf_max({0}, {1})", "minimum": "gf_min({0}, {1})", "sign": "gf_sign({0})",
          "neg": "(-{0})", "not": "(!{0})", "where": "({0} ? {1} : {2})", "sigmoid": "gf_sigmoid({0})",
          "softplus": "gf_softplus({0})", "isnan": "({0} != {0})", "isfinite": "({0} - {0} == 0)"}
_WRAPPING = ("add", "sub", "mul", "neg", "shift_left")
_COMBINE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum",
            "any": "bit_or", "all": "bit_and"}               # || and && might skip a shuffle


def literal(value: float | int | bool, dtype: DType) -> str:
    """A C expression with exactly this value."""
    if dtype is BOOL:
        return "true" if value else "false"
    if dtype.is_half:
        return f"((unsigned short){half_bits(value, dtype)})"
    if not dtype.is_float:
        number = f"{int(value)}LL" if value > -2**63 else f"({-2**63 + 1}LL - 1)"
        return f"(({C_TYPES[dtype]}){number})"
    if not np.isfinite(value):
        bits = np.asarray(abs(value) if value != value else value, dtype.numpy)
        if dtype is F32:
            return f"__int_as_float((int)0x{int(bits.view(np.uint32)):08x}u)"
        return f"__longlong_as_double((i64)0x{int(bits.view(np.uint64)):016x}ull)"
    text = float(np.asarray(value, dtype.numpy)).hex() + ("f" if dtype is F32 else "")
    return f"({text})" if text.startswith("-") else text


def c_name(name: str) -> str:
    """The C name of a variable of the kernel."""
    return "v_" + name.replace(".", "_").replace("'", "_q")


def dimension(d: DimLike, name: Callable[[str], str] = c_name) -> str:
    """C for a dimension, as an operand of any operator; `name` gives that of a symbol."""
    if not isinstance(d, Dim):
        number = str(d) if abs(d) < 2**31 else f"{d}LL"
        return number if d >= 0 else f"({number})"
    terms = []
    for atoms, coefficient in d.terms:
        factors = [] if coefficient == 1 and atoms else [dimension(coefficient)]
        for atom in atoms:
            if isinstance(atom, Symbol):
                factors.append(name(atom.name))
            else:
                function = "gf_floormod" if atom.rest else "gf_floordiv"
                factors.append(f"{function}({dimension(atom.inner, name)}, {dimension(atom.by)})")
        terms.append(" * ".join(factors))
    text = " + ".join(terms)
    return f"({text})" if len(terms) > 1 or " * " in text else text


@dataclass(frozen=True)
class Code:
    """The code of a kernel, as one that is launched or as a function that loops call. Its lines have the
    number of a block as `block`, and how many there are as `blocks`. `note`: for a comment; `meets`: whether
    the threads of a block wait for each other; `statics`: what lives beside it; `asks`: whether it has more
    shared memory than a kernel may declare."""

    kernel: Kernel
    lines: Sequence[str]
    note: str
    threads: int = THREADS
    scratch: DimLike = 0
    meets: bool = True
    statics: str = ""
    asks: bool = False

    def as_kernel(self) -> str:
        """The ``__global__`` function."""
        numbers = ("  const unsigned block = blockIdx.x;", "  const unsigned blocks = gridDim.x;")
        return self._launched(self.statics, without_unused([*numbers, *self.lines]))

    def as_function(self) -> str:
        """A function, and the ``__global__`` function that calls it."""
        name, own = f"{self.kernel.name}_body", ", ".join(map(" ".join, self._parameters()))
        head = f"static __device__ __forceinline__ void {name}(unsigned block, unsigned blocks, {own})"
        function = "\n".join([head, "{", *without_unused(self.lines), "}\n\n"])
        given = ", ".join(parameter for _, parameter in self._parameters())
        return self._launched(self.statics + function, [f"  {name}(blockIdx.x, gridDim.x, {given});"])

    def _parameters(self) -> list[tuple[str, str]]:
        """(type, name) of the arguments, of the scratch if there is some, and of the symbols."""
        return [*((f"{'const ' if a.mode == 'r' else ''}{C_TYPES[a.dtype]}*", a.name)
                  for a in self.kernel.arguments),
                *([("char*", "scratch")] if self.scratch != 0 else []),
                *(("idx", c_name(s)) for s in self.kernel.symbols)]

    def _launched(self, before: str, lines: Sequence[str]) -> str:
        own = ", ".join(map(" ".join, self._parameters()))
        return "\n".join([f"// Launch with {self.threads} threads a block, {self.note}.",
                          f'{before}extern "C" __global__ void __launch_bounds__({self.threads}) '
                          f"{self.kernel.name}({own})", "{", *lines, "}"]) + "\n"


_DECLARED = re.compile(r"( *)const (?:idx|unsigned|int|bool) (\w+) = [^,]*;$")


def without_unused(lines: Sequence[str]) -> list[str]:
    """The lines without the numbers that nothing uses, of which nvcc warns."""
    kept: list[str] = []                                     # from the last line on
    for line in reversed(lines):
        found = _DECLARED.match(line)
        if found is not None:
            scope = []
            for later in reversed(kept):
                if later.strip() and len(later) - len(later.lstrip()) < len(found[1]):
                    break
                scope.append(later)
            if not re.search(rf"\b{found[2]}\b", "\n".join(scope)):
                continue
        kept.append(line)
    return kept[::-1]


class Writer:
    """Writes statements. Expressions become text; what needs statements (a reduction) is written before its
    user. `indirect`: see `LoopKernel`; `used`: the locals that a value is computed for; `names`: variables
    that have another C name than their own; `held`: elements, by their text, that a register holds."""

    def __init__(self, arguments: Iterable[Argument], indirect: Mapping[str, Expr], used: set[str]):
        self.shapes = {a.name: a.shape for a in arguments}
        self.indirect, self.used = indirect, used
        self.names: dict[str, str] = {}
        self.held: dict[str, str] = {}
        self.lines: list[str] = []
        self.depth = 1
        self.made = 0

    def line(self, text: str) -> None:
        """Writes a line."""
        self.lines.append("  " * self.depth + text)

    def open(self, head: str) -> None:
        """Begins a block."""
        self.line(head + " {")
        self.depth += 1

    def close(self, end: str = "") -> None:
        """Ends the block."""
        self.depth -= 1
        self.line("}" + end)

    def loop(self, var: str, extent: DimLike) -> None:
        """Opens a loop."""
        v = c_name(var)
        self.open(f"for (idx {v} = 0; {v} < {self.dim(extent)}; {v}++)")

    def fresh(self, prefix: str) -> str:
        """A name that nothing has."""
        self.made += 1
        return f"{prefix}{self.made}"

    def let(self, s: Let) -> None:
        """Declares a local, if something uses it. It is not const: nvcc would try to find the values of
        a chain of const integers in a generic lambda, in exponential time."""
        if s.name in self.used:                              # nvcc warns of a value without a use
            value = self.expr(s.value)
            self.line(f"{C_TYPES[s.value.dtype]} {c_name(s.name)} = {value};")

    def variable(self, name: str) -> str:
        """The C name of a variable."""
        return self.names.get(name) or c_name(name)

    def dim(self, d: DimLike) -> str:
        """An index expression in C, as an operand of any operator."""
        def name(symbol: str) -> str:
            loaded = self.indirect.get(symbol)
            return self.variable(symbol) if loaded is None else f"((idx){self.expr(loaded)})"
        return dimension(d, name)

    def flat(self, arg: str, index: tuple[DimLike, ...]) -> DimLike:
        """The number of an element of an argument, in row-major order."""
        flat: DimLike = 0
        for d, extent in zip(index, self.shapes[arg]):
            flat = flat * extent + d
        return flat

    def element(self, arg: str, index: tuple[DimLike, ...]) -> str:
        """An element of an argument."""
        return f"{arg}[{self.dim(self.flat(arg, index))}]"

    def expr(self, e: Expr) -> str:
        """C for the expression, as an operand of any operator."""
        if isinstance(e, Const):
            return literal(e.value, e.dtype)
        if isinstance(e, Load):
            text = self.element(e.arg, e.index)
            return self.held.get(text, text)
        if isinstance(e, Index):
            return f"(({C_TYPES[e.dtype]}){self.dim(e.at)})"
        if isinstance(e, Local):
            return c_name(e.name)
        if isinstance(e, Guarded):
            value, fill = self.expr(e.value), self.expr(e.fill)
            return f"({self.holds(e)} ? {value} : {fill})"
        if isinstance(e, Reduce):
            return self.reduce(e)
        return apply(e.function, [self.expr(x) for x in e.args], e.args[0].dtype, e.dtype)

    def holds(self, e: Guarded) -> str:
        """Whether all guards hold."""
        bounds = [(self.dim(g.at), self.dim(g.bound)) for g in e.guards]
        return " && ".join(f"{at} >= 0 && {at} < {bound}" for at, bound in bounds)

    def reduce(self, e: Reduce) -> str:
        """Writes the loops of a reduction; the name of its result."""
        accs = self.accumulators(e)
        for var, extent in e.loops:
            self.loop(var, extent)
        self.accumulate(e, accs)
        for _ in e.loops:
            self.close()
        return accs[e.result]

    def accumulators(self, e: Reduce) -> list[str]:
        """Declares the accumulators of a reduction; their names."""
        accs = [self.fresh("acc") for _ in e.operands]
        for acc, operand, start in zip(accs, e.operands, identity(e)):
            self.line(f"{C_TYPES[operand.dtype]} {acc} = {start};")
        return accs

    def accumulate(self, e: Reduce, accs: list[str]) -> None:
        """Combines the accumulators with the operands of one iteration."""
        for let in e.lets:
            self.let(let)
        self.combine(e, accs, [self.expr(x) for x in e.operands])

    def combine(self, e: Reduce, accs: list[str], values: list[str]) -> None:
        """acc = acc combined with the values. For argmax and argmin the smaller number wins among equals, NaN
        beats all, and a number of -1 stands for no element."""
        if e.kind in _COMBINE:
            dtype = e.operands[0].dtype
            self.line(f"{accs[0]} = {apply(_COMBINE[e.kind], [accs[0], values[0]], dtype, dtype)};")
            return
        names = [self.fresh("x") for _ in values]
        for name, value, operand in zip(names, values, e.operands):
            self.line(f"const {C_TYPES[operand.dtype]} {name} = {value};")
        (a, i), (x, j), sign = accs, names, ">" if e.kind == "argmax" else "<"
        wins = f"({a} == {a} && ({x} {sign} {a} || {x} != {x}))"
        ties = f"(({x} == {a} || ({x} != {x} && {a} != {a})) && {j} < {i})"
        self.open(f"if ({j} >= 0 && ({i} < 0 || {wins} || {ties}))")
        self.line(f"{a} = {x};")
        self.line(f"{i} = {j};")
        self.close()


def identity(e: Reduce) -> list[str]:
    """What the accumulators start from."""
    dtype = e.operands[0].dtype
    if e.kind in ("argmax", "argmin"):
        return [literal(0, dtype), literal(-1, e.operands[1].dtype)]
    if e.kind not in ("max", "min"):
        return [literal({"sum": 0, "prod": 1, "any": False, "all": True}[e.kind], dtype)]
    if dtype.is_float:
        return [literal(float("-inf") if e.kind == "max" else float("inf"), dtype)]
    limits = np.iinfo(dtype.numpy)
    return [literal(int(limits.min if e.kind == "max" else limits.max), dtype)]


def apply(function: str, args: list[str], operand: DType, result: DType) -> str:
    """C for a scalar function of the table SCALARS. `operand`: the type of its first argument."""
    if function in _WRAPPING and operand in (I32, I64):
        unsigned = "unsigned" if operand is I32 else "unsigned long long"
        words = [f"({unsigned}){x}" for x in args]
        operation = f"-{words[0]}" if len(words) == 1 else f"{words[0]} {_INFIX[function]} {words[1]}"
        return f"(({C_TYPES[result]})({operation}))"
    if function in _INFIX:
        text = f"({args[0]} {_INFIX[function]} {args[1]})"
    elif function == "cast" and (operand.is_half or result.is_half):
        text = f"gf_from_{operand}({args[0]})" if operand.is_half else f"gf_to_{result}({args[0]})"
    elif function == "cast":
        nonzero = f"({args[0]} != {literal(0, operand)})"
        text = nonzero if result is BOOL else f"(({C_TYPES[result]}){args[0]})"
    elif function in ("mod", "floordiv"):
        helper = {"mod": "mod", "floordiv": "div"}[function]
        text = f"gf_{'' if operand.is_float else 'i'}{helper}({args[0]}, {args[1]})"
    elif operand.is_float and function in _FLOAT_FUNCTIONS:
        text = f"{_FLOAT_FUNCTIONS[function]}{'f' if operand is F32 else ''}({', '.join(args)})"
    elif function == "rsqrt":
        text = f"({literal(1, operand)} / sqrt{'f' if operand is F32 else ''}({args[0]}))"
    elif function == "abs":
        negative = apply("neg", args, operand, result)
        text = args[0] if operand.kind == "u" else f"({args[0]} < 0 ? {negative} : {args[0]})"
    else:
        text = _CALLS[function].format(*args)
    if result is U8 and function != "cast":              # C computes with bytes as ints
        return f"(({C_TYPES[U8]}){text})"
    return text


def used_locals(values: Iterable[Expr], lets: Iterable[Let]) -> set[str]:
    """The locals that the values depend on."""
    by_name = {x.name: x.value for x in lets}
    used: set[str] = set()
    stack = [*values]
    while stack:
        e = stack.pop()
        if isinstance(e, Local) and e.name not in used:
            used.add(e.name)
            if e.name in by_name:                           # else it is given
                stack.append(by_name[e.name])
        elif isinstance(e, Apply):
            stack.extend(e.args)
        elif isinstance(e, Guarded):
            stack.extend((e.value, e.fill))
        elif isinstance(e, Reduce):
            stack.extend(e.operands)
    return used
