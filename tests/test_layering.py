"""Who may import whom, and what every module of the package keeps to. Reads the source; runs none of it."""

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_easgd
from lightning_easgd.algorithms import Algorithm

PACKAGE = "lightning_easgd"
ROOT = Path(lightning_easgd.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric")

# What a file or folder may import besides the standard library, and names below these.
ALLOWED = {
    "interfaces.py": ("torch",),
    "algorithms": ("torch", f"{PACKAGE}.algorithms", f"{PACKAGE}.interfaces", f"{PACKAGE}.rules", f"{PACKAGE}.gates"),
    "rules.py": ("torch",),
    "gates.py": ("torch",),
    "averages.py": ("torch",),
    "flatten.py": ("torch",),
    "metrics.py": ("torch", "torchmetrics"),
    "simulation": ("torch", f"{PACKAGE}.algorithms", f"{PACKAGE}.rules", f"{PACKAGE}.gates", f"{PACKAGE}.simulation"),
    "communication": (
        "torch",
        "typing_extensions",
        f"{PACKAGE}.interfaces",
        f"{PACKAGE}.rules",
        f"{PACKAGE}.gates",
        f"{PACKAGE}.communication",
    ),
    "center.py": ("torch", f"{PACKAGE}.rules", f"{PACKAGE}.communication"),
    "sampling.py": ("torch", f"{PACKAGE}.communication"),
    "core": (
        "torch",
        "typing_extensions",
        f"{PACKAGE}.interfaces",
        f"{PACKAGE}.rules",
        f"{PACKAGE}.gates",
        f"{PACKAGE}.averages",
        f"{PACKAGE}.flatten",
        f"{PACKAGE}.algorithms",
        f"{PACKAGE}.communication",
        f"{PACKAGE}.core",
    ),
}

# What knows the top floor: that floor, the names that lead to it, and what binds it to Lightning.
ABOVE = f"{PACKAGE}.trainer"
KNOW_ABOVE = ("trainer", "strategy.py", "callbacks.py", "_lightning.py")

# The one part of torch that these do not know.
NO_DISTRIBUTED = (
    "interfaces.py",
    "algorithms",
    "averages.py",
    "rules.py",
    "gates.py",
    "flatten.py",
    "metrics.py",
    "simulation",
)

each_file = pytest.mark.parametrize("path", FILES, ids=IDS)


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes below ``node`` but those under ``if TYPE_CHECKING:``; its ``else`` counts."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield statement
                yield from runtime_nodes(statement)
        else:
            yield child
            yield from runtime_nodes(child)


def imports(source: str, path: Path) -> list[str]:
    """Returns the full names of what a file imports at runtime, functions' own imports and constant names included.

    ``from a.b import c`` is ``a.b.c`` where that is a module of this package, else ``a.b``.
    """
    found = []
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [
                f"{node.module}.{a.name}" if is_module(f"{node.module}.{a.name}") else node.module for a in node.names
            ]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append(str(node.args[0].value))
    return found


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith(f"{PACKAGE}.") and (path.with_suffix(".py").exists() or path.is_dir())


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def forbidden(source: str, path: Path) -> list[str]:
    """Returns what a file imports against the rules."""
    found = [name for name in imports(source, path) if name.partition(".")[0] not in sys.stdlib_module_names]
    relative = path.relative_to(ROOT)
    allowed = ALLOWED.get(relative.parts[0])
    bad = [name for name in found if allowed is not None and not below(name, allowed)]
    if relative.parts[0] in NO_DISTRIBUTED:
        bad += [name for name in found if below(name, ("torch.distributed",))]
    if relative.parts[0] not in KNOW_ABOVE:
        bad += [name for name in found if below(name, (ABOVE,)) and name not in bad]
    if relative.name != "_lightning.py":
        bad += [name for name in found if below(name, LIGHTNING)]
    return bad


@each_file
def test_imports_run_one_way(path):
    assert not forbidden(path.read_text(), path)


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("algorithms/easgd.py", "import torch.distributed as dist", ["torch.distributed"]),
        ("communication/all_reduce/__init__.py", "import torch.distributed as dist", []),
        (
            "algorithms/easgd.py",
            "from lightning_easgd.communication import AllReduce",
            ["lightning_easgd.communication"],
        ),
        ("algorithms/easgd.py", "import numpy as np", ["numpy"]),
        ("algorithms/easgd.py", "from lightning_easgd import rules", []),
        ("rules.py", "from lightning_easgd.algorithms import EASGD", ["lightning_easgd.algorithms"]),
        ("flatten.py", "def f():\n    import torchmetrics", ["torchmetrics"]),
        ("metrics.py", "from torchmetrics import Metric", []),
        (
            "communication/all_reduce/__init__.py",
            "from lightning_easgd.algorithms import EASGD",
            ["lightning_easgd.algorithms"],
        ),
        ("communication/all_reduce/__init__.py", "from lightning_easgd.interfaces import Snapshot", []),
        (
            "communication/all_reduce/__init__.py",
            "from lightning_easgd.flatten import ParameterVector",
            ["lightning_easgd.flatten"],
        ),
        ("strategy.py", "from lightning_easgd.flatten import ParameterVector\nimport torchmetrics", []),
        ("strategy.py", "try:\n    import lightning.pytorch\nexcept ImportError:\n    pass", ["lightning.pytorch"]),
        ("strategy.py", "from pytorch_lightning.strategies import DDPStrategy", ["pytorch_lightning.strategies"]),
        ("strategy.py", "import importlib\nimportlib.import_module('lightning.pytorch')", ["lightning.pytorch"]),
        ("strategy.py", "name = 'pytorch_lightning'", []),
        (
            "strategy.py",
            "if TYPE_CHECKING:\n    from pytorch_lightning import Trainer\nelse:\n    Trainer = object",
            [],
        ),
        ("strategy.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import pytorch_lightning", ["pytorch_lightning"]),
        ("_lightning.py", "import pytorch_lightning", []),
        ("core/elastic.py", "from lightning_easgd.trainer.run import Run", ["lightning_easgd.trainer.run"]),
        ("core/elastic.py", "from lightning_easgd.communication import AllReduce", []),
        (
            "core/elastic.py",
            "from lightning_utilities.core.rank_zero import rank_zero_warn",
            ["lightning_utilities.core.rank_zero"],
        ),
        (
            "metrics.py",
            "from lightning_easgd.trainer.monitor import ElasticMonitor",
            ["lightning_easgd.trainer.monitor"],
        ),
        (
            "trainer/loops.py",
            "from lightning_easgd.trainer.run import Run\nimport pytorch_lightning",
            ["pytorch_lightning"],
        ),
    ],
)
def test_the_rule_itself(file, line, expected):
    assert forbidden(line, ROOT / file) == expected


def test_no_import_goes_in_a_circle():
    """What a module imports at runtime, function by function, never leads back to it."""
    names = {module_name(path): path for path in FILES}
    edges = {
        name: {module_of(found, names) for found in imports(path.read_text(), path) if found.startswith(PACKAGE)}
        for name, path in names.items()
    }
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name in done:
            return
        for other in sorted(edges[name] - {PACKAGE, name}):
            walk(other, [*way, name])
        done.add(name)

    for name in names:
        if name != PACKAGE:  # imports its parts, of which some are found through it
            walk(name, [])


def module_of(name: str, names: dict[str, Path]) -> str:
    while name not in names:
        name = name.rpartition(".")[0]
    return name


@each_file
def test_files_and_classes_have_a_size_that_one_can_read(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 700
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 400, node.name


def test_the_strategy_has_few_attributes():
    tree = ast.parse((ROOT / "trainer" / "strategy.py").read_text())
    assigned = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for each in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for target in ast.walk(each)
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }
    assert 0 < len(assigned) <= 12


def test_every_rule_has_a_file():
    assert all((ROOT / name).exists() for name in ALLOWED)


def test_no_suite_imports_from_another():
    """What two suites need is in a module of its own."""
    tests = Path(__file__).parent
    for path in sorted(tests.rglob("*.py")):
        statements = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {getattr(node, "module", "") for node in statements} | {
            a.name for node in statements for a in node.names
        }
        found = [name for name in names if name.rpartition(".")[2].startswith("test_")]
        assert not found, f"{path.relative_to(tests)} imports {found}"


@each_file
def test_no_exception_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ExceptHandler):
            continue
        where = f"{path}:{node.lineno}"
        assert node.type is not None, f"{where}: a bare except"
        caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        silent = all(
            isinstance(s, ast.Pass | ast.Continue) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            for s in node.body
        )
        assert not (silent and caught & {"Exception", "BaseException"}), f"{where}: every exception is swallowed"


@each_file
def test_public_names_exist_and_are_documented(path):
    module = importlib.import_module(module_name(path))
    assert path.name == "__about__.py" or module.__doc__, "no docstring"
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name), f"__all__ names {name}, which does not exist"
        value = getattr(module, name)
        if getattr(value, "__module__", "").partition(".")[0] != PACKAGE:
            continue  # re-exported, or a plain value
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__, f"{name}: no docstring"


@each_file
def test_all_is_complete(path):
    """Whatever a public module defines at its top without an underscore is in its ``__all__``, constants aside."""
    tree = ast.parse(path.read_text())
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }
    module = importlib.import_module(module_name(path))
    assert defined <= set(getattr(module, "__all__", []))


def test_algorithms_are_abstract_or_final():
    def concrete(cls: type) -> Iterator[type]:
        for sub in cls.__subclasses__():
            if sub.__module__.partition(".")[0] == PACKAGE:
                if not inspect.isabstract(sub):
                    yield sub
                yield from concrete(sub)

    for path in FILES:
        importlib.import_module(module_name(path))
    algorithms = list(concrete(Algorithm))
    assert algorithms
    for algorithm in algorithms:
        subclasses = [s for s in algorithm.__subclasses__() if s.__module__.partition(".")[0] == PACKAGE]
        assert not subclasses, f"{algorithm.__name__} is subclassed by {subclasses}"
