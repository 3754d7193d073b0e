"""What the package claims about speed, memory and accuracy, measured beside its peers.

Run from a clone, the extras `bench` and `peers` installed: ``python -m bench speed``, ``python -m
bench memory``, ``python -m bench accuracy``; ``python -m bench plot`` draws an earlier run.
"""
