"""SciPy's own tests of logsumexp, softmax and log_softmax, run on `compat.scipy_special`.

    python tests/conformance/scipy_special.py [options of pytest]

SciPy ships these tests in its wheel. They run where they lie, with SciPy's fixtures, on every array
library that SciPy tests on: under jax.jit on JAX, and with any early compute forbidden on Dask.
Only the three functions are replaced. Nothing of SciPy's is copied here.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

# SciPy reads this at import, and fails where a library named here is missing.
LIBRARIES = ["numpy", "array_api_strict", "torch", "jax.numpy", "dask.array"]
os.environ.setdefault("SCIPY_ARRAY_API", json.dumps(LIBRARIES))

import scipy.special  # noqa: E402 - after the variable
from scipy._lib._array_api import xp_capabilities_table  # noqa: E402

from portable_softmax.compat import scipy_special  # noqa: E402

OURS = [getattr(scipy_special, name) for name in scipy_special.__all__]

# --- The exceptions -----------------------------------------------------------------------------
# Each is expected to fail, strictly: one that passes is an error, so the table stays true.

EXCEPTIONS = {
    # An entry of -inf with an infinite imaginary part, whatever is beside it but inf + inf j,
    # whose exponential is nan everywhere.
    r"test_gh22601_infinite_elements\[jax\.numpy-(?!.*\(inf[+-]infj\)).*\(-inf[+-]infj\)": (
        "exp(-inf + inf j) is 0 (C99, G.6.3.1), which is what ours adds on every library; the "
        "test expects the nan of jax.numpy.exp"
    ),
}


class Conformance:
    """A plugin of pytest: puts ours in the place of SciPy's, and marks the exceptions."""

    def pytest_sessionstart(self):
        """Replace the functions before the tests import them."""
        for ours in OURS:
            theirs = getattr(scipy.special, ours.__name__)
            # SciPy looks up here what its tests may ask of a function: everything.
            xp_capabilities_table[ours] = xp_capabilities_table[theirs]
            setattr(scipy.special, ours.__name__, ours)

    def pytest_collection_modifyitems(self, config, items):
        """Leave out what tests nothing of ours, and expect the exceptions to fail."""
        # The functions outside the classes test private helpers of SciPy.
        helpers = [item for item in items if item.cls is None]
        config.hook.pytest_deselected(items=helpers)
        items[:] = [item for item in items if item.cls is not None]
        for item in items:
            for ours in OURS:
                assert getattr(item.module, ours.__name__) is ours
            # SciPy's marks say where SciPy's own functions fail; ours are to pass there.
            item.own_markers = [m for m in item.own_markers if m.name != "xfail_xp_backends"]
            for pattern, reason in EXCEPTIONS.items():
                if re.match(pattern, item.name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def main(options: list[str]) -> int:
    """Run the module with pytest and return its exit status."""
    root = Path(__file__).resolve().parents[2]
    return pytest.main(
        [
            # The warnings that this configuration makes errors would be ours, but for those of
            # the marks that SciPy has not registered yet, of an iterator that it parametrizes
            # with, and of a device that torch lists although it is deprecated.
            *("-c", str(root / "pyproject.toml"), "-o", "strict_markers=false"),
            *("-W", "ignore:Unknown pytest.mark"),
            *("-W", "ignore:Passing a non-Collection iterable to parametrize"),
            *("-W", "ignore:'mkldnn' is no longer used as device type"),
            # A path, for with --pyargs pytest would load our own conftest.py too.
            str(Path(scipy.special.__file__).with_name("tests") / "test_logsumexp.py"),
            *options,
        ],
        plugins=[Conformance()],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
