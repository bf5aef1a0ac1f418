"""The form of what is to be read: all code narrow and without named lambdas; the six scripts in two halves, strict in
what they load, and each leaning on few others."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = ("model", "prepare", "train_vae", "train_tts", "sample", "evaluate")
FILES = [path.relative_to(ROOT).as_posix() for folder in ("", "demo", "tests") for path in (ROOT / folder).glob("*.py")]
# (script, what it imports) beside model, which all lean on, and prepare, which all but model do.
LEANS = {("sample", "evaluate"), ("train_tts", "sample"), ("train_tts", "evaluate")}


def text(script: str) -> str:
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def imported(tree: ast.AST) -> set[str]:
    """Modules that are imported at any level."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def named_lambdas(tree: ast.AST) -> list[int]:
    """Lines in which a name is given to a lambda: x = lambda, x, y = lambda, ..., x: T = lambda, (x := lambda)."""
    lines = []
    for node in ast.walk(tree):
        value = getattr(node, "value", None) if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) else None
        values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value]
        if any(isinstance(v, ast.Lambda) for v in values):
            lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize("file", FILES)
def test_code_is_narrow(file):
    code = (ROOT / file).read_text(encoding="utf-8")
    wide = [number for number, line in enumerate(code.split("\n"), 1) if len(line) > 120]
    assert not wide, f"{file} has lines wider than 120 columns: {wide}"
    lambdas = named_lambdas(ast.parse(code))
    assert not lambdas, f"{file} names lambdas in lines {lambdas}: def has a place for a docstring"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_its_form(script):
    assert text(script).count("# You can stop here.") == 1
    assert "strict=False" not in text(script)
    tree = ast.parse(text(script))
    allowed = {"model", "prepare"} - {script} if script != "model" else set()
    allowed |= {other for one, other in LEANS if one == script}
    leans = imported(tree) & {*SCRIPTS}
    assert leans <= allowed, f"{script}.py imports {sorted(leans - allowed)}"


def test_the_readme_counts_their_lines():
    """All lines, and those above the rule that is drawn over "You can stop here"."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        lines = text(script).splitlines()
        (first,) = (number for number, line in enumerate(lines) if line.startswith("# ======"))
        (row,) = re.findall(rf"^\| \[{script}\.py\]\({script}\.py\) \| (\d+) \| (\d+) \|", readme, re.M)
        assert tuple(map(int, row)) == (len(lines), first), f"README.md's line counts of {script}.py"


def test_what_is_looked_for_is_found():
    """The walk sees what is nested, and lambdas that are arguments or values of a table are none of its business."""
    tree = ast.parse(
        "def f():\n    import sample.x\n    if 1:\n        g = lambda: 1\n"
        "    h = cache(lambda: 1)\n    t = {1: lambda: 1}\n    a, b = 1, lambda: 2\n"
    )
    assert imported(tree) == {"sample"} and named_lambdas(tree) == [4, 7]
