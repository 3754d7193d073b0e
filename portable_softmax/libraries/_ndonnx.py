"""ndonnx: operations are written to an ONNX graph, which something else runs."""

from __future__ import annotations

from portable_softmax.libraries._library import Library


class Ndonnx(Library):
    """An array has a dtype and a shape, of which lengths may be open, and no values."""

    lazy = True  # of constants too: what an argument may hold decides
    only_device = "onnx"  # what runs the graph decides where
