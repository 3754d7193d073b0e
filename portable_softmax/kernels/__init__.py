"""Which fused kernels exist here, and which one a call takes.

A kernel is an optimisation of the portable mathematics and gives the same answers. One table maps
(library, device, operation) to it; its module is imported when it is first needed.

>>> import numpy as np
>>> from portable_softmax import kernels
>>> kernels.explain("softmax", np.zeros((32, 10), np.float32))
'numpy tiles: row tiles in cache...'
>>> with kernels.portable():
...     kernels.explain("softmax", np.zeros((32, 10), np.float32))
'portable: forced by kernels.portable()'
"""

from portable_softmax.kernels._table import available, explain, portable, without

__all__ = ["available", "explain", "portable", "without"]
