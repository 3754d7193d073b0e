"""The command line: ``python -m bench`` with what to measure, such as ``speed``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from bench import (
        accuracy,
        accuracy_family,
        arguments,
        arrays,
        calls,
        comparison,
        compilation,
        exact,
        fresh,
        gpu,
        memory,
        places,
        plots,
        programs,
        providers,
        ratio_plots,
        report,
        scale,
        scale_plots,
        speed,
        steps,
        summary,
        tables,
        thresholds,
        transforms,
        versus,
    )
    from bench.errors import CommandError, chosen
except ModuleNotFoundError as error:  # such as mpmath
    print(f'bench: {error.name} is not installed: pip install ".[bench]"', file=sys.stderr)
    raise SystemExit(2) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 if a bound or limit is broken, 2 for a wrong command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        described = {name: command.__doc__ or "" for name, command in COMMANDS.items()}
        args = arguments.parser(described).parse_args(argv)
        report.check_writable(args.json)
        return COMMANDS[args.command](args, argv)
    except CommandError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run_speed(args: argparse.Namespace, argv: list[str]) -> int:
    """Time ours and the peers; return 1 if ours is wrong, or slower than in an earlier run."""
    load = report.load()
    report.check_folder(args.plot)
    shapes = speed.parse_shapes(args.shapes or (speed.QUICK_SHAPES if args.quick else speed.SHAPES))
    dtypes = _dtypes(args.dtypes or (speed.QUICK_DTYPES if args.quick else speed.DTYPES))
    operations = speed.parse_operations(args.ops) if args.ops else []
    place = places.open_backend(args.backend)
    operations = operations or speed.default_operations(place)
    old = comparison.read(args.compare) if args.compare else None
    if old:
        comparison.check(args.compare, old, place, operations, shapes, dtypes)
    all_providers, missing = providers.all_providers(place, args.peers, slow_starts=not args.quick)
    before = gpu.state(place)
    effort = speed.QUICK if args.quick else speed.THOROUGH
    rows = _followed(
        speed.measure(all_providers, operations, shapes, dtypes, effort, cpu_time=args.cpu_time),
        tables.cells,
    )
    document = _document(
        "speed", argv, load, rows, backend=place.name, device=place.device_name, peers=args.peers,
        gpu={"before": before, "after": gpu.state(place)},
    )  # fmt: skip
    _shown(f"speed on {place}", tables, rows)
    report.table("ours in short", *summary.table(rows))
    report.line(summary.LEGEND)
    slower = _compared(old, document, rows) if old else False
    if args.plot:
        _plotted(document, rows, args.plot)
    _close(document, missing, args.json)
    wrong = any(row.role == speed.OURS and row.problem for row in rows)
    return 1 if wrong or slower else 0


def run_plot(args: argparse.Namespace, argv: list[str]) -> int:
    """Draw an earlier run."""
    document = comparison.read(args.file)
    report.check_folder(args.folder)
    _plotted(document, document["rows"], args.folder)
    return 0


def _plotted(document: dict[str, Any], rows: list[speed.Row], folder: Path) -> None:
    for path in plots.save(rows, document, folder):
        report.line(f"drew {path}")


def _compared(old: dict[str, Any], new: dict[str, Any], rows: list[speed.Row]) -> bool:
    """Show our times beside an earlier run; return whether a cell is too slow."""
    found = comparison.changes(old["rows"], rows)
    report.table(f"since {old.get('date')}", comparison.HEADINGS, comparison.cells(found))
    report.line(comparison.LEGEND)
    for difference in comparison.differences(old, new):
        report.line(f"differs: {difference}")
    report.line(comparison.verdict(found))
    return any(change.normalised > comparison.FAILING for change in found)


def run_memory(args: argparse.Namespace, argv: list[str]) -> int:
    """Compare peak memory with the ceilings; return 1 if a kernel of ours exceeds one."""
    load = report.load()
    if why := memory.why_not():
        raise CommandError(why)
    operations = chosen("operation", args.ops, memory.OPERATIONS)
    shapes = speed.parse_shapes(
        args.shapes or (memory.QUICK_SHAPES if args.quick else memory.SHAPES)
    )
    dtypes = _dtypes(args.dtypes)
    memory.check(shapes, dtypes)
    place = places.open_backend(args.backend)
    all_providers, missing = providers.all_providers(place, "own", slow_starts=not args.quick)
    some = [provider for provider in all_providers if provider.ours or args.peers == "own"]
    cells = _followed(memory.measure(args.backend, some, operations, shapes, dtypes), memory.cells)
    document = {
        "benchmark": "memory",
        **report.provenance(argv, load),
        "backend": place.name,
        "device": place.device_name,
        "cells": [asdict(cell) | {"held": cell.held} for cell in cells],
    }
    _shown(f"memory on {place}", memory, cells)
    _close(document, missing, args.json, timed=False)
    broken = sum(cell.ours and not cell.held for cell in cells)
    report.line(f"{broken} ceilings broken" if broken else "every ceiling held")
    return 1 if broken else 0


def run_accuracy(args: argparse.Namespace, argv: list[str]) -> int:
    """Compare errors with the bounds; return 1 if ours breaks one."""
    load = report.load()
    report.check_writable(args.markdown)
    dtypes, left_out = _judged_dtypes(args.dtypes)
    backends = args.backend.split(",") if args.backend else accuracy.installed()
    columns, missing = accuracy.columns(list(dict.fromkeys(backends)))
    rest = accuracy_family.measure(columns, dtypes, quick=args.quick)
    cells = _followed(chain(accuracy.measure(columns, dtypes, quick=args.quick), rest))
    document = {
        "benchmark": "accuracy",
        **report.provenance(argv, load),
        "cells": [asdict(cell) for cell in cells],
    }
    for title, headings, rows in accuracy.tables(cells):
        report.table(title, headings, rows)
    legend = f"{accuracy.LEGEND} {accuracy_family.LEGEND}"
    report.line(legend)
    _close(document, missing + left_out, args.json, timed=False)
    if args.markdown:
        report.write_markdown(args.markdown, document, legend, accuracy.tables(cells))
    broken = sum(cell.ours and not cell.held for cell in cells)
    report.line(f"{broken} bounds broken" if broken else "every bound held")
    return 1 if broken else 0


def run_versus(args: argparse.Namespace, argv: list[str]) -> int:
    """Time this tree and another in turns; return 1 if this one is over the limit or wrong."""
    load = report.load()
    other = args.other.resolve()
    if not (other / "portable_softmax" / "__init__.py").exists():
        raise CommandError(f"{args.other} is no checkout of portable_softmax")
    asked = {
        "shapes": speed.parse_shapes(args.shapes or versus.SHAPES[args.fresh]),
        "dtypes": _dtypes(args.dtypes),
        "operations": speed.parse_operations(args.ops) if args.ops else [],
        "paths": args.path or versus.PATHS[args.fresh],
    }
    if unknown := {*asked["paths"]} - {path.name for path in providers.PATHS}:
        raise CommandError(f"unknown path {min(unknown)!r}")
    versions, keys = [], []
    for backend in args.backend.split(","):
        version, offered = versus.paths(other, backend)
        versions.append(version)
        keys += versus.chosen(backend, offered, **asked)
    effort = speed.QUICK if args.quick else versus.EFFORT
    cells = _followed(
        versus.measure(other, keys, limit=args.limit, fresh=args.fresh, effort=effort),
        lambda some: versus.text(some, args.limit),
    )
    if not cells:
        raise CommandError("nothing to compare: no such path and operation in both trees")
    document = {
        "benchmark": "versus",
        **report.provenance(argv, load),
        "other": {"folder": str(other), "commit": report.commit(other)},
        "backends": versions,
        "cells": [asdict(cell) | {"ratio": cell.ratio} for cell in cells],
    }
    report.table(f"beside {other}", versus.HEADINGS, versus.text(cells, args.limit))
    for line in (versus.LEGEND, *versus.verdict(cells, args.limit)):
        report.line(line)
    _close(document, [], args.json)
    return 1 if any(cell.fails(args.limit) for cell in cells) else 0


def run_thresholds(args: argparse.Namespace, argv: list[str]) -> int:
    """Time both sides of each size at which the Numba rows change their method."""
    load = report.load()
    thresholds.check()
    rows = _followed(thresholds.measure(_dtypes(args.dtypes), quick=args.quick), thresholds.cells)
    _shown("sizes of the Numba rows", thresholds, rows)
    _close(_document("thresholds", argv, load, rows, "ratio"), [], args.json)
    return 0


def run_calls(args: argparse.Namespace, argv: list[str]) -> int:
    """Time calls beside what people use instead; return 1 if one is wrong or misses its goal."""
    load = report.load()
    rows = _followed(calls.measure(quick=args.quick), calls.cells)
    _shown("calls that people make", calls, rows)
    _close(_document("calls", argv, load, rows, "ratio"), [], args.json)
    # The few rounds of a quick run show that it runs.
    return 1 if any(row.problem or (row.missed and not args.quick) for row in rows) else 0


def run_arrays(args: argparse.Namespace, argv: list[str]) -> int:
    """Time ours beside scipy.special on each library's arrays; return 1 if one misses its goal."""
    load = report.load()
    arrays.prepare()
    if args.plot:
        report.check_folder(args.plot.parent)
    shapes = speed.parse_shapes(args.shapes or (speed.QUICK_SHAPES if args.quick else speed.SHAPES))
    effort = speed.QUICK if args.quick else speed.THOROUGH
    rows = _followed(arrays.measure(shapes, effort), arrays.cells)
    _shown("beside scipy.special", arrays, rows)
    document = _document("arrays", argv, load, rows, "ratio")
    if args.plot:
        ratio_plots.save_arrays(rows, document, args.plot)
        report.line(f"drew {args.plot}")
    _close(document, [], args.json)
    return 1 if any(row.problem or (row.missed and not args.quick) for row in rows) else 0


def run_fresh(args: argparse.Namespace, argv: list[str]) -> int:
    """Time small arrays in new processes, and first calls; return 1 if one misses its goal."""
    load = report.load()
    rows = _followed(fresh.measure(quick=args.quick), fresh.cells)
    _shown("in fresh processes", fresh, rows)
    _close(_document("fresh", argv, load, rows, "ratio"), [], args.json)
    return 1 if any(row.problem or (row.missed and not args.quick) for row in rows) else 0


def run_jax(args: argparse.Namespace, argv: list[str]) -> int:
    """Time JAX's transforms of ours beside those of the peers."""
    load = report.load()
    if args.plot:
        report.check_folder(args.plot.parent)
    default = transforms.QUICK_SHAPES if args.quick else transforms.SHAPES
    shapes, place = speed.parse_shapes(args.shapes or default), places.open_backend("jax")
    effort = speed.QUICK if args.quick else speed.THOROUGH
    rows = _followed(transforms.measure(place, shapes, effort), transforms.cells)
    _shown(f"transforms on {place}", transforms, rows)
    report.table("over the faster peer", transforms.SUMMARY, transforms.summary(rows))
    document = _document("jax", argv, load, rows, "ratio", device=place.device_name)
    if args.plot:
        ratio_plots.save_jax(rows, document, args.plot)
        report.line(f"drew {args.plot}")
    _close(document, [], args.json)
    return 1 if any(row.problem for row in rows) else 0


def run_programs(args: argparse.Namespace, argv: list[str]) -> int:
    """Time programs of JAX around calls, and calls with options; return 1 if one is wrong."""
    load, place = report.load(), places.open_backend("jax")
    rows = _followed(programs.measure(place, quick=args.quick), programs.cells)
    _shown(f"programs on {place}", programs, rows)
    document = _document("programs", argv, load, rows, "ratio", device=place.device_name)
    _close(document, [], args.json)
    return 1 if any(row.problem for row in rows) else 0


def run_compile(args: argparse.Namespace, argv: list[str]) -> int:
    """Compare how long XLA compiles, and how large the programs are, with the peers'."""
    load, place = report.load(), places.open_backend("jax")
    rows = _followed(compilation.measure(place, quick=args.quick), compilation.cells)
    _shown(f"compiling on {place}", compilation, rows)
    document = _document("compile", argv, load, rows, "ratios", device=place.device_name)
    _close(document, [], args.json)
    return 0


def run_scale(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure layers without logits, chunks and ranks; return 1 if ours breaks a bound."""
    load = report.load()
    report.check_folder(args.plot)
    parts = scale.parse_parts(args.parts)
    found = {}
    for name in parts:
        part = scale.PARTS[name]
        asked = name, args.layer, args.classes
        measured = scale.measure(*asked, quick=args.quick, cpu_time=args.cpu_time)
        rows = found[name] = _followed(measured, part.cells)
        _shown(name, part, rows)
    document = {
        "benchmark": "scale",
        **report.provenance(argv, load),
        "parts": {name: [asdict(row) for row in rows] for name, rows in found.items()},
    }
    for path in scale_plots.save(found, document, args.plot) if args.plot else []:
        report.line(f"drew {path}")
    _close(document, [], args.json)
    broken = sum(not row.held for rows in found.values() for row in rows)
    report.line(f"{broken} bounds broken" if broken else "every bound held")
    return 1 if broken else 0


def run_steps(args: argparse.Namespace, argv: list[str]) -> int:
    """Time training steps beside torch's; return 1 if one misses its goal."""
    load = report.load()
    steps.check()
    rows = _followed(steps.measure(quick=args.quick), steps.cells)
    _shown("a training step", steps, rows)
    _close(_document("steps", argv, load, rows, "ratio"), [], args.json)
    # The few steps of a quick run show that it runs.
    return 1 if not args.quick and any(row.ratio > row.goal for row in rows) else 0


def _followed(
    measured: Iterator[Any], cells: Callable[[list[Any]], list[list[str]]] | None = None
) -> list[Any]:
    """Collect the measurements, and write each to stderr: a run takes minutes, some an hour."""
    found = []
    for item in measured:
        found.append(item)
        line = cells([item])[0] if cells else [f"{len(found)} measured"]
        known = [cell for cell in map(str.strip, line) if cell not in ("", "nan")]
        print(*known, sep="  ", file=sys.stderr, flush=True)
    return found


def _shown(title: str, module: ModuleType, rows: list[Any]) -> None:
    """Show what a module measured, and what its columns mean."""
    report.table(title, module.HEADINGS, module.cells(rows))
    report.line(module.LEGEND)


def _document(
    name: str, argv: list[str], load: float | None, rows: list[Any], *derived: str, **more: Any
) -> dict[str, Any]:
    """Return what is kept of a run; `derived` are properties of a row, kept beside its fields."""
    kept = [asdict(row) | {field: getattr(row, field) for field in derived} for row in rows]
    return {"benchmark": name, **report.provenance(argv, load), **more, "rows": kept}


def _close(
    document: dict[str, Any], missing: list[str], path: Path | None, *, timed: bool = True
) -> None:
    if timed and (warning := report.busy(document)):
        report.line(warning)
    if missing:
        report.line(f"not here: {', '.join(missing)}")
    report.line(report.described(document))
    if path is not None:
        report.write_json(path, document)


def _judged_dtypes(text: str) -> tuple[list[str], list[str]]:
    """Return the dtypes asked for, or all that can be judged, and those left out."""
    asked = _dtypes(text) if text else list(exact.FORMATS)
    why = {dtype: accuracy.why_not(dtype) for dtype in asked}
    left_out = [f"{dtype} ({reason})" for dtype, reason in why.items() if reason]
    if text and left_out:
        raise CommandError(f"can't judge {', '.join(left_out)}")
    return [dtype for dtype in asked if not why[dtype]], left_out


def _dtypes(text: str) -> list[str]:
    return chosen("dtype", text, exact.FORMATS)


COMMANDS = {
    "speed": run_speed,
    "versus": run_versus,
    "memory": run_memory,
    "accuracy": run_accuracy,
    "plot": run_plot,
    "thresholds": run_thresholds,
    "calls": run_calls,
    "arrays": run_arrays,
    "fresh": run_fresh,
    "jax": run_jax,
    "programs": run_programs,
    "compile": run_compile,
    "scale": run_scale,
    "steps": run_steps,
}

if __name__ == "__main__":
    sys.exit(main())
