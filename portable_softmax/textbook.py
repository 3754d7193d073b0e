"""Softmax, cross-entropy and their gradients, derived step by step as code that runs.

Read this file from top to bottom. Each step repairs what the step before it leaves broken, and
each example shows the failure as well as the repair:

1. `softmax_naive`: the definition, typed in as it stands. It overflows.
2. `softmax_shifted`: subtract the largest score first. Safe, but for one sample only.
3. `softmax_batched`: one sample per row, and why that needs ``keepdims``.
4. `softmax_transposed`: the same result without ``keepdims``, by turning the batch around.
5. `softmax_jacobian`: the derivative, from the quotient rule and its two cases.
6. `Softmax`: a layer, whose backward pass multiplies by the Jacobian without ever building it.
7. `cross_entropy_error`: how wrong the probabilities are, and what the 1e-7 in the log costs.
8. `SoftmaxWithLoss`: the two steps as one, where everything cancels but ``y - t``.

Let x be the scores of one sample, one score for each of C classes (the "logits"). Then::

    e_i = exp(x_i)        S = sum_k e_k        y_i = e_i / S

and y, the softmax of x, holds positive numbers that sum to 1: the probabilities of the classes.
The label is t, either the number of the right class or its one-hot row (1 for the right class, 0
for the others). L is the loss, a single number, and in the code ``dx`` is short for dL/dx: how much
L changes for a small change of each entry of x.

Arrays may come from any library that follows the array API standard, and hold floating numbers. The
first line of most functions, ``xp = namespace(x)``, asks the array for the functions of its own
library: read ``xp`` as ``np``. The standard spells arguments out (``axis=1``, never a bare ``1``).

The steps stop where the explanation is complete. What a program should call are the package's own
functions, such as `portable_softmax.softmax` and `portable_softmax.cross_entropy`: they take any
axis, masks, integers and half precision, check their arguments, and keep the digits that step 7
shows being lost.

>>> import numpy as np
>>> from portable_softmax import textbook
>>> layer = textbook.SoftmaxWithLoss()
>>> print(round(float(layer.forward(np.asarray([[0.0, 0.0]]), np.asarray([1]))), 6))
0.693147
>>> layer.backward()  # y - t
array([[ 0.5, -0.5]])
"""

from __future__ import annotations

from typing import Any, final

from portable_softmax._typing import Array, ArrayT
from portable_softmax.libraries import namespace

__all__ = [
    "Softmax",
    "SoftmaxWithLoss",
    "cross_entropy_error",
    "softmax_batched",
    "softmax_jacobian",
    "softmax_naive",
    "softmax_shifted",
    "softmax_transposed",
]


# ------------------------------------------------------------------ step 1: the definition


def softmax_naive(x: ArrayT) -> ArrayT:
    """Compute the softmax of one sample exactly as it is defined.

    Scores may be any numbers; probabilities must be positive and sum to 1. The exponential makes
    each score positive, and the division by their sum makes them sum to 1::

        y_i = exp(x_i) / sum_k exp(x_k)

    The formula is right, and this program is not: exp leaves the range of floating numbers long
    before the scores get strange. It is inf above 88.72 in float32, 11.09 in float16, 709.78 in
    float64, and inf / inf is nan. On the other side it is 0 from x = -745.2 down (float64), and
    where all the scores lie there, 0 / 0 is nan too. Yet y itself is harmless: each y_i lies
    between 0 and 1. Only the way to it overflows, and `softmax_shifted` takes another way.

    Parameters
    ----------
    x : array, shape (C,), floating
        The scores of one sample.

    Returns
    -------
    array, shape (C,)
        The probabilities, where nothing overflowed; nan where it did.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import softmax_naive
    >>> softmax_naive(np.array([1.0, 2.0, 3.0, 4.0])).round(4)
    array([0.0321, 0.0871, 0.2369, 0.6439])

    The differences between the next scores are the same, so the answer should be, too. NumPy would
    warn about an overflow and about an invalid division; here it is told to stay quiet:

    >>> with np.errstate(over="ignore", invalid="ignore"):
    ...     softmax_naive(np.array([1000.0, 1001.0, 1002.0, 1003.0]))
    array([nan, nan, nan, nan])
    """
    xp = namespace(x)
    e = xp.exp(x)
    y: ArrayT = e / xp.sum(e)
    return y


# ------------------------------------------------------------------ step 2: subtract the maximum


def softmax_shifted(x: ArrayT) -> ArrayT:
    """Compute the softmax of one sample without overflow, by subtracting the largest score.

    Subtract any number m from all the scores. A factor exp(-m) comes out of every term, above the
    line and below it, and cancels::

        exp(x_i - m) / sum_k exp(x_k - m)  =  exp(x_i) exp(-m) / (exp(-m) sum_k exp(x_k))  =  y_i

    Softmax sees the differences between scores, never their level. So m is ours to choose, and
    m = max(x) settles every danger at once:

    - no exponent is above 0, so exp cannot overflow;
    - the largest exponent is 0, so the sum holds exp(0) = 1 and cannot be 0;
    - a term far below the maximum becomes 0, which is what its y_i rounds to anyway.

    What is left to repair: this function knows one sample only. Of a batch it takes one maximum and
    one sum over everything, as the last example shows; `softmax_batched` takes them row by row.

    Parameters
    ----------
    x : array, shape (C,), floating
        The scores of one sample.

    Returns
    -------
    array, shape (C,)
        The probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import softmax_shifted
    >>> softmax_shifted(np.array([1.0, 2.0, 3.0, 4.0])).round(4)
    array([0.0321, 0.0871, 0.2369, 0.6439])
    >>> softmax_shifted(np.array([1000.0, 1001.0, 1002.0, 1003.0])).round(4)
    array([0.0321, 0.0871, 0.2369, 0.6439])

    Two samples at once share a single 1 between them, instead of having one each:

    >>> y = softmax_shifted(np.array([[0.0, 0.0], [0.0, 0.0]]))
    >>> y
    array([[0.25, 0.25],
           [0.25, 0.25]])
    """
    xp = namespace(x)
    e = xp.exp(x - xp.max(x))
    y: ArrayT = e / xp.sum(e)
    return y


# ------------------------------------------------------------------ step 3: one sample per row


def softmax_batched(x: ArrayT) -> ArrayT:
    """Compute the softmax of each row of a batch, or of a single sample.

    Each row is a sample with a maximum and a sum of its own, so both run along the last axis, which
    is ``axis=-1``, and ``axis=1`` in a batch. What shape do they come back in? An (N, C) batch has
    N maxima, of shape (N,), and broadcasting lines shapes up from the *right*. So the N would meet
    the C::

        without keepdims            with keepdims=True

        x      (N, C)               x      (N, C)
        max       (N,)              max    (N, 1)
               N meets C                   N meets N, and the 1 stretches over the C classes

    Without ``keepdims`` the subtraction is an error where N differs from C. Where N happens to
    equal C it is worse: there is no error, column j loses the maximum of *row* j, and the result
    is wrong. With ``keepdims`` the reduced axis stays, with length 1, and each row meets its own
    maximum and its own sum. A single sample has the shape (C,); its last axis is its only one, and
    the same program does for it what `softmax_shifted` does.

    Parameters
    ----------
    x : array, shape (N, C) or (C,), floating
        The scores, one sample per row.

    Returns
    -------
    array, the shape of `x`
        The probabilities; each row sums to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import softmax_batched
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 10.0, 11.0, 13.0]])
    >>> softmax_batched(x).round(4)
    array([[0.0321, 0.0871, 0.2369, 0.6439],
           [0.0152, 0.0414, 0.1125, 0.831 ]])

    The same without ``keepdims``, on a batch that is square by chance. Nothing complains:

    >>> x = np.array([[0.0, 0.0], [0.0, 2.0]])
    >>> e = np.exp(x - np.max(x, axis=1))
    >>> wrong = e / np.sum(e, axis=1)
    >>> wrong.sum(axis=1).round(4)
    array([0.9485, 1.3808])
    >>> softmax_batched(x).sum(axis=1)
    array([1., 1.])

    A single sample:

    >>> softmax_batched(np.array([1.0, 2.0, 3.0, 4.0])).round(4)
    array([0.0321, 0.0871, 0.2369, 0.6439])
    """
    xp = namespace(x)
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    y: ArrayT = e / xp.sum(e, axis=-1, keepdims=True)
    return y


# ------------------------------------------------------------------ step 4: the same, transposed


def softmax_transposed(x: ArrayT) -> ArrayT:
    """Compute the softmax of each row of a batch, by way of its transpose, or of a single sample.

    Many lessons write the batch this way. Turned around, a sample is a *column*, and the N maxima
    along ``axis=0`` have the shape (N,) that broadcasting expects on the right. Nothing has to be
    kept, and one transposition at the end turns the answer back::

        x.T    (C, N)
        max       (N,)      N meets N, and the missing axis stretches over the C classes

    It is the same arithmetic on the same numbers as in `softmax_batched`, and costs no more: a
    transpose moves nothing, it is another way to look at the same memory. What it lacks is reach.
    ``keepdims`` works for any axis of any array, the transpose for the two axes of a matrix. A
    single sample has nothing to turn around: it takes step 2.

    Parameters
    ----------
    x : array, shape (N, C) or (C,), floating
        The scores, one sample per row.

    Returns
    -------
    array, the shape of `x`
        The probabilities; each row sums to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import softmax_batched, softmax_transposed
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 10.0, 11.0, 13.0]])
    >>> softmax_transposed(x).round(4)
    array([[0.0321, 0.0871, 0.2369, 0.6439],
           [0.0152, 0.0414, 0.1125, 0.831 ]])
    >>> np.allclose(softmax_transposed(x), softmax_batched(x), rtol=1e-14)
    True

    The maxima that each of the two subtracts:

    >>> np.max(x.T, axis=0)
    array([ 4., 13.])
    >>> np.max(x, axis=1, keepdims=True)
    array([[ 4.],
           [13.]])
    """
    if x.ndim == 1:
        return softmax_shifted(x)
    xp = namespace(x)
    columns = xp.matrix_transpose(x)  # the standard's spelling of x.T
    e = xp.exp(columns - xp.max(columns, axis=0))
    y: ArrayT = xp.matrix_transpose(e / xp.sum(e, axis=0))
    return y


# ------------------------------------------------------------------ step 5: the derivative


def softmax_jacobian(y: ArrayT) -> ArrayT:
    """Compute the Jacobian of softmax, dy_i / dx_j, from the output y of one sample.

    Every score is in the sum S, so every x_j moves every y_i, and the derivative is a C by C
    matrix. For y_i = e_i / S the quotient rule says::

        dy_i     (de_i/dx_j) S - e_i (dS/dx_j)
        ----  =  -----------------------------
        dx_j                  S^2

    One of the two derivatives is always the same: dS/dx_j = e_j, since S contains x_j in its term
    exp(x_j) and nowhere else. The other, de_i/dx_j, is e_i if i = j, and 0 if not, since exp(x_i)
    does not contain x_j then. That makes two cases::

        i = j:     (e_i S - e_i e_i) / S^2  =  (e_i / S) (1 - e_i / S)  =  y_i (1 - y_i)
        i != j:    (  0   - e_i e_j) / S^2  = -(e_i / S) (e_j / S)      = -y_i y_j

    Both lose x altogether: the output is all that the derivative needs. With 1 on the diagonal
    where i = j and 0 elsewhere they are one formula, and the formula is one of matrices::

        dy_i/dx_j  =  y_i (1[i = j] - y_j)             J  =  diag(y) - y y^T

    Two things can be read off. J equals its transpose. And each row sums to
    y_i (1 - sum_j y_j) = 0: raising all the scores together changes nothing, which is the freedom
    that `softmax_shifted` made use of.

    Parameters
    ----------
    y : array, shape (C,), floating
        The softmax of one sample: the output, not the scores.

    Returns
    -------
    array, shape (C, C)
        The derivative of y_i by x_j in row i and column j.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import softmax_jacobian
    >>> softmax_jacobian(np.array([0.5, 0.25, 0.25]))
    array([[ 0.25  , -0.125 , -0.125 ],
           [-0.125 ,  0.1875, -0.0625],
           [-0.125 , -0.0625,  0.1875]])

    Raising the second score a little, by h, moves y along the second column:

    >>> from portable_softmax.textbook import softmax_shifted
    >>> x, h = np.log([0.5, 0.25, 0.25]), 1e-5
    >>> up, down = x + [0.0, h, 0.0], x - [0.0, h, 0.0]
    >>> ((softmax_shifted(up) - softmax_shifted(down)) / (2 * h)).round(4)
    array([-0.125 ,  0.1875, -0.0625])
    """
    column, row = y[:, None], y[None, :]
    jacobian: ArrayT = column * _identity(y) - column * row
    return jacobian


def _identity(row: Any) -> Any:
    """Return the C by C identity matrix in the dtype, and on the device, of a row of C entries.

    ``triu`` keeps what lies on or above the diagonal, ``tril`` what lies on or below it.
    """
    xp = namespace(row)
    ones = xp.ones_like(row)
    return xp.tril(xp.triu(ones[:, None] * ones[None, :]))


# ------------------------------------------------------------------ step 6: the layer


@final
class Softmax:
    """Softmax as a layer: ``forward`` keeps its output, ``backward`` needs nothing else.

    The layers after this one say how the loss changes with the output y: that is ``dout``, or dy,
    which holds dL/dy_i. This layer has to answer how the loss changes with its input a: da, which
    holds dL/da_j. Each a_j reaches the loss through every y_i, and the chain rule adds up all these
    ways. With J, the Jacobian of step 5::

        da_j  =  sum_i dy_i J_ij
              =  sum_i dy_i y_i (1[i = j] - y_j)
              =  y_j dy_j  -  y_j sum_i y_i dy_i

    In the first term only i = j is left, and in the second y_j does not depend on i and stands
    before the sum. For the whole row::

        da  =  y * dy  -  y * sum(y * dy)

    That is J^T dy without J: a sum and a few products of C numbers each, where the matrix would
    hold C^2. And it works row by row, so a batch needs only ``keepdims`` again.

    Attributes
    ----------
    params, grads : list
        Empty: there is nothing in this layer to learn. Optimizers expect every layer to have both.
    out : array or None
        The output of the last `forward`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import Softmax, softmax_jacobian
    >>> layer = Softmax()
    >>> y = layer.forward(np.log([[0.5, 0.25, 0.25]]))
    >>> dy = np.array([[1.0, 0.0, 0.0]])
    >>> layer.backward(dy).round(4)
    array([[ 0.25 , -0.125, -0.125]])
    >>> (dy @ softmax_jacobian(y[0])).round(4)
    array([[ 0.25 , -0.125, -0.125]])
    """

    def __init__(self) -> None:
        self.params: list[Any] = []
        self.grads: list[Any] = []
        self.out: Any = None

    def forward(self, a: ArrayT) -> ArrayT:
        """Return the softmax of each row of `a`, or of `a` itself if it is a single sample.

        Parameters
        ----------
        a : array, shape (N, C) or (C,), floating
            The scores.

        Returns
        -------
        array, the shape of `a`
            The probabilities, kept in `out`.
        """
        y = softmax_batched(a)
        self.out = y
        return y

    def backward(self, dout: ArrayT) -> ArrayT:
        """Return the gradient of the loss with respect to the input of `forward`.

        Parameters
        ----------
        dout : array, the shape of `out`
            The gradient of the loss with respect to the output.

        Returns
        -------
        array, the shape of `out`
            ``y * dout - y * sum(y * dout)``.

        Raises
        ------
        RuntimeError
            If `forward` has not run.
        """
        if self.out is None:
            raise RuntimeError("Softmax.backward needs what forward keeps: call forward(a) first")
        xp = namespace(self.out, dout)
        y, dy = self.out, dout
        da: ArrayT = y * dy - y * xp.sum(y * dy, axis=-1, keepdims=True)
        return da


# ------------------------------------------------------------------ step 7: the loss


def cross_entropy_error(y: Array, t: Array, eps: float = 1e-7) -> Any:
    """Compute the cross-entropy between probabilities and labels: the mean over the batch.

    The loss of one sample is the surprise at finding the label t, if one believed y::

        L  =  -sum_i t_i log(y_i)  =  -log(y_k)        where k is the right class

    since a one-hot t is 0 but for t_k = 1. It is 0 for y_k = 1, log(2) for an even bet, and without
    bound as y_k goes to 0. A batch counts by the mean, so that the loss, and with it the learning
    rate, does not depend on how many samples there are.

    Index labels and one-hot rows are told apart by shape and dtype: integers with one axis less
    than y are indices; a t of the shape of y, integer or floating, is a distribution.

    **The 1e-7.** This program computes ``log(y + eps)``, since for y_i = 0 the log is -inf: as a
    loss, inf stops the training, and off the label 0 * -inf is nan even though the prediction is
    fine. The small number removes both, and brings four faults of its own:

    - A perfect prediction costs -log(1 + 1e-7) = -1e-7 (in float32 even -1.2e-7, since the next
      number after 1 is no closer). A cross-entropy below 0 does not exist.
    - The loss ends at -log(1e-7) = 16.118, however wrong the prediction is.
    - There the slope ends, too. The derivative by y_k is -1 / (y_k + eps), the softmax multiplies
      it by y_k, and so the right gradient gets a factor y_k / (y_k + eps). It goes to 0 just where
      the mistake is greatest: from its worst mistakes a model would learn nothing.
    - It cannot bring back what is already lost. For the scores [30, 0, 0], y_0 differs from 1 by
      1.9e-13, so in float32 it *is* 1 and its loss is gone. And eps drowns the losses below 1e-7
      that a float64 could still tell apart.

    All four have one root: the log is taken of a *probability*, after that has been rounded.
    `portable_softmax.cross_entropy` starts from the scores instead. With m = max(x), the largest
    term of the sum is exp(0) = 1, and r is the rest of it::

        S  =  exp(m) (1 + r)        r = sum of exp(x_j - m) over all j but the largest

        L  =  -log(exp(x_k) / S)  =  log(S) - x_k  =  (m - x_k) + log1p(r)

    where ``log1p(r)`` is log(1 + r) without rounding 1 + r first. Nothing is divided and no log
    meets a 0, so no eps is needed. Both terms are 0 or more, so the loss is. The first may grow as
    large as the mistake is. And a tiny r keeps all its digits.

    Parameters
    ----------
    y : array, shape (N, C) or (C,), floating
        The probabilities: the *output* of softmax, not the scores.
    t : array, shape (N,) or (N, C); for a single sample () or (C,)
        The labels: integer classes, from 0 to C - 1, or one-hot rows. A class outside of that range
        is not looked for here; libraries differ in what they make of it.
    eps : float
        What is added to the probabilities before the log.

    Returns
    -------
    array, shape ()
        The mean of the losses, in the dtype of `y`.

    Raises
    ------
    TypeError
        If `t` has the shape of index labels but does not hold integers.
    ValueError
        If `t` has neither of the two shapes.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import cross_entropy_error
    >>> y = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> round(float(cross_entropy_error(y, np.array([0, 1]))), 4)  # (log(2) - log(0.8)) / 2
    0.4581
    >>> round(float(cross_entropy_error(y, np.array([[1, 0, 0], [0, 1, 0]]))), 4)
    0.4581

    What the 1e-7 is for, and what it does to the best and to the worst of predictions:

    >>> y, right, wrong = np.array([1.0, 0.0]), np.array(0), np.array(1)
    >>> with np.errstate(divide="ignore", invalid="ignore"):
    ...     float(cross_entropy_error(y, right, eps=0.0))
    nan
    >>> f"{cross_entropy_error(y, right):.3g}"
    '-1e-07'
    >>> f"{cross_entropy_error(y, wrong):.3f}"
    '16.118'

    From the scores, the same two predictions and the confident one of the fourth fault:

    >>> from portable_softmax import cross_entropy
    >>> x = np.array([1000.0, 0.0])
    >>> float(cross_entropy(x, right)), float(cross_entropy(x, wrong))
    (0.0, 1000.0)
    >>> f"{cross_entropy(np.array([30.0, 0.0, 0.0]), right):.3g}"
    '1.87e-13'
    """
    xp = namespace(y, t)
    losses = -xp.sum(_one_hot(t, y) * xp.log(y + eps), axis=-1)
    return xp.mean(losses)


def _one_hot(t: Any, y: Any) -> Any:
    """Return labels of either kind as one-hot rows with the shape and dtype of `y`.

    The one-hot row of class k is row k of the identity matrix. That is short, not frugal: the
    matrix has C^2 entries.
    """
    xp = namespace(t, y)
    if t.shape == y.shape:
        return xp.asarray(t, dtype=y.dtype)
    if t.shape != y.shape[:-1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)}; for y of shape {tuple(y.shape)} it must be "
            f"{tuple(y.shape[:-1])} (classes) or {tuple(y.shape)} (one-hot rows)"
        )
    if not xp.isdtype(t.dtype, "integral"):
        raise TypeError(
            f"t holds {t.dtype} in the shape of classes, {tuple(t.shape)}; classes are integers: "
            "convert t to an integer dtype, or pass one-hot rows"
        )
    one_sample = y if y.ndim == 1 else y[0, :]
    index = xp.asarray(0).dtype  # the library's usual integer: not every `take` knows others
    classes = xp.reshape(xp.asarray(t, dtype=index), (-1,))
    return xp.reshape(xp.take(_identity(one_sample), classes, axis=0), y.shape)


# ------------------------------------------------------------------ step 8: softmax with loss


@final
class SoftmaxWithLoss:
    """Softmax and cross-entropy as one layer, whose gradient is ``y - t``.

    Go back from the loss to the scores by the chain rule, first through the log, then through the
    softmax, whose Jacobian is known from step 5::

        L = -sum_i t_i log(y_i)     so     dL/dy_i  =  -t_i / y_i

        dL/dx_j  =  sum_i (-t_i / y_i) (dy_i/dx_j)
                 =  sum_i (-t_i / y_i) y_i (1[i = j] - y_j)     the y_i cancels
                 =  sum_i -t_i (1[i = j] - y_j)
                 =  -t_j + y_j sum_i t_i                        the t_i sum to 1
                 =  y_j - t_j

    What is believed minus what is true: positive where the score should fall, negative where it
    should rise. The loss is a mean over N samples, so each of them has a share of 1 / N, and the
    layers after this one scale the whole by ``dout``::

        dx  =  (y - t) * dout / N

    The same in two lines, without the Jacobian: log(y_k) = x_k - log(S), hence
    L = log(S) - x_k, and with dS/dx_j = e_j its derivative is e_j / S - 1[j = k] = y_j - t_j.

    Here is why the two are one layer. Apart, the loss would hand back -t / y, and `Softmax` would
    multiply it by y. On paper they cancel, but in the machine y_k may have become 0, and 0 * inf is
    nan, just where the sample has most to teach. The second example shows it.

    Note that y - t is the gradient of -log(y_k), without the eps that `forward` has from
    `cross_entropy_error`. The difference is the factor y_k / (y_k + eps), too small to see until
    y_k comes near 1e-7. There the gradient is right, and it is the loss that is not.

    Attributes
    ----------
    params, grads : list
        Empty: there is nothing in this layer to learn.
    y : array or None
        The probabilities of the last `forward`.
    t : array or None
        Its labels, as one-hot rows in the dtype of `y`, whichever kind was passed.
    loss : array or None
        Its loss, shape ().

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.textbook import Softmax, SoftmaxWithLoss
    >>> layer = SoftmaxWithLoss()
    >>> x, t = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]), np.array([0, 1])
    >>> round(float(layer.forward(x, t)), 4)
    0.4904
    >>> layer.backward()
    array([[-0.25  ,  0.125 ,  0.125 ],
           [ 0.0625, -0.125 ,  0.0625]])

    Whoever mistrusts the algebra moves one score a little, here the first, and looks at the loss:

    >>> h = np.array([[1e-5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> round(float(layer.forward(x + h, t) - layer.forward(x - h, t)) / 2e-5, 4)
    -0.25

    A hopeless sample, with the label on the class that the scores rule out. As one layer, the
    gradient is as clear as can be. As two layers, it is lost:

    >>> x, t = np.array([[1000.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> loss = layer.forward(x, t)
    >>> layer.backward()
    array([[ 1., -1.]])
    >>> softmax = Softmax()
    >>> y = softmax.forward(x)
    >>> with np.errstate(divide="ignore", invalid="ignore"):
    ...     softmax.backward(-t / y)
    array([[nan, nan]])
    """

    def __init__(self) -> None:
        self.params: list[Any] = []
        self.grads: list[Any] = []
        self.y: Any = None
        self.t: Any = None
        self.loss: Any = None

    def forward(self, x: Array, t: Array) -> Any:
        """Return the mean loss of the scores `x` for the labels `t`.

        Parameters
        ----------
        x : array, shape (N, C) or (C,), floating
            The scores, a row for each sample, or of a single sample.
        t : array, shape (N,) or (N, C); for a single sample () or (C,)
            The labels: integer classes or one-hot rows, as in `cross_entropy_error`.

        Returns
        -------
        array, shape ()
            The loss, also kept in `loss`.
        """
        y = softmax_batched(x)
        self.y, self.t = y, _one_hot(t, y)
        self.loss = cross_entropy_error(self.y, self.t)
        return self.loss

    def backward(self, dout: Any = 1) -> Any:
        """Return the gradient of the loss with respect to the scores.

        Parameters
        ----------
        dout : number or array of shape ()
            The gradient of whatever comes after the loss; 1 if the loss is the end.

        Returns
        -------
        array, the shape of the scores
            ``(y - t) * dout / N``, where a single sample has N = 1.

        Raises
        ------
        RuntimeError
            If `forward` has not run.
        """
        if self.y is None:
            raise RuntimeError(
                "SoftmaxWithLoss.backward needs what forward keeps: call forward(x, t) first"
            )
        samples = 1 if self.y.ndim == 1 else self.y.shape[0]
        return (self.y - self.t) * dout / samples
