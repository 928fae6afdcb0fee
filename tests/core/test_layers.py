"""The architecture as a test: imports go down, never up or around, and do nothing by themselves."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.core.golden_paths import REPOSITORY

PACKAGE = REPOSITORY / "hunyuan3"
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server", "nodes", "execution"}

# From the ground up; what stands on one line does not know of each other. A folder stands for all of its modules, which
# may import each other freely as long as they make no cycle.
LAYERS = [
    ["errors", "types", "callbacks"],
    ["config"],
    ["checkpoint", "text", "image", "ops"],
    ["moe", "vae", "vision"],
    ["transformer"],
    ["placement", "quant"],
    ["generate"],
    ["folder"],
    ["parts", "pictures"],
    ["conditioning"],
    ["run", "writing"],
    ["pipeline"],
    ["tiny", "error", "pack", "plan", "__main__"],
]
HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}


def module_files():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    """hunyuan3/moe/layer.py -> ("moe", "layer"); a package's __init__ is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path, package=PACKAGE):
    """(line, level, dotted name, names) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name, []


def inner_imports(path):
    """(line, dotted tuple) of the modules of hunyuan3 that a file of it imports."""
    own = dotted(path)
    here = own if path.name == "__init__.py" else own[:-1]
    for line, level, module, names in imports(path):
        if not level:
            continue
        base = here[: len(here) - (level - 1)]
        target = base + tuple(module.split(".")) if module else base
        if (PACKAGE.joinpath(*target)).is_dir():
            for name in names:
                inside = (*target, name)
                is_module = PACKAGE.joinpath(*inside).is_dir() or PACKAGE.joinpath(*inside).with_suffix(".py").is_file()
                yield line, inside if is_module else target
        else:
            yield line, target


def unit(module):
    return module[0] if module else "hunyuan3"


def test_the_table_names_every_part_of_the_package_once():
    parts = {unit(dotted(path)) for path in module_files()} - {"hunyuan3"}
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted(set(listed))
    assert parts == set(listed), "a new part needs its place in LAYERS, and in docs/architecture.md"


def test_imports_go_downwards_only():
    wrong = []
    for path in module_files():
        own = unit(dotted(path))
        for line, target in inner_imports(path):
            if own == unit(target):
                continue
            if own == "hunyuan3" or HEIGHT[unit(target)] >= HEIGHT[own]:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {'.'.join(target)}")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_import_cycle():
    graph = {dotted(path): {target for _, target in inner_imports(path)} for path in module_files()}
    assert sum(map(len, graph.values())) > 50, "the imports were not found"
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError naming the cycle
    assert order.index(("errors",)) < order.index(("pipeline",))


def test_inside_the_package_imports_are_relative():
    """ComfyUI loads a pack under a name made of its path, so `hunyuan3` cannot be found by name."""
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in module_files()
        for line, level, module, _ in imports(path)
        if not level and module.partition(".")[0] == "hunyuan3"
    ]
    assert not wrong


def test_relative_imports_stay_inside_the_package():
    """One dot too many would reach the pack's own __init__, or the folder it lies in."""
    wrong = []
    for path in module_files():
        depth = len(path.relative_to(PACKAGE).parts)
        wrong += [f"{path}:{line}" for line, level, _, _ in imports(path) if level > depth]
    assert not wrong


def test_only_the_nodes_know_comfyui():
    wrong = []
    for path in module_files():
        for line, level, module, _ in imports(path):
            if not level and module.partition(".")[0] in COMFY:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_nodes_reach_the_core_by_relative_imports():
    files = sorted((REPOSITORY / "nodes").rglob("*.py"))
    assert files
    for path in files:
        for line, level, module, _ in imports(path):
            assert level or module.partition(".")[0] != "hunyuan3", f"{path.name}:{line}"


def test_the_packs_own_init_imports_the_nodes_only_inside_the_entry_point():
    """Tools import this file without a ComfyUI (pytest among them)."""
    tree = ast.parse((REPOSITORY / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}"


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_neither_prints_nor_evaluates_nor_unpickles(path):
    forbidden = {"eval", "exec", "__import__", "compile"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden, f"line {node.lineno}"
            may_print = {PACKAGE / f"{name}.py" for name in ("__main__", "tiny", "error", "pack", "plan")}
            assert node.func.id != "print" or path in may_print, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.load", "pickle.loads"), f"line {node.lineno}"


IMPORT_ALL = """
import logging, pathlib, pkgutil, sys, threading
import accelerate, einops, safetensors.torch, tokenizers, torch, tqdm  # whatever these do is theirs
root = logging.getLogger()

def state():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.random.get_rng_state().tolist(), torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), root.level, list(root.handlers), threading.active_count(),
        list(sys.path), sys.excepthook, sys.getrecursionlimit(),
    )

before = state()
import hunyuan3
modules = [m.name for m in pkgutil.walk_packages(hunyuan3.__path__, "hunyuan3.")]
for name in modules:
    __import__(name)
assert state() == before, "importing changed the process"
assert not torch.cuda.is_initialized()
loggers = [n for n in logging.root.manager.loggerDict if n.startswith("hunyuan3")]
assert not any(logging.getLogger(n).handlers or logging.getLogger(n).level for n in loggers)
assert not [n for n in sys.modules if n.partition(".")[0] in ("comfy", "folder_paths", "server", "diffusers")]
sys.stderr.write(f"{len(modules)} modules")
"""


def test_importing_everything_has_no_side_effects(tmp_path):
    """Nothing printed, written, configured, started or initialised."""
    home = tmp_path / "home"
    home.mkdir()
    env = {"PYTHONPATH": str(REPOSITORY), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "error::DeprecationWarning:hunyuan3", "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == f"{len(module_files()) - 1} modules"
    assert list(Path(home).rglob("*")) == []
