"""The parts of ``python -m portable_softmax``; nothing else in the package imports them."""
