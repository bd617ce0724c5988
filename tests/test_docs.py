"""What the documents say of the tests."""

import ast
import functools
import importlib.util
import json
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@functools.cache
def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_compatibility_table_names_tests_that_exist():
    lines = (TESTS.parent / "docs/compatibility.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| What |")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", row.split("|")[3])
        assert named, row
        for file, name in named:
            assert not name or name in functions_of(TESTS / file), f"{file}::{name}"


def test_every_case_of_the_compatibility_tests_has_its_row():
    """The other way round; that a test holds what its row says only a reader can see."""
    text = (ROOT / "docs/compatibility.md").read_text()
    tree = ast.parse((TESTS / "trainer/test_compatibility.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(names) > 30
    assert [name for name in names if f"test_compatibility.py::{name}`" not in text] == []


def test_the_table_of_versions_is_what_the_matrix_wrote():
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    noxfile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noxfile)
    results = json.loads((ROOT / "docs/versions.json").read_text())
    assert (ROOT / "docs/versions.md").read_text() == noxfile.rendered(results)
