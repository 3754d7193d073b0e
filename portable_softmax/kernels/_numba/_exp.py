"""exp and log1p written out, for numbers and for vectors; within one unit in the last place.

`exp_up(d)` is 2**64 * exp(d), for d <= 0. The factor keeps every exp above 0 a normal number down
to where exp itself rounds to 0: one multiplication scales the polynomial, and a division by a sum
with the same factor rounds once, also to subnormal numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from portable_softmax.kernels._numba._vectors import LANES, Vector, fused

UP, DOWN = 2.0**64, 2.0**-64


class Format(NamedTuple):
    """What exp and log1p need to know of a floating format."""

    kind: ir.Type
    bits: ir.Type
    mantissa: int
    bias: int
    lowest: float  # exp rounds to 0 from here downwards
    highest: float  # exp is inf from here upwards
    ln2: tuple[float, float]  # the first part times any exponent is exact
    exp: tuple[float, ...]
    log: tuple[float, ...]


# exp(r) = 1 + r + r**2 * q(r) on |r| <= log(2)/2, q fitted in 40 digits with Lawson's weights to
# the smallest relative error: 3.1e-9 and 3.6e-18. log1p: fdlibm's s_log1p.c and e_logf.c.
FORMATS = {
    types.float32: Format(
        kind=ir.FloatType(),
        bits=ir.IntType(32),
        mantissa=23,
        bias=127,
        lowest=-105.0,
        highest=90.0,
        ln2=(0.693359375, -2.12194440e-4),
        exp=(
            0.4999999345040558, 0.16666520675091812, 0.04166838761300896, 0.008368711360272556,
            0.0013814603019313672,
        ),
        log=(0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
    ),
    types.float64: Format(
        kind=ir.DoubleType(),
        bits=ir.IntType(64),
        mantissa=52,
        bias=1023,
        lowest=-746.0,
        highest=711.0,
        ln2=(6.93147180369123816490e-01, 1.90821492927058770002e-10),
        exp=(
            0.5000000000000011, 0.16666666666666413, 0.04166666666653023, 0.008333333333494218,
            0.001388888894360678, 0.00019841269507074274, 2.4801493127028698e-05,
            2.7557585969917054e-06, 2.763023711290513e-07, 2.5000174862750608e-08,
        ),
        log=(
            6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
            2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
            1.479819860511658591e-01,
        ),
    ),
}  # fmt: skip


class _Builder:
    """Writes instructions on numbers of one format, or on vectors of them."""

    def __init__(self, builder, kind):
        self.b = builder
        self.lanes = LANES[kind.dtype] if isinstance(kind, Vector) else 0
        self.f = FORMATS[kind.dtype if self.lanes else kind]
        self.kind, self.bits = self._each(self.f.kind), self._each(self.f.bits)

    def _each(self, scalar):
        return ir.VectorType(scalar, self.lanes) if self.lanes else scalar

    def _constant(self, kind, value):
        return ir.Constant(kind, [value] * self.lanes if self.lanes else value)

    def number(self, value):
        # llvmlite wants what a float32 constant holds exactly.
        return self._constant(self.kind, _rounded(value, self.f.mantissa))

    def integer(self, value):
        return self._constant(self.bits, value)

    def fma(self, a, b, c):
        return fused(self.b, a, b, c)

    def polynomial(self, coefficients, x):
        *lower, value = (self.number(c) for c in coefficients)
        for c in reversed(lower):
            value = self.fma(value, x, c)
        return value

    def at_least(self, low, x):
        """The larger one, `x` where it is nan: one instruction in this order."""
        low = self.number(low)
        return self.b.select(self.b.fcmp_ordered(">", low, x), low, x)

    def at_most(self, high, x):
        high = self.number(high)
        return self.b.select(self.b.fcmp_ordered("<", high, x), high, x)

    def two_to(self, n):
        """2**n for an integer in the range of normal exponents."""
        shifted = self.b.add(n, self.integer(self.f.bias))
        return self.b.bitcast(self.b.shl(shifted, self.integer(self.f.mantissa)), self.kind)

    def reduced(self, x, offset):
        """Return exp(r) and bits that end in n + offset, for x = n * log(2) + r.

        Adding a large number rounds to an integer and leaves it in the lowest bits.
        """
        f, b = self.f, self.b
        magic = self.number(1.5 * 2**f.mantissa + offset)
        t = self.fma(x, self.number(1 / math.log(2)), magic)
        n = b.fsub(t, magic)
        r = self.fma(n, self.number(-f.ln2[0]), x)
        r = self.fma(n, self.number(-f.ln2[1]), r)
        q = self.polynomial(f.exp, r)
        e = b.fadd(self.fma(q, b.fmul(r, r), r), self.number(1.0))
        return e, b.bitcast(t, self.bits)

    def exp_up(self, x):
        f, b = self.f, self.b
        e, n = self.reduced(self.at_least(f.lowest, x), f.bias + 64)
        scale = b.bitcast(b.shl(n, self.integer(f.mantissa)), self.kind)
        return b.fmul(e, scale)

    def exp(self, x):
        f, b = self.f, self.b
        e, n = self.reduced(self.at_most(f.highest, self.at_least(f.lowest, x)), 0)
        # The lowest bits as a signed number, and in two steps: either may be a subnormal's.
        unused = self.integer(f.bits.width - f.mantissa + 1)
        n = b.ashr(b.shl(n, unused), unused)
        a = b.ashr(n, self.integer(1))
        return b.fmul(b.fmul(e, self.two_to(a)), self.two_to(b.sub(n, a)))

    def difference_error(self, x, m, d):
        """(x - m) - d for d the rounded x - m (Knuth's two-sum)."""
        b = self.b
        t = b.fsub(d, x)
        return b.fsub(b.fsub(x, b.fsub(d, t)), b.fadd(m, t))

    def log1p(self, x):
        f, b = self.f, self.b
        one = self.number(1.0)
        u = b.fadd(one, x)
        bits = b.bitcast(u, self.bits)
        # The exponent that leaves a significand in [sqrt(1/2), sqrt(2)).
        one_bits = f.bias << f.mantissa
        root = {23: 0x3F3504F3, 52: 0x3FE6A09E667F3BCD}[f.mantissa]
        up = b.add(bits, self.integer(one_bits - root))
        k = b.sub(b.lshr(up, self.integer(f.mantissa)), self.integer(f.bias))
        m = b.and_(up, self.integer((1 << f.mantissa) - 1))
        g = b.fsub(b.bitcast(b.add(m, self.integer(root)), self.kind), one)
        # What rounding 1 + x lost, in the way that is exact.
        small = b.fsub(x, b.fsub(u, one))
        large = b.fsub(one, b.fsub(u, x))
        positive = b.icmp_signed(">", k, self.integer(0))
        c = b.fdiv(b.select(positive, large, small), u)
        k = b.sitofp(k, self.kind)
        half = b.fmul(b.fmul(self.number(0.5), g), g)
        s = b.fdiv(g, b.fadd(self.number(2.0), g))
        z = b.fmul(s, s)
        r = b.fmul(z, self.polynomial(f.log, z))
        high, low = (0.69313812256, 9.0580006145e-06) if f.mantissa == 23 else f.ln2
        tail = b.fadd(b.fmul(s, b.fadd(half, r)), self.fma(k, self.number(low), c))
        return self.fma(k, self.number(high), b.fsub(g, b.fsub(half, tail)))


def _rounded(value: float, mantissa: int) -> float:
    if mantissa == 52:
        return value
    import struct

    return struct.unpack("f", struct.pack("f", value))[0]


@intrinsic
def exp_up(typing, d):
    """2**64 * exp(d) for d <= 0."""
    return d(d), lambda context, builder, sig, args: _Builder(builder, d).exp_up(args[0])


@intrinsic
def exp(typing, x):
    """exp(x) for any x."""
    return x(x), lambda context, builder, sig, args: _Builder(builder, x).exp(args[0])


@intrinsic
def log1p(typing, x):
    """log(1 + x) for x >= 0."""
    return x(x), lambda context, builder, sig, args: _Builder(builder, x).log1p(args[0])


@intrinsic
def difference_error(typing, x, m, d):
    """The rounding error of d = x - m; nan beside an infinity."""

    def generate(context, builder, signature, args):
        return _Builder(builder, x).difference_error(*args)

    return x(x, x, x), generate


@intrinsic
def where_positive(typing, d, value):
    """`value`, 0 where d is so low that exp(d) is 0, -inf included."""

    def generate(context, builder, signature, args):
        write = _Builder(builder, d)
        lowest = write.number(write.f.lowest)
        counts = builder.fcmp_unordered(">", args[0], lowest)  # or nan
        return builder.select(counts, args[1], write.number(0.0))

    return d(d, d), generate
