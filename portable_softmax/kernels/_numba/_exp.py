"""exp and log1p written out, for numbers and for vectors, and the exps of a row.

Both are within one unit in the last place. A row's exps are exp((x - max) / T) times the number
`unit` of the row, which is theirs of the maximum, in [sqrt(1/2), sqrt(2)] times 2**64. The
factor keeps every exp above 0 a normal number down to where exp itself rounds to 0: one
multiplication scales the polynomial, and a division by a sum with the same factor rounds once, also
to subnormal numbers.

The difference of a logit to the maximum would be rounded, by half a unit of 64 in a row that spans
100, and its exp is off by as much. So none is taken where max / T is `near` 0: there x / T is
n log(2) + r for an integer n, and the exp is 2**(n - power) exp(r) for the integer `power` that the
maximum has. In other rows x - base with the maximum as `base` is exact wherever the exp is not 0,
as both are within a factor of 2 (Sterbenz, 1974).

`t` stands for the temperature T: the integer 1 for none, or what `temperature` makes of it.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from portable_softmax.kernels._numba._vectors import Vector, converted, elementwise, fused
from portable_softmax.portable import LOG_CONFIDENT

DOWN = 2.0**-64

# With more coefficients than these, a polynomial is what a processor waits for.
LONG = 8


class Format(NamedTuple):
    """What exp, log1p and tanh need to know of a floating format."""

    bits: ir.Type
    mantissa: int
    bias: int
    lowest: float  # exp rounds to 0 from here downwards
    highest: float  # exp is inf from here upwards
    near: float  # at least twice -lowest; up to here and -lowest more, x is reduced exactly
    ln2: tuple[float, float]  # the first part times any exponent is exact
    exp: tuple[float, ...]
    log: tuple[float, ...]
    tanh: tuple[float, ...]
    tangent: tuple[float, ...]


# (exp(u) - 1 - u) / u**2 on |u| <= 1, where the value is above 1/3.
_TANGENT = tuple(1.0 / math.factorial(k) for k in range(2, 19))

# exp(r) = 1 + r + r**2 * q(r) on |r| <= log(2)/2, q fitted in 40 digits with Lawson's weights to
# the smallest relative error: 3.1e-9 and 3.6e-18. log1p: fdlibm's s_log1p.c and e_logf.c.
# tanh(y) = y + y**3 * q(y**2) on |y| <= 3/4, by Remez' algorithm: 3.2e-8 and 2.9e-17.
FORMATS = {
    "float": Format(
        bits=ir.IntType(32),
        mantissa=23,
        bias=127,
        lowest=-105.0,
        highest=90.0,
        near=256.0,
        ln2=(0.693359375, -2.12194440e-4),
        exp=(
            0.4999999345040558, 0.16666520675091812, 0.04166838761300896, 0.008368711360272556,
            0.0013814603019313672,
        ),
        log=(0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
        tanh=(
            -0.3333306908607483, 0.13326521217823029, -0.0533902570605278, 0.019664913415908813,
            -0.004769489634782076,
        ),
        tangent=_TANGENT[:10],
    ),
    "double": Format(
        bits=ir.IntType(64),
        mantissa=52,
        bias=1023,
        lowest=-746.0,
        highest=711.0,
        near=2048.0,
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
        tanh=(
            -0.3333333333333224, 0.13333333333200126, -0.05396825391155734, 0.021869487322286878,
            -0.008863220242871611, 0.0035920048571687923, -0.0014551678843515835,
            0.0005875408665956323, -0.00023266536378147853, 8.524602372995208e-05,
            -2.487965110207331e-05, 4.073589977584733e-06,
        ),
        tangent=_TANGENT,
    ),
}  # fmt: skip


class Writer:
    """Writes instructions on numbers of one format, or on vectors of them."""

    def __init__(self, builder, x):
        self.b, self.kind = builder, x.type
        self.lanes = x.type.count if isinstance(x.type, ir.VectorType) else 0
        self.f = FORMATS[str(x.type.element if self.lanes else x.type)]
        self.bits = ir.VectorType(self.f.bits, self.lanes) if self.lanes else self.f.bits

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
        """Horner's scheme, for even and odd powers apart where it is long: fewer steps wait."""
        if len(coefficients) > LONG:
            square = self.b.fmul(x, x)
            even, odd = (self.polynomial(coefficients[i::2], square) for i in range(2))
            return self.fma(odd, x, even)
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

    def magic(self, offset):
        """What rounds to an integer n if it is added, and leaves n + offset in the lowest bits."""
        return self.number(1.5 * 2**self.f.mantissa + offset)

    def reduced(self, x, magic, t=None):
        """Return exp(r) and bits that end in n + offset, for x / T = n * log(2) + r."""
        e, bits = self.reduced_less_one(x, magic, t)
        return self.b.fadd(e, self.number(1.0)), bits

    def reduced_less_one(self, x, magic, t=None):
        """The same with exp(r) - 1, to its own last digits.

        `t` is 1 / (T log(2)), and 1 / T in two parts.
        """
        f, b = self.f, self.b
        bits = self.fma(x, self.number(1 / math.log(2)) if t is None else t[0], magic)
        n = b.fsub(bits, magic)
        if t is None:
            r = self.fma(n, self.number(-f.ln2[0]), x)
        else:
            r = self.fma(x, t[1], b.fmul(n, self.number(-f.ln2[0])))
            r = self.fma(x, t[2], r)
        r = self.fma(n, self.number(-f.ln2[1]), r)
        first, *others = f.exp  # the largest by itself, for the last digits
        q = self.fma(self.polynomial(others, r), r, self.number(first))
        return self.fma(q, b.fmul(r, r), r), b.bitcast(bits, self.bits)

    def tanh_and_slope(self, x):
        """tanh(x) and its slope 1 - tanh**2, which is 0 at a nan.

        A polynomial up to |x| = 3/4, which most logits are, and `_wide_tanh_and_slope` where a lane
        is beyond it. A lane's form depends on that lane alone.
        """
        b, square = self.b, self.b.fmul(x, x)
        y = self.fma(b.fmul(x, square), self.polynomial(self.f.tanh, square), x)
        near = y, self.fma(b.fneg(y), y, self.number(1.0))
        beyond = b.fcmp_unordered(">", square, self.number(0.75**2))
        return self._rarely(beyond, near, lambda: self._wide_tanh_and_slope(b.fadd(x, x)))

    def log_softmax_vjp(self, log_y, dy, s):
        """dy - exp(log_y) * s, as dy * (1 - exp) - exp * (s - dy)."""
        e, less_one = self.exp_and_expm1(log_y)
        kept = self.b.fneg(self.b.fmul(dy, less_one))
        return self.b.fsub(kept, self.b.fmul(e, self.b.fsub(s, dy)))

    def log_softmax_vjp_of_many(self, log_y, dy, s):
        """As it stands up to `LOG_CONFIDENT`, where 1 - exp has its digits."""
        b, zero = self.b, self.number(0.0)
        up = self.exp_up(log_y, self.reference(zero, zero, None), None)
        near = (self.fma(b.fneg(b.fmul(up, self.number(DOWN))), s, dy),)
        beyond = b.fcmp_unordered(">", log_y, self.number(LOG_CONFIDENT))
        return self._rarely(beyond, near, lambda: (self.log_softmax_vjp(log_y, dy, s),))[0]

    def _rarely(self, beyond, near, others):
        """What `near` is, but in lanes that are beyond it what `others` computes, if any is."""
        before = self.b.block
        with self.b.if_then(self._any(beyond), likely=False):
            found = [self.b.select(beyond, *pair) for pair in zip(others(), near, strict=True)]
            after = self.b.block
        return tuple(self._either(before, after, *pair) for pair in zip(near, found, strict=True))

    def _any(self, mask):
        if not self.lanes:
            return mask
        bits = ir.IntType(self.lanes)
        return self.b.icmp_unsigned("!=", self.b.bitcast(mask, bits), bits(0))

    def _either(self, before, after, first, second):
        found = self.b.phi(self.kind)
        found.add_incoming(first, before)
        found.add_incoming(second, after)
        return found

    def _wide_tanh_and_slope(self, x):
        """The same of x / 2, as (1 - e) / (1 + e) for e = exp(-|x|).

        1 - e has the digits of a small x, and the slope e (1 + |tanh|)**2 those of a small e.
        """
        f, b, one = self.f, self.b, self.number(1.0)
        sign = self.integer(1 << (f.bits.width - 1))
        bits = b.bitcast(x, self.bits)
        u = self.at_least(f.lowest, b.bitcast(b.or_(bits, sign), self.kind))
        m, n = self.reduced_less_one(u, self.magic(f.bias + 64))
        up = b.bitcast(b.shl(n, self.integer(f.mantissa)), self.kind)
        scale = b.fmul(up, self.number(DOWN))
        less = self.fma(b.fneg(scale), m, b.fsub(one, scale))
        y = b.fdiv(less, b.fsub(self.number(2.0), less))
        both = b.fadd(one, y)
        slope = b.fmul(b.fmul(self.fma(scale, m, scale), both), both)
        slope = b.select(b.fcmp_ordered("ord", x, x), slope, self.number(0.0))
        y = b.or_(b.bitcast(y, self.bits), b.and_(bits, sign))
        return b.bitcast(y, self.kind), slope

    def divergence_term(self, p, q, u):
        """p (exp(u) - 1 - u) for q = p exp(u); q where p is 0.

        Beyond 1 it is q - p (1 + u), where little or nothing cancels.
        """
        b, one = self.b, self.number(1.0)
        near = b.fmul(b.fmul(p, b.fmul(u, u)), self.polynomial(self.f.tangent, u))
        far = b.fsub(q, b.fmul(p, b.fadd(one, u)))
        found = b.select(b.fcmp_ordered("<=", self.size(u), one), near, far)
        return b.select(b.fcmp_ordered("==", p, self.number(0.0)), q, found)

    def divergence_slope(self, p, q, u):
        """q - p, as p (exp(u) - 1) where they are near each other."""
        b = self.b
        less_one = self.fma(b.fmul(u, u), self.polynomial(self.f.tangent, u), u)
        near = b.fcmp_ordered("<=", self.size(u), self.number(1.0))
        near = b.and_(near, b.fcmp_ordered("!=", p, self.number(0.0)))
        return b.select(near, b.fmul(p, less_one), b.fsub(q, p))

    def size(self, x):
        """|x|."""
        return self.b.select(self.b.fcmp_ordered("<", x, self.number(0.0)), self.b.fneg(x), x)

    @property
    def zero(self):
        """Where the scale of `exp_up` is 0.

        That is far below `lowest`. A factor in between would round to 0, which takes a hundred
        times as long as others do, and what is masked by -inf has no other.
        """
        return -(self.f.bias + 64) * math.log(2)

    def difference(self, x, m, t):
        """x - m, times the scale of a temperature; None is none."""
        if t is None:
            return self.b.fsub(x, m)
        return self.fma(x, t[0], self.b.fneg(self.b.fmul(m, t[0])))

    def exponent(self, x, m, t):
        d = self.difference(x, m, t)
        return d if t is None else self.fma(d, t[1], self.b.fmul(d, t[2]))

    def split(self, m, t):
        b, magic = self.b, self.magic(0)
        q = self.exponent(m, b.fmul(m, self.number(0.0)), t)
        near = b.fcmp_ordered("<", self.size(q), self.number(self.f.near))
        power = b.fsub(self.fma(q, self.number(1 / math.log(2)), magic), magic)
        zero = self.number(0.0)
        return b.select(near, zero, m), b.select(near, power, zero)

    def reference(self, base, power, t):
        magic = self.b.fsub(self.magic(self.f.bias + 64), power)
        lowest = self.fma(power, self.number(math.log(2)), self.number(self.f.lowest))
        return base, magic, self.times_divisor(lowest, t)

    def reference_of(self, m, t):
        return self.reference(*self.split(m, t), t)

    def times_divisor(self, q, t):
        """The difference of which q is the quotient, roughly."""
        return q if t is None else self.b.fmul(q, t[4])

    def exp_up(self, x, at, t):
        base, magic, lowest = at
        d, gap = self.difference(x, base, t), self.number(self.zero - self.f.lowest)
        zero = self.b.fadd(lowest, self.times_divisor(gap, t))
        d = self.b.select(self.b.fcmp_ordered(">", lowest, d), zero, d)
        e, n = self.reduced(d, magic, None if t is None else (t[3], t[1], t[2]))
        scale = self.b.bitcast(self.b.shl(n, self.integer(self.f.mantissa)), self.kind)
        return self.b.fmul(e, scale)

    def exp_and_expm1(self, x):
        """exp(x) and exp(x) - 1, the latter with its own digits near 0."""
        f, b, one = self.f, self.b, self.number(1.0)
        x = self.at_most(f.highest, self.at_least(f.lowest, x))
        m, n = self.reduced_less_one(x, self.magic(0))
        # The lowest bits as a signed number, and in two steps: either may be a subnormal's.
        unused = self.integer(f.bits.width - f.mantissa + 1)
        n = b.ashr(b.shl(n, unused), unused)
        a = b.ashr(n, self.integer(1))
        e = b.fmul(b.fmul(b.fadd(m, one), self.two_to(a)), self.two_to(b.sub(n, a)))
        near = b.fcmp_ordered("<", self.size(x), self.number(0.34))  # x is not reduced
        return e, b.select(near, m, b.fsub(e, one))

    def log1p(self, x):
        """log(1 + x) for x >= 0, as the two numbers that it is the sum of; the first is larger."""
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
        k_log2 = b.fmul(k, self.number(high))  # exact
        rest = b.fsub(g, b.fsub(half, tail))
        log = b.fadd(k_log2, rest)
        return log, b.fsub(rest, b.fsub(log, k_log2))


def _rounded(value: float, mantissa: int) -> float:
    return value if mantissa == 52 else struct.unpack("f", struct.pack("f", value))[0]


@elementwise
def size(builder, x):
    """|x|."""
    return Writer(builder, x).size(x)


@elementwise
def log_softmax_vjp(builder, log_y, dy, s):
    """dy - exp(log_y) * s, with the digits that 1 - exp(log_y) has near log_y = 0."""
    return Writer(builder, log_y).log_softmax_vjp(log_y, dy, s)


@elementwise
def log_softmax_vjp_of_many(builder, log_y, dy, s):
    """The same in less time where few vectors have an entry near 0, and in more where many have."""
    return Writer(builder, log_y).log_softmax_vjp_of_many(log_y, dy, s)


@elementwise
def divergence_term(builder, p, q, u):
    """p (exp(u) - 1 - u) for q = p exp(u)."""
    return Writer(builder, p).divergence_term(p, q, u)


@elementwise
def divergence_slope(builder, p, q, u):
    """Return q - p for q = p exp(u)."""
    return Writer(builder, p).divergence_slope(p, q, u)


@elementwise
def log1p(builder, x):
    """log(1 + x) for x >= 0."""
    return Writer(builder, x).log1p(x)[0]


@elementwise
def plus_log1p(builder, m, x):
    """m + log(1 + x) for x >= 0: where they cancel, with what rounding the logarithm lost."""
    log, lost = Writer(builder, x).log1p(x)
    return builder.fadd(builder.fadd(m, log), lost)


# --------------------------------------------------------------------------- exponents


def temperature(value: float, dtype: Any) -> int | tuple[float, ...]:
    """Return T as the kernels take it: 1 for none, or a scale and what depends on D = scale * T.

    That is 1 / D in two parts, 1 / (D log(2)) and D. The scale is a power of two that keeps x - m
    from overflowing before it is divided. The first part is rounded towards 0, so that the second
    is positive and -inf stays -inf.
    """
    if value == 1.0:
        return 1
    info = np.finfo(dtype)
    tiny = float(info.smallest_normal)
    large = 2.0 ** (info.maxexp // 2)
    scale = 0.5 if value < large else 1 / large
    inverse = 1 / (Fraction(value) * Fraction(scale))
    first = dtype(float(inverse))
    if Fraction(float(first)) > inverse:
        first = np.nextafter(first, dtype(0))
    second = max(float(inverse - Fraction(float(first))), tiny)
    return scale, float(first), second, float(inverse) / math.log(2), float(1 / inverse)


def _flat(kind):
    return tuple(kind) if isinstance(kind, types.BaseTuple) else (kind,)


def _written(method, results, *given):
    """Return what an intrinsic returns: its signature, and what writes it by a method of `Writer`.

    What is given are numbers, vectors and tuples of them, and at last a temperature.
    """
    *values, _ = given
    kind = next((a for value in values for a in _flat(value) if isinstance(a, Vector)), given[0])
    result = kind if results == 1 else types.UniTuple(kind, results)

    def generate(context, builder, signature, args):
        def one(given, value):
            if not isinstance(given, types.BaseTuple):
                return converted(context, builder, kind, given, value)
            return [one(a, builder.extract_value(value, i)) for i, a in enumerate(given)]

        *found, number = [
            None if isinstance(a, types.Integer) else one(a, value)
            for a, value in zip(given, args, strict=True)
        ]
        found = method(Writer(builder, found[0]), *found, number)
        return found if results == 1 else context.make_tuple(builder, result, found)

    return result(*given), generate


@intrinsic
def exponent(typing, x, m, t):
    """(x - m) / T."""
    return _written(Writer.exponent, 1, x, m, t)


@intrinsic
def split(typing, m, t):
    """The base and the power of rows with the maximum m."""
    return _written(Writer.split, 2, m, t)


@intrinsic
def reference(typing, base, power, t):
    """What `exp_up` takes of them."""
    return _written(Writer.reference, 3, base, power, t)


@intrinsic
def reference_of(typing, m, t):
    """What `exp_up` takes of rows with the maximum m."""
    return _written(Writer.reference_of, 3, m, t)


@intrinsic
def exp_up(typing, x, at, t):
    """2**(64 - power) * exp((x - base) / T), 0 where exp((x - m) / T) rounds to 0."""
    return _written(Writer.exp_up, 1, x, at, t)
