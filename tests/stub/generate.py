"""Write the generated sources of the stub.

    generate.py driver CUDA_INCLUDE OUT       names.h and unknown.c for libcuda
    generate.py runtime CUDA_INCLUDE OUT      unknown.c for libcudart
    generate.py cudnn CUDNN_INCLUDE OUT       unknown.c for libcudnn
    generate.py cublas|cublasLt FOLDER OUT    unknown.c for what ONNX Runtime's CUDA provider in that folder takes from the library

``unknown.c`` has a weak definition of every function of a library: it leaves a line UNKNOWN in the log and returns an error. The functions that the stub
implements replace their weak definitions.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

PROVIDER = "libonnxruntime_providers_cuda.so"


def main(library: str, source: Path, out: Path) -> None:
    """Write the sources for one library into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    if library == "driver":
        header = (source / "cuda.h").read_text(encoding="utf-8")
        names = _driver_names(header)
        (out / "names.h").write_text(_tables(header, (source / "cudaTypedefs.h").read_text(encoding="utf-8"), names), encoding="utf-8")
    elif library == "runtime":
        names = set(re.findall(r"CUDARTAPI\s+(cuda[A-Z]\w+)\s*\(", (source / "cuda_runtime_api.h").read_text(encoding="utf-8")))
    elif library == "cudnn":
        headers = "".join(path.read_text(encoding="utf-8") for path in source.glob("cudnn*.h"))
        names = set(re.findall(r"CUDNNWINAPI\s+(cudnn[A-Z]\w+)\s*\(", headers))
    else:
        listed = subprocess.run(["nm", "-D", "--undefined-only", str(source / PROVIDER)], check=True, capture_output=True, text=True).stdout
        names = {name for name in re.findall(r" U (cublas\w+)", listed) if name.startswith("cublasLt") == (library == "cublasLt")}
    (out / "unknown.c").write_text(_weak_definitions(names), encoding="utf-8")


def _driver_names(header: str) -> set[str]:
    names = set(re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", header))
    names |= set(re.findall(r"^\s*#define\s+cu[A-Z]\w+\s+(cu[A-Z]\w+)\s*$", header, re.MULTILINE))
    return {name for name in names if not name.endswith(("_ptsz", "_ptds"))}


def _tables(header: str, typedefs: str, names: set[str]) -> str:
    """Return names.h: which function a name stands for since which version of CUDA, and the names of errors."""
    since: dict[str, set[int]] = defaultdict(set)
    for name, version in re.findall(r"PFN_(cu\w+?)_v(\d+)(?:_pt[sd][sz])?\)", typedefs):
        since[name].add(int(version))
    rows: list[tuple[int, str, str]] = []
    for name in sorted({re.sub(r"_v\d$", "", name) for name in names}):
        functions = [function for function in (name, *(f"{name}_v{k}" for k in range(2, 6))) if function in names]
        if name == "cuGraphInstantiate":  # the name of the newest function has no version
            functions = ["cuGraphInstantiate", "cuGraphInstantiate_v2", "cuGraphInstantiateWithFlags"]
        versions = sorted(since[name])[-len(functions) :]
        rows += zip([0] * (len(functions) - len(versions)) + versions, functions, [name] * len(functions), strict=True)
    enumerators = re.search(r"typedef enum cudaError_enum \{(.*?)\} CUresult;", header, re.DOTALL)
    assert enumerators is not None, "cuda.h has no enumeration CUresult"
    errors = re.findall(r"(CUDA_\w+)\s*=\s*(\d+)", enumerators[1])
    return "\n".join(
        [
            "namespace stub {",
            "struct Version { const char *name; int since; const char *function; };",
            "constexpr Version kVersions[] = {",
            *(f'  {{"{name}", {version}, "{function}"}},' for version, function, name in rows),
            "};",
            "struct Error { int code; const char *name; };",
            "constexpr Error kErrors[] = {",
            *(f'  {{{code}, "{name}"}},' for name, code in errors),
            "};",
            "}  // namespace stub",
            "",
        ]
    )


def _weak_definitions(names: set[str]) -> str:
    lines = [f'__attribute__((weak, visibility("default"))) int {name}(void) {{ return scm_stub_unknown("{name}"); }}' for name in sorted(names)]
    return "\n".join(["int scm_stub_unknown(const char *function);", *lines, ""])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
