"""What the package claims about speed and accuracy, measured beside its peers.

Run from a clone, the extra `bench` installed: ``python -m bench speed``, ``python -m bench
accuracy``.
"""
