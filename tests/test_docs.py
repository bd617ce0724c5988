"""What the documents say of the tests."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_row_of_the_compatibility_table_names_tests_that_exist():
    lines = (TESTS.parent / "docs/compatibility.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| What |")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row.split("|")[3])
        assert named, row
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert not name or name in functions, f"{file}::{name}"
