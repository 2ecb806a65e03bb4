"""Packs the C++ kernels into a wheel, one library for each kind of processor of this platform.

KVGEN_PURE=1 makes a wheel without them, for any platform. A checkout (`pip install -e .`) compiles them at first use.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))

from kvgen.errors import UnsupportedError
from kvgen.kernels.compiler import compile_kernels, find_compiler, library_name
from kvgen.kernels.processors import Variant, machine_variants

PURE = os.environ.get("KVGEN_PURE", "").lower() not in ("", "0", "false", "no")


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib) / "kvgen" / "kernels" / "libraries"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        if PURE or self.editable_mode:
            return
        try:
            compile_one = partial(_compile, find_compiler(), folder)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, machine_variants()))
        except UnsupportedError as error:
            raise CompileError(f"{error}; KVGEN_PURE=1 makes a wheel without compiled kernels") from error


def _compile(compiler: str, folder: Path, variant: Variant) -> None:
    compile_kernels(compiler, variant, folder / library_name(variant))


class PlatformWheel(bdist_wheel):
    """The libraries are loaded with ctypes, so one wheel serves every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if PURE else ("py3", "none", platform)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return not PURE


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
