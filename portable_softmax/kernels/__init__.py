"""Which fused kernels exist here, and which one a call takes.

A kernel is an optimisation of the portable mathematics and gives the same answers. One table says
what each of them takes; a call goes to the first that takes all of it, and else to the portable
path.

>>> import numpy as np
>>> from portable_softmax import kernels
>>> kernels.explain("softmax", np.zeros((32, 10), np.float32))
'numpy tiles: row tiles in cache'
>>> with kernels.portable():
...     kernels.explain("softmax", np.zeros((32, 10), np.float32))
'portable: forced by kernels.portable()'
"""

from portable_softmax.kernels._decide import available, explain
from portable_softmax.kernels._request import Request
from portable_softmax.kernels._switches import portable, use, without
from portable_softmax.kernels._table import Kernel

__all__ = ["Kernel", "Request", "available", "explain", "portable", "use", "without"]
