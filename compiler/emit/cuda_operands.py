"""CUDA C that brings the operands of a contraction into shared memory, a run of k's at a time.

An operand that is a load, maybe guarded with zeros, is copied without passing through registers (cp.async):
16 bytes at a time where neighbours lie side by side, one element at a time elsewhere. Its address is a sum of
what depends on its own axes, which is computed once per tile, and of what depends on k. Any other expression
is evaluated into registers while the block multiplies, and stored behind that.
"""
from __future__ import annotations

from dataclasses import dataclass

from graphflow.compiler.emit.cuda_text import C_TYPES, Writer, c_name, literal
from graphflow.compiler.emit.cuda_tiles import BlockTile, padding, side_by_side
from graphflow.compiler.emit.operands import Axes, coefficient, load_offset, names_of
from graphflow.compiler.kernel.form import Const, ContractionKernel, Expr, Guarded, Load
from graphflow.compiler.kernel.walk import subexpressions
from graphflow.compiler.plan.dims import Dim, DimLike, product, symbols_of

COPY_HELPERS = {
    "gf_copy": """\
// COUNT elements to shared memory, zeros if not `holds`; there when gf_copies_wait says so
#ifdef __CUDACC__
template <int COUNT, class T>
static __device__ __forceinline__ void gf_copy(T* to, const T* from, bool holds)
{
  constexpr int bytes = COUNT * sizeof(T), piece = sizeof(T) < 4 ? bytes : sizeof(T);
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  if constexpr (bytes == 16) {
    if ((size_t)from % 16 == 0) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(holds ? 16 : 0)
                   : "memory");
      return;
    }
  }
  if constexpr (piece == 16) {
    for (int i = 0; i < COUNT; i++) to[i] = holds ? from[i] : T(0);
  } else {
    for (int i = 0; i < bytes / piece; i++)
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at + i * piece), "l"(from + i),
                   "n"(piece), "r"(holds ? piece : 0) : "memory");
  }
}
#endif""",
    "gf_shared": """\
// the shared memory that a launch asks for
#ifdef __CUDACC__
static __device__ __forceinline__ char* gf_shared()
{
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#endif""",
    "gf_copies_end": """\
#ifdef __CUDACC__
static __device__ __forceinline__ void gf_copies_end()
{
  asm volatile("cp.async.commit_group;" ::: "memory");
}
#endif""",
    "gf_copies_wait": """\
// until all but the last COUNT groups of copies have arrived
#ifdef __CUDACC__
template <int COUNT> static __device__ __forceinline__ void gf_copies_wait()
{
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}
#endif""",
}
"""Device functions around shared memory; a host that simulates a GPU has its own."""


def axis_values(w: Writer, axes: Axes, flat: str) -> list[tuple[str, str]]:
    """(variable, its value) of axes for a number of an element, which is not negative."""
    values, rest = [], f"(unsigned){flat}"
    for number, (name, extent) in reversed(list(enumerate(axes))):
        by = f"(unsigned){w.dim(extent)}"
        values.append((c_name(name), f"{rest} % {by}" if number else rest))
        rest = f"({rest} / {by})"
    return values


def declare_axes(w: Writer, axes: Axes, flat: str) -> None:
    """Declares the variables of axes."""
    for name, value in axis_values(w, axes, flat):
        w.line(f"const idx {name} = {value};")


@dataclass(frozen=True)
class Sum:
    """An index as what depends on the operand's own axes plus what depends on k."""

    own: DimLike
    k: DimLike


@dataclass(frozen=True)
class Plain:
    """A load and its guards (index, bound), where all of them are such sums; zero outside the guards."""

    arg: str
    at: Sum
    guards: tuple[tuple[Sum, DimLike], ...]


def plain(kernel: ContractionKernel, e: Expr) -> Plain | None:
    """The operand as a plain load, if it is one."""
    k = {var for var, _ in kernel.contraction.k}
    guards = e.guards if isinstance(e, Guarded) else ()
    if guards and not (isinstance(e, Guarded) and isinstance(e.fill, Const) and e.fill.value == 0):
        return None
    load = e.value if isinstance(e, Guarded) else e
    offset = load_offset(kernel, load)
    if offset is None or names_of(e) & set(kernel.indirect):
        return None
    assert isinstance(load, Load)
    own = {var for var, _ in (*kernel.contraction.batch, *kernel.contraction.m, *kernel.contraction.n,
                              *kernel.contraction.groups)}
    at, sums = _split(offset, k, own), [_split(g.at, k, own) for g in guards]
    if at is None or None in sums or any(symbols_of(g.bound) & (k | own) for g in guards):
        return None
    return Plain(load.arg, at, tuple((s, g.bound) for s, g in zip(sums, guards) if s is not None))


def _split(d: DimLike, k: set[str], own: set[str]) -> Sum | None:
    terms: tuple[list, list] = ([], [])
    for atoms, c in d.terms if isinstance(d, Dim) else ():
        names = symbols_of(Dim(((atoms, c),))) if atoms else set()
        if names & k and names & own:
            return None
        terms[bool(names & k)].append((atoms, c))
    if not isinstance(d, Dim):
        return Sum(d, 0)
    mine, others = (_sum(part) for part in terms)
    return Sum(mine, others)


def _sum(terms: list) -> DimLike:
    if not terms:
        return 0
    return terms[0][1] if len(terms) == 1 and not terms[0][0] else Dim(tuple(terms))


def _split_number(threads: int, width: int) -> tuple[str, str]:
    """(rest, quotient) of ``thread + i * threads`` divided by the width, so that what a thread has in common
    for all i can be seen."""
    if threads % width == 0:
        return f"thread % {width}", f"thread / {width} + i * {threads // width}"
    if width % threads == 0:
        return f"thread + i % {width // threads} * {threads}", f"i / {width // threads}"
    return f"(thread + i * {threads}) % {width}", f"(thread + i * {threads}) / {width}"


def _times(text: str, many: int) -> str:
    return f"({text}) * {many}" if many > 1 else text


class Operand:
    """One side of the products. `width`: the elements that a run has for each k."""

    def __init__(self, kernel: ContractionKernel, tile: BlockTile, left: bool, e: Expr):
        c = kernel.contraction
        self.kernel, self.tile, self.e, self.dtype = kernel, tile, e, e.dtype
        self.name, self.at, self.total = ("left", "row", "M") if left else ("right", "column", "N")
        self.axes, self.k = c.m if left else c.n, c.k
        self.group = "" if left or not c.groups else c.groups[0][0]
        self.width = tile.rows if left else tile.columns * len(c.accumulators)
        self.along_k = self._along_k()
        self.by_k = self.along_k and tile.units != "fma"     # rows of shared memory run along k
        extents = [product(x for _, x in axes) for axes in (self.axes, self.k)]
        by = tile.rows if left else tile.columns, tile.depth
        self.edge, self.rest = (not isinstance(x, int) or x % y != 0 for x, y in zip(extents, by))
        self.plain = plain(kernel, e)
        self.many = self._many()
        if self.dtype.bytes * self.many < 4:
            self.plain = None

    def _along_k(self) -> bool:
        """Whether neighbouring elements of the operand lie along k rather than along its own axis."""
        loads = [x for x in subexpressions(self.e.value if isinstance(self.e, Guarded) else self.e)
                 if isinstance(x, Load)]
        steps = [load_offset(self.kernel, x) for x in loads]
        along_k, own = (bool(names) and any(coefficient(s, names[-1][0]) == 1 for s in steps if s is not None)
                        for names in (self.k, self.axes))
        return along_k and not own

    def _many(self) -> int:
        """Elements that are copied at a time."""
        many, axes = 16 // self.dtype.bytes, self.k if self.along_k else self.axes
        if self.plain is None or self.along_k != self.by_k or not axes:
            return 1
        var = axes[-1][0]
        guarded = any(var in symbols_of(s.own, s.k) for s, _ in self.plain.guards)
        at = self.plain.at.own + self.plain.at.k
        return many if not guarded and side_by_side(at, axes, many) else 1

    # -- where things are

    def shape(self) -> tuple[int, int]:
        """Rows and columns of a run in shared memory."""
        rows, columns = (self.width, self.tile.depth) if self.by_k else (self.tile.depth, self.width)
        return rows, columns + padding(self.tile, self.by_k)

    def place(self, at: str, depth: str) -> str:
        """Indices of an element of the run. Pieces of 16 bytes of halves change places within a row, so that
        the eight rows that ldmatrix reads at a time lie in different banks."""
        row, column = (at, depth) if self.by_k else (depth, at)
        if self.tile.units == "half":
            _, wide = self.shape()
            turn = (f"({row}) & 7" if wide % 64 == 0 else f"({row}) >> 1 & 3" if wide % 32 == 0
                    else f"({row}) >> 2 & 1")
            column = f"({column}) ^ ({turn}) * 8"
        return f"[{row}][{column}]"

    def _each(self, w: Writer) -> None:
        """Opens the loop over a thread's share of a run; `at` and `depth` are its place there."""
        t, many = self.tile, self.many
        size = self.width * t.depth // many
        w.line("#pragma unroll")
        w.open(f"for (int i = 0; i < {self.share}; i++)")
        if size % t.threads:
            w.line(f"if (thread + i * {t.threads} >= {size}) break;")
        if not self.along_k:
            first, second = _split_number(t.threads, self.width // many)
            places = _times(first, many), second
        elif self.by_k:
            first, second = _split_number(t.threads, t.depth // many)
            places = second, _times(first, many)
        else:                             # 8 k's of 4 neighbours go to different banks
            first, second = _split_number(t.threads, 8 * self.width)
            places = f"({first}) / 8", f"thread % 8 + ({second}) * 8"
        w.line(f"[[maybe_unused]] const int at = {places[0]}, depth = {places[1]};")

    @property
    def share(self) -> int:
        """How many copies, or elements, of a run each thread brings."""
        return -(-self.width * self.tile.depth // self.many // self.tile.threads)

    # -- statements

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        rows, columns = self.shape()
        return self.tile.stages * rows * columns * self.dtype.bytes

    def declare(self, w: Writer, start: int) -> None:
        """Its runs, in shared memory from the byte `start` on."""
        rows, columns = self.shape()
        w.line(f"auto& {self.name} = *({C_TYPES[self.dtype]}(*)[{self.tile.stages}][{rows}][{columns}])"
               f"(shared + {start});")

    def begin(self, w: Writer) -> None:
        """What does not depend on k, per tile."""
        own = [c_name(name) for name, _ in self.axes] + ([c_name(self.group)] if self.group else [])
        kept = {f"{self.name}_{name}": name for name in own}
        if self.plain is not None:
            kept = {f"{self.name}_base": w.dim(self.plain.at.own)}
            kept |= {f"{self.name}_at{j}": w.dim(s.own) for j, (s, _) in enumerate(self.plain.guards)}
        for name in kept:
            w.line(f"idx {name}[{self.share}];")
        if self.edge:
            w.line(f"bool {self.name}_in[{self.share}];")
        self._each(w)
        place = "at"
        if self.group:                                       # the columns of a group, then those of the next
            place = f"at % {self.tile.columns}"
            w.line(f"const idx {c_name(self.group)} = at / {self.tile.columns};")
        w.line(f"const idx own = first_{self.at} + {place};")
        declare_axes(w, self.axes, "own")
        for name, value in kept.items():
            w.line(f"{name}[i] = {value};")
        if self.edge:
            w.line(f"{self.name}_in[i] = own < {self.total};")
        w.close()
        if self.plain is None:
            w.line(f"{C_TYPES[self.dtype]} next_{self.name}[{self.share}];")

    def fetch(self, w: Writer) -> None:
        """Begins to bring the run that starts at `first_k` to `stage`."""
        flat = self.plain is not None and self._step() is not None
        inner = self.k[-1][1] if self.k else 1
        whole = not flat and isinstance(inner, int) and inner % self.tile.depth == 0
        if whole:                                            # only the last axis moves within a run
            for name, text in axis_values(w, self.k, "first_k"):
                w.line(f"const idx first_{self.name}_{name} = {text};")
        self._each(w)
        if self.rest or not whole:
            w.line("const idx k = first_k + depth;")
        for name, _ in self.k if whole else ():
            more = " + depth" if name == self.k[-1][0] else ""
            w.line(f"const idx {c_name(name)} = first_{self.name}_{c_name(name)}{more};")
        if not whole and not flat:
            declare_axes(w, self.k, "k")
        if self.plain is not None:
            self._copy(w)
        else:
            self._evaluate(w)
        w.close()

    def _inside(self) -> list[str]:
        """Conditions for an element that is not beyond the edges."""
        return [f"{self.name}_in[i]"] * self.edge + ["k < K"] * self.rest

    def _step(self) -> DimLike | None:
        """What is added for each k, where that is the same for all, and no guard depends on k."""
        assert self.plain is not None
        if any(s.k != 0 for s, _ in self.plain.guards) or not self.k:
            return None
        steps = [coefficient(self.plain.at.k, name) for name, _ in self.k]
        whole = all(step == inner * extent for step, inner, (_, extent) in zip(steps, steps[1:], self.k[1:])
                    if step is not None and inner is not None)
        return steps[-1] if None not in steps and whole else None

    def _copy(self, w: Writer) -> None:
        assert self.plain is not None
        holds = self._inside() + [
            f"(unsigned)({self.name}_at{j}[i] + {w.dim(s.k)}) < (unsigned){w.dim(bound)}"
            for j, (s, bound) in enumerate(self.plain.guards)]
        w.line(f"const bool holds = {' && '.join(holds) or 'true'};")
        step = self._step()
        more = w.dim(self.plain.at.k) if step is None else "k" if step == 1 else f"{w.dim(step)} * k"
        offset = f"{'holds ? ' if holds else ''}{self.name}_base[i] + {more}"
        offset += " : 0" if holds else ""
        w.line(f"gf_copy<{self.many}>(&{self.name}[stage]{self.place('at', 'depth')}, "
               f"&{self.plain.arg}[{offset}], holds);")

    def _evaluate(self, w: Writer) -> None:
        w.line(f"{C_TYPES[self.dtype]} value = {literal(0, self.dtype)};")
        w.open(f"if ({' && '.join(self._inside()) or 'true'})")
        for name in [name for name, _ in self.axes] + ([self.group] if self.group else []):
            w.line(f"const idx {c_name(name)} = {self.name}_{c_name(name)}[i];")
        w.line(f"value = {w.expr(self.e)};")
        w.close()
        w.line(f"next_{self.name}[i] = value;")

    def keep(self, w: Writer) -> None:
        """Stores what was evaluated into `stage`."""
        self._each(w)
        w.line(f"{self.name}[stage]{self.place('at', 'depth')} = next_{self.name}[i];")
        w.close()
