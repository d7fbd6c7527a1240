"""Builds the extension module; everything else about the package is in pyproject.toml.

With OMNIGRPO_WITHOUT_EXTENSION=1 nothing is built: an editable install in a second environment finds the module that
the first one left beside the sources, for its ABI is that of every torch >= 2.11.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_2_11 = "0x020b000000000000"

extension = CppExtension(
    name="omnigrpo_kernels._C",
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").glob(pattern)),
    define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
    # -fno-trapping-math: exception flags do not matter here, and a select vectorises only without them.
    extra_compile_args=[
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ],
    py_limited_api=True,
)

setup(
    ext_modules=[] if os.environ.get("OMNIGRPO_WITHOUT_EXTENSION") == "1" else [extension],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
