"""README.md and docs/ say what the code is. The session `docs` runs the examples in README.md."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import capabilities
import pytest
import semantics_table
from backends import BACKENDS, LIBRARIES, ml_dtypes

import portable_softmax as ps
from bench import speed, summary, transforms

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")


SPEED = (ROOT / "docs" / "results" / "speed.md").read_text(encoding="utf-8")
DIFFERENCES = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# --------------------------------------------------------------------------- commands


def test_a_command_has_a_line_of_its_own():
    speed, accuracy = "docs/results/speed.md", "docs/results/accuracy.md"
    for command, page in (
        ("python3 noxfile.py", "README.md"),
        ("python3 noxfile.py -s tests", "README.md"),
        ("python3 noxfile.py -s export-onnx", "README.md"),
        ("python3 noxfile.py -s bench-numpy", speed),
        ("python -m bench accuracy --markdown docs/accuracy.md", accuracy),
        ("python -m bench memory", speed),
    ):
        assert f"\n    {command}\n" in (ROOT / page).read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert README.count("\n") <= 150


def test_every_option_of_the_benchmark_is_described():
    """And no other: what has a parser of its own is asked for its options."""
    source = (ROOT / "bench" / "arguments.py").read_text(encoding="utf-8")
    assert set(re.findall(r"`(--[\w-]+)", SPEED)) <= set(re.findall(r'"(--[\w-]+)"', source))
    in_speed = re.findall(r'    one\.add_argument\("(--[\w-]+)"', source)
    assert {*in_speed, "--quick", "--json", "--shapes"} <= set(re.findall(r"`(--[\w-]+)", SPEED))


def test_a_generated_table_names_its_generator():
    for name in ("capabilities", "semantics_table"):
        assert f"python tests/{name}.py" in README + SEMANTICS
        assert (ROOT / "tests" / f"{name}.py").exists()


def test_each_room_is_described():
    package = ROOT / "portable_softmax"
    files = {f"`{path.name}`" for path in package.glob("*.py")}
    folders = {f"`{path.name}/`" for path in package.glob("*/") if path.name != "__pycache__"}
    assert {name for name in files | folders if name not in CONTRIBUTING} == set()


def test_every_session_is_described():
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    plain = re.findall(r"@nox\.session.*\ndef (\w+)\(", source)
    families = re.findall(r'@for_each_backend\("(\w+)"', source)
    plain = [name.replace("_", "-") for name in plain]
    expected = {*plain, *(f"{name}-BACKEND" for name in families)} - {"tests"}
    table = CONTRIBUTING.partition("| session | what it does |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", table)) == expected


# --------------------------------------------------------------------------- generated tables


@pytest.mark.skipif(ml_dtypes is None, reason="bfloat16 on NumPy needs ml_dtypes")
@pytest.mark.parametrize("name", capabilities.TABLES)
def test_a_generated_table_is_that_of_the_code(name):
    assert capabilities.written(name) == capabilities.TABLES[name].make()


def test_the_table_of_speed_is_that_of_the_results():
    """Each row of README's table from the files in bench/results."""

    def rows(library, kind):
        kept = json.loads((ROOT / "bench" / "results" / f"{library}.json").read_text())["rows"]
        names = {field.name for field in dataclasses.fields(kind)}
        kept = [{k: v for k, v in row.items() if k in names} for row in kept]
        return [kind(**row | {"shape": tuple(row["shape"])}) for row in kept]

    def means(library, path, size="large"):
        lines = summary.lines(rows(library, speed.Row))
        found = {line.dtype: line for line in lines if (line.size, line.path) == (size, path)}
        return [
            f"{summary.geometric_mean(ratio.value for ratio in found[dtype].best):.2f}"
            for dtype in ("float32", "float64")
        ]

    def mean_of_jax(path):
        calls = [row for row in rows("jax", transforms.Row) if row.path == path]
        return f"{summary.geometric_mean(row.ratio for row in calls):.2f}"

    without = means("numpy", "ours, no Numba")
    small = [means(library, "ours", "small") for library in ("numpy", "torch")]
    expected = [
        means("numpy", "ours"),
        [
            "; ".join(both)
            for both in zip(*(means("torch", f"ours{p}") for p in ("", ", autograd")), strict=True)
        ],
        [mean_of_jax("numba rows"), ""],
        [f"{without[0]}; {mean_of_jax('jax rules')}", without[1]],
        ["; ".join(both) for both in zip(*small, strict=True)],
    ]
    table = README.partition("## Speed")[2].partition("![")[0]
    lines = [cells(line) for line in table.splitlines() if line.startswith("|")]
    assert [line[1:] for line in lines[2:]] == expected


def test_the_package_and_the_tests_agree_on_what_a_library_can_do():
    by_code = {line[0]: line for line in map(cells, capabilities.table().splitlines()[2:])}
    for name in capabilities.sessions():
        backend = BACKENDS[name]
        row = by_code[backend.library.replace("_", "-")]
        assert row[capabilities.HEADINGS.index("autodiff")] == capabilities.yes(
            backend.differentiates
        )
        assert row[capabilities.HEADINGS.index("lazy")] == capabilities.yes(backend.lazy)
        assert "untested" not in row


def test_the_table_of_semantics_has_a_row_for_each_test():
    lines = [cells(line) for line in SEMANTICS.splitlines() if line.startswith("|")]
    assert lines[0] == [*semantics_table.HEADINGS, *LIBRARIES]
    rows = [(case, answer, test.strip("`")) for case, answer, test, *_ in lines[2:]]
    assert rows == [row[:3] for row in semantics_table.cases()]
    assert "FAILED" not in SEMANTICS


def test_the_table_of_accuracy_holds():
    lines = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("Made by `python -m bench accuracy ")
    verdicts = {cells(line)[-1] for line in lines if line.startswith("|")}
    assert verdicts == {"ours within", "---", "yes"}


def _reported(test, backend, outcome="", version=None):
    """A test case as pytest's XML has it."""
    given = f'<property name="backend" value="{backend}"/>'
    given += f'<property name="version" value="{version}"/>' if version else ""
    module, _, name = test.rpartition(".")
    case = f'<testcase classname="tests.{module}" name="{name}[{backend}]">'
    return f"{case}<properties>{given}</properties>{outcome}</testcase>"


SKIPPED = '<skipped message="no int16"/>'
REPORT = "".join(
    (
        _reported("test_semantics.test_a", "torch", version="2.13.0"),
        _reported("test_semantics.test_a", "torch"),
        _reported("test_semantics.test_a", "torch-cuda", version="2.13.0+cu"),
        _reported("test_semantics.test_a", "torch-cuda", SKIPPED),
        _reported("test_semantics.test_b", "torch", "<failure/>"),
        _reported("test_semantics.test_b", "torch-cuda", "<error/>"),
        _reported("test_semantics.test_c", "none"),
        _reported("test_values.test_a", "torch", "<failure/>"),
    )
)


def test_reports_become_rows(tmp_path):
    report = f"<testsuites><testsuite>{REPORT}</testsuite></testsuites>"
    (tmp_path / "torch.xml").write_text(report)
    rows = [
        semantics_table.Case(f"case {name}", "answer", f"test_{name}", name != "c")
        for name in "abc"
    ]
    text = semantics_table.document(rows, semantics_table.read(tmp_path))
    heading, _, *lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    a, b, c = (dict(zip(heading, line, strict=True)) for line in lines)
    assert [a[k] for k in ("torch", "torch-cuda")] == ["passed", "1 passed, 1 skipped (1)"]
    assert a["jax"] == "not run"
    assert (b["torch"], b["torch-cuda"]) == ("FAILED", "FAILED")
    assert (c["numpy"], c["torch"]) == ("passed", "NumPy only")
    assert "\n1. no int16\n" in text
    assert text.endswith("This was torch 2.13.0, torch-cuda 2.13.0+cu.\n")


def test_without_reports_nothing_is_written(tmp_path, capsys):
    target = tmp_path / "semantics.md"
    assert semantics_table.main(str(tmp_path), str(target)) == 2
    assert "holds no report" in capsys.readouterr().err
    assert not target.exists()


# --------------------------------------------------------------------------- the site


def test_the_reference_has_every_public_name():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for name in ps.__all__:
        kind = "module" if inspect.ismodule(getattr(ps, name)) else "(function|class)"
        assert re.search(rf"^\.\. auto{kind}:: (portable_softmax\.)?{name}$", text, re.M), name
    for name in ps.textbook.__all__:
        assert re.search(rf"^\.\. auto\w+:: portable_softmax\.textbook\.{name}$", text, re.M), name
    for name in ps.kernels.__all__:
        assert re.search(rf"^\.\. auto(function|class):: {name}$", text, re.M), name


def test_there_are_twelve_pairs():
    pairs = (ROOT / "docs" / "before-after.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(pairs) == 12
    for number, pair in enumerate(pairs, 1):
        assert pair.startswith(f"{number}. ")
        assert pair.count("```{code-cell}") == 2
        before, after = pair.split("```{code-cell}")[1:]
        assert re.search(r"\bbefore\b", before)
        assert "assert " in after


def test_each_figure_is_described():
    """A cell that draws has an alt text, and so has each image."""
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for cell in re.findall(r"^```\{code-cell\}.*?^```$", text, re.M | re.S):
            assert ("plt.show()" in cell) == ("    alt: " in cell), cell
        for image in re.findall(r"^```\{image\}.*?^```$", text, re.M | re.S):
            assert ":alt: " in image
        assert "![](" not in text


# --------------------------------------------------------------------------- the release


def test_every_file_names_the_same_version():
    """It is that of the package; CHANGELOG.md opens with it."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    recipe = (ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [ps.__version__]
    assert re.findall(r'^  version: "(.+)"', recipe, re.M) == [ps.__version__]
    assert ps.__version__ in re.findall(r"^## (.+)$", changes, re.M)[0]


def test_the_conda_recipe_needs_what_the_package_needs():
    recipe = (ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = recipe.partition("  run:\n")[2].partition("\n\n")[0]
    found = {line.strip("- ").replace(" ", "") for line in needed.splitlines()}
    assert found == {"python>=${{python_min}}", *project["dependencies"]}
    assert f'python_min: "{project["requires-python"].removeprefix(">=")}"' in recipe


def test_the_page_that_installs_names_the_oldest_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    text = " ".join(page.lower().split())
    extras = project["optional-dependencies"]
    named = [extra for extra in extras if extra not in ("dev", "demo", "bench", "peers")]
    for needed in (*project["dependencies"], *(extras[extra][0] for extra in named)):
        name, version = re.match(r"([\w-]+?)(?:-cuda1\dx)?(?:\[\w+\])?>=([\d.]+)", needed).groups()
        assert re.search(rf"\b{name} {re.escape(version)}(?![.\d]*\d)", text), needed


def test_hosted_actions_are_pinned_by_hash():
    for workflow in ("ci", "release"):
        text = (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text(encoding="utf-8")
        for action in re.findall(r"uses: (?!\$/)(.+)$", text, re.M):  # those of others
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v[\d.]+", action), action


# --------------------------------------------------------------------------- links and peers


def test_every_link_leads_somewhere():
    """But for a cross-reference of the site, which is checked where the site is built."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
            if target.startswith("https://"):
                continue
            path = page.parent / target if target else page
            assert path.is_file(), f"{page} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
                assert anchor in map(slug, headings), f"{page} links to #{anchor}"


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


BESIDE = re.findall(
    r"^## Beside ([^\n]+)\n\n```python\n(.*?)^```\n\n```text\n(.*?)^```", DIFFERENCES, re.M | re.S
)


def test_three_peers_are_shown():
    assert len(BESIDE) == DIFFERENCES.count("## Beside ") == 3


@pytest.mark.slow("it imports the peers in other processes")
@pytest.mark.parametrize(("versions", "code", "printed"), BESIDE, ids=[b[0] for b in BESIDE])
def test_what_peers_were_seen_to_print(versions, code, printed):
    for peer in versions.split(", "):
        name, version = peer.split()
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
        if here.partition("+")[0] != version:
            pytest.skip(f"docs/differences.md speaks of {name} {version}, here is {here}")
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == printed
