"""The role of single backticks in docstrings: a link if they hold a public name, else code."""

import inspect
from importlib import import_module

from docutils import nodes
from sphinx.addnodes import pending_xref

import portable_softmax

PACKAGE = portable_softmax.__name__
COMPAT = f"{PACKAGE}.compat"  # whose modules are imported by name


def public_names():
    """Return the full names of every public object of the package and of its modules."""
    found = set()

    def walk(prefix, thing):
        for name in getattr(thing, "__all__", ()):
            full, member = f"{prefix}.{name}", getattr(thing, name)
            found.add(full)
            if inspect.ismodule(member):
                walk(full, member)
            elif inspect.isclass(member):
                found.update(f"{full}.{method}" for method in ("forward", "backward"))

    walk(PACKAGE, portable_softmax)
    walk(f"{PACKAGE}.testing", import_module(f"{PACKAGE}.testing"))
    for name in ("optax", "scipy_special", "torch_functional", "torch_nn"):
        walk(f"{COMPAT}.{name}", import_module(f"{COMPAT}.{name}"))
    return found


def role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Look the name up where it stands: in its class, its module, the package."""
    context = inliner.document.settings.env.ref_context
    module, class_ = context.get("py:module", PACKAGE), context.get("py:class")
    places = [f"{module}.{class_}."] if class_ else []
    places += [f"{module}.", f"{PACKAGE}.", f"{COMPAT}.", ""]
    code = nodes.literal(rawtext, text, classes=["xref", "py"])
    for place in places:
        if place + text in NAMES:
            link = pending_xref(
                "", code, refdomain="py", reftype="obj", reftarget=place + text, refexplicit=True,
                refwarn=True, refdoc=inliner.document.settings.env.docname,
            )  # fmt: skip
            return [link], []
    return [nodes.literal(rawtext, text)], []


NAMES = public_names()


def setup(app):
    app.add_role("name", role)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
