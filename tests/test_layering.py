"""The import graph of engine/ and kernels/: the layers' table, and no cycle between modules."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = (ROOT / "engine", ROOT / "kernels")

ALLOWED: dict[str, set[str]] = {
    "omnigrpo_kernels": set(),
    "progress": set(),
    "metrics": set(),
    "runtime": set(),
    "emotion_wheel": set(),
    "judge": set(),
    "schema": {"omnigrpo_kernels"},
    "algorithm": {"omnigrpo_kernels", "schema"},
    "media": {"omnigrpo_kernels", "schema"},
    "model": {"omnigrpo_kernels", "schema"},
    "data": {"media", "schema"},
    "reward": {"schema"},
    "rollout": {"feature_source", "media", "model", "omnigrpo_kernels", "runtime", "schema"},
    "attribution": {"algorithm", "model", "omnigrpo_kernels", "report", "reward", "rollout", "schema"},
    "evaluate": {"reward", "rollout", "schema"},
    "feature_source": {"media", "model", "runtime", "schema"},
    "prefix_source": {"feature_source", "media", "metrics", "model", "runtime", "schema"},
    "step_records": {"metrics", "schema"},
    "carried_groups": {"schema"},
    "group_sampler": {
        "carried_groups", "data", "metrics", "model", "prefix_source", "reward", "rollout", "runtime", "schema",
    },
    "trainer": {
        "algorithm", "group_sampler", "metrics", "model", "omnigrpo_kernels", "rollout", "runtime", "schema",
    },
    "sft": {"algorithm", "data", "metrics", "model", "omnigrpo_kernels", "prefix_source", "runtime", "schema"},
    "loop": {"metrics", "runtime", "schema", "step_records"},
    "config": {
        "algorithm", "data", "evaluate", "feature_source", "loop", "model", "omnigrpo_kernels", "reward", "rollout",
        "runtime", "trainer",
    },
    "run": {
        "algorithm", "attribution", "config", "data", "evaluate", "group_sampler", "loop", "metrics", "model",
        "prefix_source", "progress", "reward", "rollout", "runtime", "schema", "sft", "trainer",
    },
    "encode_dataset": {
        "config", "data", "feature_source", "media", "model", "progress", "run", "schema",
    },
    "data_check": {"data", "media", "schema"},
    "data_check_table": {"data_check"},
    "data_commands": {"data", "data_check", "data_check_table", "progress"},
    "generate": {
        "data", "feature_source", "group_sampler", "media", "model", "prefix_source", "reward", "rollout", "runtime",
        "schema",
    },
    "generate_command": {"generate", "media", "schema"},
    "report": {"evaluate", "media", "metrics", "reward", "runtime", "schema"},
    "attribute": {"attribution", "config", "data", "progress", "rollout", "run", "schema"},
    "probe_table": {"media"},
    "contact_sheet": {"media", "probe_table", "report"},
    "probe": {"contact_sheet", "media", "probe_table", "progress", "schema"},
    "info": {"omnigrpo_kernels"},
    "pretrain_towers": {"data", "media", "model"},
    "probe_towers": {"data", "media", "model", "schema"},
    "stages": {"config", "evaluate", "metrics", "run"},
    "demo": {"data", "evaluate", "metrics", "model", "progress", "report", "stages"},
    "study": {"config", "data", "demo", "evaluate", "metrics", "progress", "stages"},
    "study_report": {"study"},
    "recipe": {"config", "data", "evaluate"},
    "reproduce": {"config", "evaluate", "metrics", "recipe", "report", "stages"},
    "reproduce_report": {"evaluate", "recipe", "reproduce"},
    "__main__": {"cli"},
    "wheel_commands": {"emotion_wheel"},
    "cli": {
        "attribute", "attribution", "config", "data", "data_commands", "demo", "encode_dataset", "evaluate", "generate",
        "generate_command", "info", "media", "probe", "progress", "report", "reproduce", "reproduce_report", "rollout",
        "run", "study", "study_report", "wheel_commands",
    },
}  # fmt: skip
"""Who may import whom: a layer is a top-level module or package of omnigrpo, or the package omnigrpo_kernels."""

KERNEL_DEPENDENCIES = {"omnigrpo_kernels", "torch", "triton"} | set(sys.stdlib_module_names)
SGLANG_IMPORTERS = (
    "omnigrpo.rollout.sglang_host",
    "omnigrpo.rollout.sglang_commands",
    "omnigrpo.rollout.sglang_plugin",
)
"""These modules, and those of these packages."""


def module_name(path: Path, source_root: Path) -> str:
    parts = path.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules() -> dict[str, Path]:
    return {module_name(path, root): path for root in SOURCE_ROOTS for path in sorted(root.rglob("*.py"))}


MODULES = find_modules()


def layer(module: str) -> str | None:
    """None for the empty package ``omnigrpo`` itself."""
    top, _, rest = module.partition(".")
    return top if top == "omnigrpo_kernels" else rest.partition(".")[0] or None


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Every dotted name that the file imports, at any depth; ``from a import b`` gives ``a.b``."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def resolve(name: str) -> str | None:
    """The module of ours that an imported name is, or is defined in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


@cache
def import_graph() -> dict[str, set[str]]:
    graph = {}
    for module, path in MODULES.items():
        targets = {resolve(name) for name in imported_names(path, module)}
        graph[module] = {target for target in targets if target and target != module}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle as a path that ends where it begins, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph[node]):
            if cycle := visit(target, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_the_layers_below_it(module: str) -> None:
    own = layer(module)
    if own is None:
        assert import_graph()[module] == set()
        return
    assert own in ALLOWED, f"{module}: add the layer {own!r} to ALLOWED, as low as it can be"
    for target in import_graph()[module]:
        other = layer(target)
        assert other in {own, None} | ALLOWED[own], f"{module} imports {target}: {own} may not import {other}"


@pytest.mark.parametrize("own", sorted(ALLOWED))
def test_every_permission_is_used(own: str) -> None:
    targets = {target for module in MODULES if layer(module) == own for target in import_graph()[module]}
    unused = ALLOWED[own] - {layer(target) for target in targets}
    assert not unused, f"no module of {own} imports {', '.join(sorted(unused))}: take it out of ALLOWED"


def test_layers_form_a_dag() -> None:
    assert find_cycle(ALLOWED) == []


def test_modules_form_a_dag() -> None:
    assert find_cycle(import_graph()) == []


def test_cycle_finder_finds_a_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_imports_inside_functions_and_relative_imports_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "engine.py"
    path.write_text(
        "def run():\n    from omnigrpo.model import qwen2\n    from . import sampling\n    import av\n"
    )
    names = set(imported_names(path, "omnigrpo.rollout.engine"))
    assert names == {"omnigrpo.model.qwen2", "omnigrpo.rollout.sampling", "av"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if layer(name) == "omnigrpo_kernels"))
def test_kernels_depend_on_torch_only(module: str) -> None:
    tops = {name.partition(".")[0] for name in imported_names(MODULES[module], module)}
    assert tops <= KERNEL_DEPENDENCIES


def test_only_the_sglang_modules_import_sglang() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        if any(name.partition(".")[0] == "sglang" for name in imported_names(path, module))
    }
    others = {
        m for m in importers if not any(f"{m}.".startswith(f"{allowed}.") for allowed in SGLANG_IMPORTERS)
    }
    assert not others


@pytest.mark.parametrize("directory", ["kernels", "tests", "tests/kernels"])
def test_directory_is_no_package(directory: str) -> None:
    """A regular package named ``kernels`` would shadow the PyPI package that transformers imports."""
    assert not (ROOT / directory / "__init__.py").exists()
