"""Build and metadata of `vpgtrans`: the folders engine/ and kernels/ are installed as vpgtrans.engine and
vpgtrans.kernels.

They are never installed as top-level packages: transformers probes for a top-level package `kernels` (Hugging Face
publishes one of that name) and would find ours.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent
FOLDERS = {"vpgtrans.engine": "engine", "vpgtrans.kernels": "kernels"}


def all_packages() -> list[str]:
    """The packages of `FOLDERS` with every sub-package below them."""
    return [
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
    ]


class CMakeBuild(build_ext):
    """Builds each extension with CMake, into the place where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        # A cache left by an isolated build names a ninja and a pybind11 that pip has deleted since.
        shutil.rmtree(build_dir, ignore_errors=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build_dir)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVPGTRANS_VERSION={VERSION}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)], check=True)
        if not target.is_file():
            raise RuntimeError(f"CMake built {sorted(p.name for p in target.parent.iterdir())}, expected {target}")


setup(
    name="vpgtrans",
    version=VERSION,
    description="Transfer a visual prompt generator from one language model to another, after VPGTrans",
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=all_packages(),
    ext_modules=[
        Extension("vpgtrans.kernels._C", sources=[], depends=["CMakeLists.txt", *sorted(glob.glob("csrc/*"))])
    ],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[
        "torch>=2.11",
        "transformers>=5",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "pillow",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "protobuf",
        "tensorboard",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "simplejpeg"],
        "lint": ["ruff"],
        "triton": ["triton>=3.6; platform_system == 'Linux'"],
        # attention: flash. A source package that builds against the torch that is there: pip install --no-build-isolation, with CUDA's nvcc.
        "flash-attn": ["flash-attn>=2.7.1; platform_system == 'Linux'"],
        # attention: xformers, whose flash operators take flash-attn or torch's own.
        "xformers": ["xformers>=0.0.33; platform_system == 'Linux'"],
        # NVIDIA's apex (optimizer.implementation: apex) is no extra: what the package index calls apex is another project. README says how.
        # JPEGs where the extension was built without libjpeg-turbo's headers.
        "simplejpeg": ["simplejpeg"],
        # output.wandb
        "wandb": ["wandb"],
        # data.loader: ffcv; builds with libturbojpeg0-dev libopencv-dev pkg-config g++.
        "ffcv": ["ffcv"],
    },
    entry_points={
        "console_scripts": ["vpgtrans = vpgtrans.engine.cli:main"],
        # torch loads this group inside the torchrun process; engine/torchrun_exit.py says what for.
        "torchrun.handlers": ["vpgtrans_exit_codes = vpgtrans.engine.torchrun_exit:get_handler"],
    },
    zip_safe=False,
)
