"""Speed, memory and accuracy of the package, measured beside its peers.

Run from a clone, with the extras `bench` and `peers` installed: ``python -m bench speed``,
``memory``, ``accuracy`` or ``scale``; ``plot`` draws an earlier run, ``versus`` compares two
checkouts.
"""
