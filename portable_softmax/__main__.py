"""The command line: ``python -m portable_softmax demo``, ``... backends`` and ``... warm``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from portable_softmax import __version__
from portable_softmax._cli import demo, listing, warm
from portable_softmax._cli.backends import TRAINABLE
from portable_softmax._cli.errors import CommandError
from portable_softmax._cli.report import choose

NAME = "portable_softmax"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for what the user can put right, or 130 after Ctrl-C."""
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        result = _run(args)
        if args.json:
            print(json.dumps(_finite(result), allow_nan=False))
        sys.stdout.flush()
    except CommandError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; without this the interpreter complains on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    report = choose(plain=args.plain, json=args.json)
    if args.command == "backends":
        return listing.run(report=report)
    if args.command == "warm":
        return warm.run(
            operations=args.operations,
            dtypes=args.dtypes,
            libraries=args.libraries,
            report=report,
        )
    return demo.run(
        backend=args.backend,
        device=args.device,
        seed=args.seed,
        epochs=args.epochs,
        out=args.out,
        report=report,
    )


def _finite(value: Any) -> Any:
    """Replace what JSON has no token for, nan and infinities, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def _parser() -> argparse.ArgumentParser:
    output = _Parser(add_help=False)
    output.add_argument("--plain", action="store_true", help="plain lines even on a terminal")
    output.add_argument("--json", action="store_true", help="one JSON object instead of text")

    parser = _Parser(
        prog=f"python -m {NAME}", description="Softmax and cross-entropy on any array library."
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="demo|backends|warm")
    commands.add_parser(
        "backends", parents=[output], help="which libraries, devices, dtypes and kernels are here"
    )
    first = commands.add_parser(
        "warm", parents=[output], help="compile the Numba kernels once, for all processes to load"
    )
    first.add_argument(
        "--operations", type=_names(warm.EVERY), default=warm.OPERATIONS, metavar="NAME,...",
        help=f"any of {', '.join(warm.EVERY)}; default: the first {len(warm.OPERATIONS)}",
    )  # fmt: skip
    first.add_argument(
        "--dtypes", type=_names(warm.DTYPES), default=("float32",), metavar="NAME,...",
        help=f"any of {', '.join(warm.DTYPES)}; default: float32",
    )  # fmt: skip
    first.add_argument(
        "--libraries", type=_names(warm.LIBRARIES), default=("numpy",), metavar="NAME,...",
        help="numpy (serves torch too; the default), jax (the kernels that XLA calls)",
    )  # fmt: skip
    learn = commands.add_parser(
        "demo", parents=[output], help="train a softmax classifier on handwritten digits"
    )
    learn.add_argument(
        "--backend", choices=TRAINABLE, default="numpy", help="array library, numpy by default"
    )
    learn.add_argument(
        "--device", metavar="NAME", help="such as cpu or cuda:0, the library's own by default"
    )
    learn.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="of all randomness, 0 by default"
    )
    learn.add_argument(
        "--epochs", type=_whole(1), default=80, metavar="N", help="passes, 80 by default"
    )
    learn.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="for the figure, here by default"
    )
    return parser


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        given = tuple(part.strip() for part in text.split(","))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected of {', '.join(known)}, not {name!r}")
        return given

    return names


def _whole(least: int) -> Any:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, not {text!r}")
        return number

    return whole


if __name__ == "__main__":
    sys.exit(main())
