"""optax's own tests of its softmax losses, run on `compat.optax`.

    python tests/conformance/optax_losses.py [options of pytest]

optax ships these tests in its wheel. They run where they lie, under jax.jit where they use it; only
the functions are replaced. Nothing of optax's is copied here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from optax.losses import _classification

from portable_softmax.compat import optax

# The test classes of these functions, by name; each name must be there.
CLASSES = {
    "SoftmaxCrossEntropyTest",
    "SafeSoftmaxCrossEntropyTest",
    "SoftmaxCrossEntropyWithIntegerLabelsTest",
}


class Conformance:
    """A plugin of pytest: puts ours in the place of optax's."""

    def pytest_sessionstart(self):
        """Replace the functions before the tests look them up."""
        for name in optax.__all__:
            setattr(_classification, name, getattr(optax, name))

    def pytest_collection_modifyitems(self, config, items):
        """Leave out the tests of other losses."""
        others = [item for item in items if item.cls.__name__ not in CLASSES]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.cls.__name__ in CLASSES]
        assert {item.cls.__name__ for item in items} == CLASSES
        for name in optax.__all__:
            assert getattr(items[0].module._classification, name) is getattr(optax, name)


def main(options: list[str]) -> int:
    """Run the module with pytest and return its exit status."""
    root = Path(__file__).resolve().parents[2]
    tests = Path(_classification.__file__).with_name("_classification_test.py")
    command = ["-c", str(root / "pyproject.toml"), "-W", "default", str(tests), *options]
    return pytest.main(command, plugins=[Conformance()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
