"""``{generated}``: tables and figures made from the code, the tests and the kept benchmarks."""

import dataclasses
import json
import re
from pathlib import Path

import capabilities
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from bench import (
    arrays,
    calls,
    compilation,
    fresh,
    programs,
    scale,
    steps,
    summary,
    tables,
    transforms,
)
from bench.report import described
from bench.speed import OURS, PEER, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FIGURES = {
    "bandwidth": "Gigabytes per second against the length of a row, one panel per operation: "
    "this package, its peers and a plain copy, {dtype}, arrays of {library}.",
    "ratios": "Every provider's time in units of ours, one panel per operation and one row per "
    "array shape, {dtype}, arrays of {library}.",
}
SCALING = {
    "linear": "Two panels by number of classes, a line per provider: the time of a linear layer's "
    "loss and gradients in units of its bare products, and memory beyond inputs and gradients.",
    "ranks": "Seconds by number of ranks, a panel per function and cut: a rank's own work, "
    "measured, and its all-reduces and an all-gather of logits, of a model.",
}


def backends_of(operation):
    """Return the table of backends of one function."""
    return capabilities.operation_table(operation)


def kernels():
    """Return the table of what each kernel takes."""
    return capabilities.claims()


def backends():
    """Return the table of what each backend can do."""
    return capabilities.table()


def _document(library):
    return json.loads((RESULTS / f"{library}.json").read_text(encoding="utf-8"))


def _rows(library):
    """Return the rows that were timed."""
    rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in _document(library)["rows"]]
    return [row for row in rows if not row.problem]


def speed(library):
    """Return what a kept run says: where it was made, and its summary."""
    document, rows = _document(library), _rows(library)
    headings, texts = summary.table(rows)
    lines = [headings, ["---"] * len(headings), *texts]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"`{document['command']}`\n\n{described(document)}\n\n{table}\n\n{summary.LEGEND}"


def cells(name):
    """Return each cell of a kept run."""
    document, rows = _document(name), _rows(name)
    clock = {"process_time": "Seconds that all threads worked.", "perf_counter": ""}[rows[0].clock]
    lines = [tables.HEADINGS, ["---"] * len(tables.HEADINGS), *tables.cells(rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"`{document['command']}`\n\n{described(document)}\n\n{table}\n\n{clock}"


TIMED = {
    "arrays": arrays, "calls": calls, "compile": compilation, "fresh": fresh, "steps": steps,
    "jax": transforms, "programs": programs,
}  # fmt: skip


def timed(name, *, short=False):
    """Return the table of a kept run of the command of this name."""
    document, module = _document(name), TIMED[name]
    names = [field.name for field in dataclasses.fields(module.Row)]
    rows = [module.Row(**{name: _number(row[name]) for name in names}) for row in document["rows"]]
    headings, texts = (
        (module.SUMMARY, module.summary(rows)) if short else (module.HEADINGS, module.cells(rows))
    )
    lines = [headings, ["---"] * len(headings), *texts]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"`{document['command']}`\n\n{described(document)}\n\n{table}\n\n{module.LEGEND}"


def in_short(name):
    """Return the summary of such a run."""
    return timed(name, short=True)


def _number(value):
    """Return a list as a tuple, and what JSON has no number for as a float."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if value in ("nan", "inf", "-inf") else value


def scaling(part):
    """Return one part of `scale`, from the kept run that has it."""
    kept = (_document(path.stem) for path in RESULTS.glob("scale-*.json"))
    (document,) = [one for one in kept if part in one["parts"]]
    module = scale.PARTS[part]
    rows = [module.Row(**row) for row in document["parts"][part]]
    lines = [module.HEADINGS, ["---"] * len(module.HEADINGS), *module.cells(rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"`{document['command']}`\n\n{described(document)}\n\n{table}\n\n{module.LEGEND}"
    if part in SCALING:
        image = f"```{{image}} /../bench/results/scale/{part}.png\n:alt: {SCALING[part]}\n```"
        text += f"\n\n{image}"
    return text


def slower(library):
    """Return the cells of a kept run in which a peer is faster than every path of ours."""
    cells = {}
    for row in _rows(library):
        cells.setdefault((row.operation, row.shape, row.dtype), []).append(row)
    lines = ["| operation | shape | dtype | fastest peer | ours / peer |", "|---|---|---|---|---|"]
    for (operation, shape, dtype), found in cells.items():
        ours = min(row.min_s for row in found if row.role == OURS)
        peer = min((row for row in found if row.role == PEER), key=lambda row: row.min_s)
        if ours > peer.min_s:
            ratio = f"{ours / peer.min_s:.2f}"
            cell = (operation, tables.shape(shape), dtype, peer.provider, ratio)
            lines.append(f"| {' | '.join(cell)} |")
    few = f"In {len(lines) - 2} of {len(cells)} cells a peer is faster than ours"
    return few + (":\n\n" + "\n".join(lines) if lines[2:] else ".")


def figures(library):
    """Return the figures of a kept run."""
    return "\n\n".join(
        f"```{{image}} /../bench/results/{library}/{name}-{dtype}.png\n"
        f":alt: {alt.format(dtype=dtype, library=library)}\n```"
        for name, alt in FIGURES.items()
        for dtype in ("float32", "float64")
    )


_ALL = (
    backends_of, backends, kernels, speed, cells, timed, in_short, scaling, slower, figures,
)  # fmt: skip
MAKERS = {f.__name__: f for f in _ALL}


class Generated(SphinxDirective):
    """Insert what a maker returns for the rest of the line, as Markdown."""

    required_arguments = 1
    optional_arguments = 1

    def run(self):
        name, *rest = self.arguments
        text = MAKERS[name](*rest)
        return self.parse_content_to_nodes_of(text)

    def parse_content_to_nodes_of(self, text):
        self.content = StringList(text.splitlines(), source=f"generated {self.arguments}")
        return self.parse_content_to_nodes()


# Pages that are files of the repository, and where their links lead on the site.
FILES = {"contributing": "CONTRIBUTING.md", "changes": "CHANGELOG.md"}
LINKS = {
    "CHANGELOG.md": "changes.md",
    "README.md#backends": "reference/backends.md",
    "docs/accuracy.md": "results/accuracy.md",
    "docs/reported.md": "results/reported.md",
    "docs/semantics.md": "results/semantics.md",
    "docs/triton_resources.md": "results/triton.md",
}


# doctest wants a blank line after what is printed; a reader does not.
LAST_LINE = re.compile(r"^(```python\n>>> .*?\n)\n```$", re.M | re.S)


def read_file(app, docname, source):
    """Take the text of some pages from the repository, and the last blank line from examples."""
    if docname in FILES:
        text = (ROOT / FILES[docname]).read_text(encoding="utf-8")
        for there, here in LINKS.items():
            text = text.replace(f"]({there})", f"]({here})")
        source[0] = text
    source[0] = LAST_LINE.sub(r"\1```", source[0])


def setup(app):
    app.connect("source-read", read_file)
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
