"""Differential fuzzing: random calls, every path against an exact reference.

    python -m tests.fuzz --backend numpy --cases 100000 --seed 0
    python -m tests.fuzz --backend numpy --seed 0 --case 4711    one case again, with its reproducer

A case is a function of the package with arrays and options, drawn from a seed and a number alone
(`cases`). `paths` are the ways to compute it: by default, portable, each kernel, under autograd.
`reference` and `losses` answer it from the documented formulas in extended precision, with the
bound that the answer has to keep. `compare` judges values, dtypes and shapes.
"""
