"""A C++ host: opens graphs of a bundle through ONNX Runtime's C++ API, with and without the native library."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from scm_runtime.common.load_onnxruntime import load_onnxruntime
from support import ROOT, native_library, run

BUNDLE = ROOT / "scm_runtime" / "bundles" / "digits.scm"
HOST = """
#include <cstdio>
#include <memory>
#include <onnxruntime_cxx_api.h>

int main(int count, char** arguments) {  // the library, and graphs
  try {
    Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "host");
    for (const bool registered : {false, true}) {
      for (int i = 2; i < count; ++i) {
        Ort::SessionOptions options;
        if (registered) options.RegisterCustomOpsLibrary(arguments[1]);
        const Ort::Session session(env, arguments[i], options);
        std::printf("%s %d %zu\\n", arguments[i], registered, session.GetOutputCount());
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\\n", error.what());
    return 1;
  }
}
"""


def headers() -> Path:
    """Return where the native library's build found ONNX Runtime's headers, which no wheel contains."""
    named = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    places = [Path(named)] if named else [path.parent for path in (ROOT / "build").glob("**/onnxruntime_cxx_api.h")]
    places += [Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime")]
    found = next((place for place in places if (place / "onnxruntime_cxx_api.h").is_file()), None)
    if found is None:
        pytest.skip("needs ONNX Runtime's headers: make ops, or ONNXRUNTIME_INCLUDE_DIR")
    return found


def test_a_host_in_cpp_opens_every_graph_bare_and_with_the_native_library(tmp_path: Path) -> None:
    library, compiler = native_library(), shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    include = headers()
    runtime = next((Path(load_onnxruntime().__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if runtime is None:
        pytest.skip("this ONNX Runtime has no shared library to link to")
    (tmp_path / "host.cc").write_text(HOST)
    (tmp_path / "libonnxruntime.so.1").symlink_to(runtime)  # the file name that ONNX Runtime's wheel lacks
    run([compiler, "-std=c++17", "-isystem", include, tmp_path / "host.cc", runtime, f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "host"])
    graphs = sorted(BUNDLE.glob("*.onnx"))
    opened = run([tmp_path / "host", library, *graphs]).stdout.splitlines()
    assert opened == [f"{graph} {registered} 1" for registered in (0, 1) for graph in graphs]
