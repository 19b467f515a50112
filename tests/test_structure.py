"""The structure of the package: import direction, no circles, documented public functions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sicot_jax"

# From the bottom up: a package may import those before it (docs/architecture.md has the picture).
LAYERS = [
    *("_version", "errors", "common", "config", "events", "catalog", "parallel", "models"),
    *("classifier", "weights", "training", "export", "recognizer", "report", "experiments"),
    *("index", "search", "indexing", "serve", "cli", "main"),
]

# Modules that need an optional library, or one that a bare accelerator image lacks: others import
# them where they are needed. The command line imports what a command needs when it runs.
LATE_IMPORTS = {
    "sicot_jax.catalog.importing.builder",  # tensorflow-datasets
    "sicot_jax.catalog.importing.photos",  # Pillow
    "sicot_jax.catalog.sources.arrays",
    "sicot_jax.catalog.sources.generated",  # Pillow, gensim
    "sicot_jax.catalog.sources.imported",  # tensorflow-datasets
    "sicot_jax.classifier.class_weights",  # jax, which recognising by ONNX Runtime does not need
    "sicot_jax.common.image",  # Pillow
    "sicot_jax.export.from_run",  # jax, which recognising by ONNX Runtime does not need
    "sicot_jax.export.to_onnx",  # torch
    "sicot_jax.index.backends.postgres",  # psycopg
    "sicot_jax.index.backends.postgres_publish",
    "sicot_jax.recognizer",  # numpy, Pillow: not for the version alone
    "sicot_jax.serve.app",  # imported by each worker process
    "sicot_jax.weights.batch_norm_folding",  # jax
    "sicot_jax.weights.templates.torch_model",  # torch
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """Yields (imported module of this package, whether inside a function)."""
    for_types = {
        inner
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sicot_jax"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                target = submodule if submodule in MODULES else str(node.module)
                if target != module:
                    yield target, node.col_offset > 0 and node not in for_types
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("sicot_jax"):
                    yield alias.name, node.col_offset > 0


def layer(module: str) -> int:
    """Returns the position of a module's package in LAYERS; the root module stands above all."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 else len(LAYERS)


def test_imports_point_down():
    upwards = [
        f"{module} -> {target}"
        for module in MODULES
        for target, _ in imports_of(module)
        if layer(target) > layer(module) and target != "sicot_jax"
    ]
    assert not upwards


def test_no_circle_of_files():
    graph = {module: {target for target, _ in imports_of(module)} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_imports_stand_at_the_top():
    late = [
        f"{module} -> {target}"
        for module in MODULES
        for target, inside in imports_of(module)
        if inside and target not in LATE_IMPORTS and ".cli." not in module
    ]
    assert not late


Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions() -> Iterator[tuple[str, Function, bool]]:
    """Yields (qualified name, function, whether it is a property) of the documented API."""
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, Function):
                yield f"{module}.{node.name}", node, False
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for method in node.body:
                    if isinstance(method, Function):
                        decorators = {ast.unparse(d) for d in method.decorator_list}
                        is_property = any("property" in d for d in decorators)
                        if "overload" in decorators:
                            continue
                        yield f"{module}.{node.name}.{method.name}", method, is_property


def faults(node: Function, is_property: bool) -> Iterator[str]:
    """Yields what the docstring of a public function lacks."""
    doc = ast.get_docstring(node) or ""
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    if arguments and arguments[0] in ("self", "cls"):
        arguments = arguments[1:]
    if not doc:
        yield "no docstring"
    elif not is_property and not re.match(r"[A-Z][a-z]+s\b", doc):
        yield f"starts with {doc.split()[0]!r}, wanted a verb in the third person"
    if arguments and "Args:" not in doc:
        yield f"no Args: of {arguments}"
    if (
        not is_property
        and returns_something(node)
        and not re.search(r"^(Returns|Yields):", doc, re.M)
    ):
        is_simple = not arguments and doc.startswith("Returns ") and "\n" not in doc
        if not is_simple:
            yield "no Returns: or Yields:"


def returns_something(node: Function) -> bool:
    """Returns whether a function is annotated to return a value."""
    return node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")


def test_public_functions_are_documented():
    undocumented = [
        f"{name}: {fault}"
        for name, node, is_property in public_functions()
        if not node.name.startswith("_")
        for fault in faults(node, is_property)
    ]
    assert not undocumented


def test_functions_are_short():
    long = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= 80
    ]
    assert not long


def test_allowed_skips_are_tests_that_exist():
    root = PACKAGE.parent
    entries = (root / "tests" / "allowed_skips.txt").read_text().splitlines()
    missing = []
    for test_id in filter(None, (entry.split("#")[0].strip() for entry in entries)):
        file, *_, name = test_id.partition("[")[0].split("::")
        tree = ast.parse((root / file).read_text() if (root / file).is_file() else "")
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, Function)}:
            missing.append(test_id)
    assert not missing


def test_glossary_names_modules_that_exist():
    glossary = (PACKAGE.parent / "docs" / "glossary.md").read_text()
    named = {
        f"sicot_jax.{name}"
        for row in glossary.splitlines()
        if row.startswith("| ")
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", row.split("|")[-2])
    }
    assert len(named) > 50
    assert not sorted(named - set(MODULES))
