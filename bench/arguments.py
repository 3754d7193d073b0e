"""What the command line takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from bench import exact, memory, peers, places, scale, speed, thresholds, versus
from bench.errors import CommandError

_PEERS_HELP = "those of every library on that kind of device, or of the backend's own library only"


def _list_of(names: Iterable[str]) -> str:
    return f"comma list of {', '.join(names)}"


_TIMED = _list_of((*peers.OPERATIONS, *peers.TIMED))
_DTYPES = _list_of(exact.FORMATS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def parser(described: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser of every command, each described as its `--help` says it."""
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--quick", action="store_true", help="a short run, to see that it runs")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--backend", default="numpy", choices=places.CHOICES, help="the array library"
    )
    where.add_argument("--shapes", metavar="ROWSxCLASSES,...", help="comma list")

    clock = argparse.ArgumentParser(add_help=False)
    clock.add_argument(
        "--cpu-time", action="store_true", help="what all threads work, for a machine that is busy"
    )

    top = _Parser(prog="python -m bench", description="Measure this package beside its peers.")
    commands = top.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
    )
    one = commands.add_parser(
        "speed", parents=[output, where, clock], help="time, and GB/s beside a copy"
    )
    one.add_argument("--plot", type=Path, metavar="FOLDER", help="draw figures there")
    one.add_argument("--compare", type=Path, metavar="OLD", help="the --json of an earlier run")
    one.add_argument("--peers", default="all", choices=("all", "own"), help=_PEERS_HELP)
    one.add_argument("--ops", default="", help=_TIMED)
    one.add_argument("--dtypes", default="", help=_DTYPES)
    draw = commands.add_parser("plot", help="the figures of an earlier run of speed")
    draw.add_argument("file", type=Path, help="its --json")
    draw.add_argument("folder", type=Path, help="where to draw")
    draw.set_defaults(json=None)
    most = commands.add_parser("memory", parents=[output, where], help="peaks of memory")
    most.add_argument("--peers", default="own", choices=("own", "none"), help="beside ours")
    most.add_argument(
        "--ops", default=",".join(memory.OPERATIONS), help=_list_of(memory.OPERATIONS)
    )
    most.add_argument("--dtypes", default=memory.DTYPES, help=_DTYPES)
    two = commands.add_parser(
        "accuracy", parents=[output], help="errors in units in the last place"
    )
    two.add_argument("--backend", default="", help=f"ours on a {_list_of(places.CHOICES)}")
    two.add_argument("--dtypes", default="", help=_DTYPES)
    two.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    pair = commands.add_parser(
        "versus", parents=[output], help="this tree beside another checkout, in turns"
    )
    pair.add_argument("other", type=Path, help="a folder that holds portable_softmax/")
    pair.add_argument("--backend", default="numpy", help=_list_of(places.CHOICES))
    pair.add_argument("--shapes", default="", metavar="ROWSxCLASSES,...", help="comma list")
    pair.add_argument("--ops", default="", help=_TIMED)
    pair.add_argument("--dtypes", default=speed.DTYPES, help=_DTYPES)
    pair.add_argument("--path", action="append", help="such as 'ours, autograd'; may be repeated")
    pair.add_argument("--fresh", action="store_true", help="small arrays, a process per cell")
    pair.add_argument("--limit", type=float, default=versus.LIMIT, help="largest ratio that passes")
    sizes = commands.add_parser(
        "thresholds", parents=[output], help="both sides of the kernels' sizes"
    )
    sizes.add_argument("--dtypes", default=thresholds.DTYPES, help=_DTYPES)
    commands.add_parser(
        "calls", parents=[output], help="calls that people make, beside what they use instead"
    )
    own = commands.add_parser(
        "arrays", parents=[output], help="beside scipy.special on each library's own arrays"
    )
    own.add_argument("--shapes", default="", metavar="ROWSxCLASSES,...", help="comma list")
    own.add_argument("--plot", type=Path, metavar="FILE", help="draw a figure there")
    commands.add_parser(
        "fresh", parents=[output], help="small arrays in new processes, and the first call"
    )
    followed = commands.add_parser(
        "jax", parents=[output], help="JAX's jit, vmap and autodiff beside jax.nn and optax"
    )
    followed.add_argument("--shapes", default="", metavar="ROWSxCLASSES,...", help="comma list")
    followed.add_argument("--plot", type=Path, metavar="FILE", help="draw a figure there")
    commands.add_parser(
        "programs", parents=[output], help="JAX's calls inside programs, and with options"
    )
    commands.add_parser(
        "compile", parents=[output], help="how long XLA compiles, and the size of programs"
    )
    beyond = commands.add_parser(
        "scale", parents=[output, clock], help="layers without logits, chunks of Dask, ranks"
    )
    beyond.add_argument("--parts", default=",".join(scale.PARTS), help=_list_of(scale.PARTS))
    beyond.add_argument("--layer", default="", metavar="POSITIONSxHIDDEN", help="a linear layer")
    beyond.add_argument("--classes", default="", help="comma list, of the linear layers")
    beyond.add_argument("--plot", type=Path, metavar="FOLDER", help="draw figures there")
    commands.add_parser(
        "steps", parents=[output], help="training steps with ours and with torch's functions"
    )
    for name, command in commands.choices.items():
        command.description = described[name]
    return top
