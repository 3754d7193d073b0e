"""Planted faults, each with the tests that should find it: proof that the suite would notice them.

A table of faults (``*.toml``, beside this file) says what is wrong, in which file, the text and the
faulty text, and which test files on which backends should fail. ``python -m tests.mutants`` plants
one after another in a copy of the repository, runs those tests, the fast ones first, and writes to
``found.md`` which test failed first. A fault that no test finds has survived: a test is missing.

    python -m tests.mutants --check                  # whether each fault still fits its file
    python -m tests.mutants                          # every fault; hours
    python -m tests.mutants --only "two-sum"         # those whose name or file holds these words
    python -m tests.mutants --none                   # no fault: what fails then, fails by itself
    python -m tests.mutants --column before --tests ../older/tests    # by the tests of a checkout

A fault is a change that a user could notice. One that no program can tell from the right code is
no fault, and has no place in the tables.
"""
