"""The TensorRT API that the code uses exists in both flavours: in TensorRT-RTX, and in the full TensorRT.

The full one's libraries are not on the package index, its Python bindings are: over libraries of nothing but the nine
functions that they link to, they import, and show their classes.
"""

import ast
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arriero

ROOT = Path(arriero.__file__).parent
SOURCES = (
    "engine/builder.py",
    "engine/tensorrt_library.py",
    "engine/tensorrt_bundle.py",
    "plugins/tensorrt_plugin.py",
    "runtime/backends/tensorrt_decoder.py",
    "runtime/backends/execution.py",
    "runtime/backends/tensorrt_tower.py",
)
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "definition": "INetworkDefinition",
    "parser": "OnnxParser",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "registry": "IPluginRegistry",
}
"""The classes of the variables that hold TensorRT's objects."""

RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
}
"""Used for `tensorrt-rtx` alone."""

LIBRARIES = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
FIND = """
import json, sys
module = __import__(sys.argv[1], fromlist=["x"])
missing = []
for name in json.load(sys.stdin):
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        missing.append(name)
print(json.dumps(missing))
"""


def used_names() -> set[str]:
    """What the sources name: `trt.X`, `trt.X.Y`, and the methods of objects whose class is known."""
    names = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            chain = [node.attr]
            value = node.value
            while isinstance(value, ast.Attribute):
                chain.append(value.attr)
                value = value.value
            if not isinstance(value, ast.Name):
                continue
            path = ".".join(reversed(chain))
            if value.id == "trt":
                names.add(path.removesuffix(".__init__"))
            elif value.id in CLASSES and len(chain) == 1 and not source.startswith("runtime/"):
                names.add(f"{CLASSES[value.id]}.{path}")
            elif value.id == "context" and len(chain) == 1:
                names.add(f"IExecutionContext.{path}")
    names.discard("__version__")
    return names | {"ICudaEngine.create_execution_context", "ICudaEngine.create_runtime_config", "Runtime"}


def missing(module: str, **environment: str) -> set[str]:
    command = [sys.executable, "-c", FIND, module]
    run = subprocess.run(
        command,
        input=json.dumps(sorted(used_names())),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_the_names_are_found_in_the_sources() -> None:
    names = used_names()
    assert {"Builder.build_serialized_network_to_stream", "IPluginV3OneBuildV2", "DataType.FP8"} <= names
    assert {"IExecutionContext.execute_async_v3", "IBuilderConfig.add_optimization_profile"} <= names
    assert len(names) > 50


def test_tensorrt_rtx_has_all_that_the_code_uses() -> None:
    assert missing("tensorrt_rtx") == set()


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler makes the libraries that the bindings link to")
def test_the_full_tensorrt_has_all_but_what_is_for_rtx(tmp_path: Path) -> None:
    for library, functions in LIBRARIES.items():
        source = tmp_path / f"{library}.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(tmp_path / library), str(source)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(tmp_path / library))
    assert missing("tensorrt_bindings", LD_LIBRARY_PATH=str(tmp_path)) == RTX_ONLY & used_names()
