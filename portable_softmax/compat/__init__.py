"""Drop-in modules: change the import, keep the code.

Each has the functions of a peer with the peer's names, arguments, order and defaults, and answers
through the public functions of this package, on any array library.

=====================  ==================================================
module                 stands in for
=====================  ==================================================
``scipy_special``      ``scipy.special``
``torch_functional``   ``torch.nn.functional``, and ``torch.logsumexp``
``torch_nn``           ``torch.nn``: the one module that imports torch
``optax``              ``optax``
=====================  ==================================================

None is loaded with the package: import the one that you need.
"""
