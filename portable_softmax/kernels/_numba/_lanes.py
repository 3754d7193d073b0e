"""Many rows at once, one a lane: short rows turned around, and rows that run across memory.

A tile holds `n` classes of `T` rows in the dtype of the computation, class after class, T a
multiple of 16. What is not filled by a row holds what it holds: lanes do not meet.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba._exp import exp_up
from portable_softmax.kernels._numba._ir import (
    ahead,
    load,
    maximum,
    over,
    plus,
    store,
    transpose4,
    transpose8,
    typed,
)
from portable_softmax.kernels._numba._rows import added

function = njit(nogil=True, error_model="numpy")

# So many classes are summed as they come.
RUN = 16


# --------------------------------------------------------------------------- in and out


@function
def turn(source, step, target, target_step, rows, n):
    """Copy rows of a matrix to the columns of another."""
    if n >= 8:
        whole = rows - rows % 8
        for i in range(0, whole, 8):
            for j in range(0, n - 7, 8):
                transpose8(
                    ahead(source, i * step + j), step, ahead(target, j * target_step + i), target_step
                )
            if n % 8:  # the last square overlaps the one before
                j = n - 8
                transpose8(
                    ahead(source, i * step + j), step, ahead(target, j * target_step + i), target_step
                )
    elif n >= 4:
        whole = rows - rows % 4
        for i in range(0, whole, 4):
            transpose4(ahead(source, i * step), step, ahead(target, i), target_step)
            if n > 4:
                j = n - 4
                transpose4(
                    ahead(source, i * step + j), step, ahead(target, j * target_step + i), target_step
                )
    else:
        whole = 0
    for i in range(whole, rows):
        for j in range(n):
            store(target, j * target_step + i, load(source, i * step + j))


@function
def back(tile, T, target, step, rows, n):
    """Copy columns of a tile to rows of a matrix: its classes are the rows of `turn`."""
    if n >= 8:
        whole = rows - rows % 8
        for i in range(0, whole, 8):
            for j in range(0, n - 7, 8):
                transpose8(ahead(tile, j * T + i), T, ahead(target, i * step + j), step)
            if n % 8:
                j = n - 8
                transpose8(ahead(tile, j * T + i), T, ahead(target, i * step + j), step)
    elif n >= 4:
        whole = rows - rows % 4
        for i in range(0, whole, 4):
            transpose4(ahead(tile, i), T, ahead(target, i * step), step)
            if n > 4:
                j = n - 4
                transpose4(ahead(tile, j * T + i), T, ahead(target, i * step + j), step)
    else:
        whole = 0
    for i in range(whole, rows):
        for j in range(n):
            store(target, i * step + j, load(tile, j * T + i))


@function
def block(i, hi, T, n, inner):
    """Return where the i-th block begins, and how many rows it has."""
    if inner == 1:
        return i * n, min(T, hi - i)
    blocks = (inner + T - 1) // T
    column = i % blocks * T
    return i // blocks * n * inner + column, min(T, inner - column)


@function
def fetch(source, tile, T, n, inner, rows):
    """Copy a block to a tile."""
    if inner == 1:
        turn(source, n, tile, T, rows, n)
        return
    for j in range(n):
        x, y = ahead(source, j * inner), ahead(tile, j * T)
        for i in range(rows):
            store(y, i, load(x, i))


@function
def deliver(tile, target, T, n, inner, rows):
    """Copy a tile to a block."""
    if inner == 1:
        back(tile, T, target, n, rows, n)
        return
    for j in range(n):
        x, y = ahead(tile, j * T), ahead(target, j * inner)
        for i in range(rows):
            store(y, i, load(x, i))


# --------------------------------------------------------------------------- folds


@function
def tops(x, n, T, m):
    """Write the maxima to `m`."""
    for i in range(T):
        store(m, i, typed(m, -math.inf))
    for j in range(n):
        c = ahead(x, j * T)
        for i in range(T):
            store(m, i, maximum(load(c, i), load(m, i)))


@function
def softmax(x, n, T, lanes, t):
    """Turn a tile into probabilities; `lanes` has room for five numbers a lane."""
    m, s = lanes, ahead(lanes, T)
    total, lost = ahead(lanes, 2 * T), ahead(lanes, 3 * T)
    tops(x, n, T, m)
    for i in range(T):
        store(total, i, typed(m, 0.0))
        store(lost, i, typed(m, 0.0))
    for start in range(0, n, RUN):
        for i in range(T):
            store(s, i, typed(m, 0.0))
        for j in range(start, min(start + RUN, n)):
            c = ahead(x, j * T)
            for i in range(T):
                e = exp_up(over(load(c, i) - load(m, i), t))
                store(c, i, e)
                store(s, i, load(s, i) + e)
        for i in range(T):
            a, b = added(load(total, i), load(lost, i), load(s, i))
            store(total, i, a)
            store(lost, i, b)
    for i in range(T):
        store(s, i, typed(m, 1.0) / (load(total, i) + load(lost, i)))
    for j in range(n):
        c = ahead(x, j * T)
        for i in range(T):
            store(c, i, load(c, i) * load(s, i))
