"""The house rules: who may import whom, who may read the environment, and how large a room may grow."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "outrider"

LAYERS = """
errors
env capability core tensors
kernels parallel cache
device layers verify schedule
processing
models
load modelling
draft
drafting runner
options
oracle
config
workers acceptance
engine
server train bench
cli
__main__
"""
"""Each line imports only from lines above it."""

TORCH_FREE = (
    "core",
    "schedule",
    "cache/pool.py",
    "cache/prefix.py",
    "cache/manager.py",
    "capability.py",
    "errors.py",
    "options.py",
)
FORBIDDEN = {"draft": ("runner", "schedule"), "verify": ("runner", "schedule")}
OPTIONAL = {
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "tqdm",
    "opentelemetry",
    "triton",
}  # imported where they are needed, if they are
LATE = ("outrider.server.serve", "outrider.engine.process.sync")
"""The ways into the rooms that need an extra's libraries: imported where they are needed too."""
WITHOUT_TORCH_AT_THE_TOP = ("cli", "options")
"""Rooms that print help at once: what imports torch is imported inside their functions."""
MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_PARAMETERS = 400, 80, 12

RANK = {room: rank for rank, line in enumerate(LAYERS.split("\n")) for room in line.split()}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: write the whole name"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def rooms_imported(tree: ast.AST) -> set[str]:
    names = [name.split(".") for name, _ in imports(tree)]
    return {parts[1] for parts in names if parts[0] == "outrider" and len(parts) > 1 and parts[1] in RANK}


def violations(path: Path, tree: ast.AST) -> list[str]:
    """What a file imports that its place in the table forbids."""
    room = room_of(path)
    found = []
    for other in rooms_imported(tree) - {room}:
        if RANK[other] >= RANK[room]:
            found.append(f"{path.name} in {room} imports {other}, which is not above it")
        if other in FORBIDDEN.get(room, ()):
            found.append(f"{room} must not know {other}")
    return found


def test_the_page_has_the_same_table() -> None:
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", page.split("## Packages, in import order")[1].split("\n## ")[0], re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", cell)) for cell in cells] == [
        set(line.split()) for line in LAYERS.split("\n")[1:-1]
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_from_above(path: Path) -> None:
    assert room_of(path) in RANK, f"{room_of(path)} is not in the layer table"
    assert violations(path, ast.parse(path.read_text())) == []


def test_the_layer_check_can_fail() -> None:
    planted = ast.parse("from outrider.engine.llm import LLM\nimport outrider.runner.eager")
    assert len(violations(PACKAGE / "draft" / "planted.py", planted)) == 3


def test_files_of_a_room_do_not_import_in_circles() -> None:
    graph = {}
    for path in sources():
        module = ".".join(("outrider", *path.relative_to(PACKAGE).with_suffix("").parts))
        graph[module] = {name for name, _ in imports(ast.parse(path.read_text()))}
    edges = {module: {other for other in graph if any(n == other or n.startswith(other + ".") for n in names)}
             for module, names in graph.items()}  # fmt: skip
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in edges[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("place", TORCH_FREE)
def test_host_rooms_do_not_know_torch(place: str) -> None:
    path = PACKAGE / place
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        heavy = {name.split(".")[0] for name, _ in imports(ast.parse(file.read_text()))} & {"torch", "numpy", "numba"}
        assert not heavy, f"{file} imports {heavy}"


def test_only_env_reads_the_environment() -> None:
    readers = {path.name for path in sources() if re.search(r"\bos\.(environ|getenv)\b", path.read_text())}
    assert readers <= {"env.py"}


def test_runners_and_drafting_methods_are_named_only_in_their_own_rooms() -> None:
    from outrider.draft.registry import METHODS

    names = [name for name in METHODS if name != "none"]
    for path in sources():
        if room_of(path) in ("draft", "kernels", "train"):
            continue
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & set(names), f"{path} names a drafting method"


METHODS_OWN_WORDS = {"eagle", "parallel", "tap", "taps", "tapped"}
WITHOUT_THEM = ("draft/registry.py", "draft/base.py", "load", "core", "engine", "cli", "acceptance")
OF_THE_MESH = re.compile(r"(tensor|pipeline|data)[_-]parallel\w*")


def words_of_methods(tree: ast.AST) -> set[str]:
    """Words of one drafting method among a file's names and strings; what it imports is not looked at."""
    said = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        said += [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
    words = (re.split(r"[\W_]+", OF_THE_MESH.sub("", text).lower()) for text in said)
    return METHODS_OWN_WORDS & {word for each in words for word in each}


def test_shared_rooms_do_not_speak_of_one_method() -> None:
    for place in WITHOUT_THEM:
        path = PACKAGE / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            assert not words_of_methods(ast.parse(file.read_text())), f"{file} speaks of one drafting method"


def test_the_check_of_words_can_fail() -> None:
    planted = ["head.parallel = True", 'x = "an EAGLE head"', "def drafts_in_parallel(): ...", "f(parallel_drafting=1)"]
    assert all(words_of_methods(ast.parse(line)) for line in planted)
    assert not words_of_methods(ast.parse("from outrider.parallel.mesh import Mesh\nx = options.tensor_parallel_size"))


def test_imports_inside_functions_are_of_optional_libraries() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        if room_of(path) in WITHOUT_TORCH_AT_THE_TOP:
            continue
        top = {id(node) for node in tree.body}
        for name, node in imports(tree):
            if id(node) not in top and not _type_checking(tree, node):
                assert name.split(".")[0] in OPTIONAL or name.startswith(LATE), (
                    f"{path} imports {name} inside a function"
                )


def _type_checking(tree: ast.Module, node: ast.stmt) -> bool:
    blocks = [block for block in tree.body if isinstance(block, ast.If)]
    return any(node in block.body for block in blocks)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES, f"{path} is more than one room"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            allowed = 150 if room_of(path) == "kernels" else MOST_LINES_OF_FUNCTION
            assert lines <= allowed, f"{node.name} in {path} has {lines} lines"
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            on_gpu = {ast.unparse(each).split("(")[0] for each in node.decorator_list} & {"jit", "jit_counts"}
            assert parameters <= MOST_PARAMETERS or on_gpu, f"{node.name} in {path} takes {parameters} parameters"


def test_endpoints_do_not_import_each_other() -> None:
    endpoints = [PACKAGE / "server" / "openai" / f"{name}.py" for name in ("completions", "chat", "responses")]
    modules = {"outrider.server.openai." + path.stem for path in endpoints}
    for path in endpoints:
        names = {name for name, _ in imports(ast.parse(path.read_text()))}
        assert not [name for name in names if any(name == m or name.startswith(m + ".") for m in modules)], path


def test_no_unfinished_marks() -> None:
    for path in sources():
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text()), path


def test_every_module_and_public_name_is_documented() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        assert path.name == "__init__.py" or ast.get_docstring(tree), f"{path} says nothing about itself"
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            said_by_module = room_of(path) == "models" or node.name.endswith(("_reference", "_cpu", "_gpu"))
            assert ast.get_docstring(node) or said_by_module, f"{node.name} in {path} has no docstring"


def test_public_names_are_what_all_says() -> None:
    import outrider

    public = {name for name in dir(outrider) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(outrider, name)).__name__ == "module"}
    assert sorted(public - modules - {"annotations"}) == sorted(outrider.__all__)


def documented_tree() -> set[str]:
    """The names at the start of the lines of the tree of the package in the documentation."""
    page = ROOT / "docs" / "concepts" / "architecture.md"
    block = re.search(r"```\nsrc/outrider/\n(.*?)```", page.read_text(), re.DOTALL)
    assert block, f"{page} has no tree of src/outrider"
    return {line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line.strip()}


def test_documented_tree_is_the_real_one() -> None:
    real = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert documented_tree() == real
