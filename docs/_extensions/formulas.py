r"""Typeset the formulas of docstrings.

A docstring holds its formulas as plain text in a literal block, to be read in a terminal. Here each
of them stands beside its LaTeX. A formula of a public function that is not in the table is a
warning, and so an error of the build: a docstring cannot change without its typeset form.
"""

import inspect
import re
import textwrap

from latex import LATEX
from sphinx.util import logging

BLOCK = re.compile(r"::\n\n((?: {4,}.+\n|\n)+)")


def typeset(block):
    """Return a block's formulas in LaTeX, one display each, and those that are unknown."""
    found, unknown = [], []
    for line in textwrap.dedent(block).splitlines():
        for part in re.split(r" {5,}", line.strip()):
            formula = re.sub(r" +", " ", part)
            if formula in LATEX:
                found.append(LATEX[formula])
            elif formula:
                unknown.append(formula)
    return found, unknown


def process(app, what, name, obj, options, lines):
    """Replace the literal blocks of a function of the package, before numpydoc reads it."""
    if what != "function" or inspect.getmodule(obj).__name__ == "portable_softmax.textbook":
        return  # the lesson draws its formulas line by line
    text = "\n".join(lines) + "\n"
    for match in reversed(list(BLOCK.finditer(text))):
        found, unknown = typeset(match[1])
        for formula in unknown:
            logging.getLogger(__name__).warning("%s: no LaTeX for %r", name, formula)
        shown = "\n".join(f".. math::\n\n    {latex}\n" for latex in found)
        before = text[: match.start()].rstrip()
        text = f"{before}{'' if before.endswith('.') else ':'}\n\n{shown}\n{text[match.end() :]}"
    lines[:] = text.splitlines()


def setup(app):
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
