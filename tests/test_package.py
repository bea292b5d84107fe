"""The package as installed: names that must not collide, the compiled module, the wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS_OF_SOURCE = ("engine", "kernels", "csrc")


def run_python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_top_level_package_of_ours_is_installed() -> None:
    # -P: without the current folder on sys.path, as for the commands vpgtrans and torchrun.
    probe = "import importlib.util as u; print([u.find_spec(n) for n in ('kernels', 'engine', 'vpgtrans.engine')])"
    assert run_python("-P", "-c", probe, cwd=ROOT).startswith("[None, None, ModuleSpec(name='vpgtrans.engine'")


def test_transformers_takes_our_kernels_folder_for_nothing() -> None:
    # python -m from the root puts it on sys.path, so that find_spec("kernels") is our folder: the worst case.
    probe = (
        "import importlib.util, transformers.utils.import_utils as t; "
        "from transformers import Blip2QFormerModel, LlamaForCausalLM; "
        "print(importlib.util.find_spec('kernels').origin, t.is_kernels_available())"
    )
    origin, available = run_python("-c", probe, cwd=ROOT).split()
    assert origin == str(ROOT / "kernels" / "__init__.py")
    assert available == "False"


def test_no_child_of_engine_shadows_a_module() -> None:
    # torchrun engine/train.py puts engine/ first on sys.path.
    children = {path.stem for path in (ROOT / "engine").iterdir() if path.suffix == ".py" or path.is_dir()}
    children -= {"__init__", "__pycache__"}
    installed = set(importlib.metadata.packages_distributions())
    assert {"json", "logging"} <= sys.stdlib_module_names
    assert {"torch", "numpy", "pytest"} <= installed
    assert children & (sys.stdlib_module_names | installed) == set()


def test_kernels_imports_only_relatively_and_has_no_version() -> None:
    # transformers imports a top-level `kernels` it finds and asks for __version__.
    kernels = importlib.import_module("vpgtrans.kernels")
    assert not hasattr(kernels, "__version__")
    for path in (ROOT / "kernels").glob("*.py"):
        assert "import vpgtrans" not in path.read_text() and "from vpgtrans" not in path.read_text(), path


def test_compiled_module_is_there_and_of_this_version() -> None:
    module = importlib.import_module("vpgtrans.kernels._C")
    info = module.build_info()
    assert info["version"] == importlib.metadata.version("vpgtrans")
    assert info["cxx_standard"] >= 201703
    assert module.__name__ == "vpgtrans.kernels._C"


def test_entry_points_are_installed() -> None:
    commands = importlib.metadata.entry_points(group="console_scripts", name="vpgtrans")
    assert {point.value for point in commands} == {"vpgtrans.engine.cli:main"}
    (handler,) = importlib.metadata.entry_points(group="torchrun.handlers", name="vpgtrans_exit_codes")
    assert callable(handler.load())


@pytest.mark.slow
def test_wheel_holds_every_module_and_the_extension(tmp_path: Path) -> None:
    for tool in ("pip", "pybind11"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed in this environment")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in FOLDERS_OF_SOURCE:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tree)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", ".", "-w", ".."]
    run_python(*build, cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        f"vpgtrans/{path.relative_to(tree)}" for name in ("engine", "kernels") for path in (tree / name).rglob("*.py")
    }
    assert modules <= names
    assert len([name for name in names if name.startswith("vpgtrans/kernels/_C.")]) == 1
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vpgtrans"}
