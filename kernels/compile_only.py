"""Compiles Triton kernels for sm_80 and sm_90a on a machine without a GPU: registers, spills, shared memory, instructions.

    python -m vpgtrans.kernels.compile_only qformer_attention [--architectures 80 90]

prints a JSON list, one object a kernel, case and architecture. In a process without TRITON_INTERPRET. An operation's module
`X_triton.py` names its cases: `compile_cases(architecture: int) -> list[CompileCase]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one setting.

    types: argument -> "*bf16", "*fp32", "i32", "fp32" and so on.  constexprs: argument -> value.  multiples_of_16: integer arguments that are
    (pointers always count as such, as for tensors of torch).  options: num_warps, num_stages.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: a thread's registers, bytes spilled, bytes of shared memory; how often which instructions stand in it.

    wide_loads, wide_stores: of 16 bytes a thread from or to global memory.
    local_accesses, loop_local_accesses: of spilled registers, anywhere and between a label and a branch back to it.
    """

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    wgmma: int
    mma: int
    fp8_mma: int
    local_accesses: int
    loop_local_accesses: int
    wide_loads: int
    wide_stores: int


def compile_case(case: CompileCase, architecture: int) -> Resources:
    """Compile and take stock; raises what Triton or ptxas raise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = case.kernel.arg_names
    signature = {a: "constexpr" if a in case.constexprs else case.types[a] for a in arguments}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(arguments)
        if a not in case.constexprs and (case.types[a].startswith("*") or a in case.multiples_of_16)
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))
    return _resources(case.name, compiled, architecture)


def _resources(name: str, compiled: Any, architecture: int) -> Resources:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, text = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text.write_text(ptx)
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        sass = _output(tools / "nvdisasm", "-c", cubin)
        target = re.search(r"\.target (\w+)", ptx)[1]
        assembled = _output(get_ptxas(architecture).path, "-v", f"--gpu-name={target}", text, "-o", Path(folder, "out"))
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", assembled)[0]]
    return Resources(
        name=name,
        architecture=architecture,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spill_bytes=sum(spilled),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        wgmma=len(re.findall(r"\bHGMMA", sass)) + len(re.findall(r"\bQGMMA", sass)),
        mma=len(re.findall(r"\bHMMA", sass)),
        fp8_mma=len(re.findall(r"\bQGMMA", sass)),
        local_accesses=len(re.findall(_LOCAL, sass)),
        loop_local_accesses=local_accesses_in_loops(sass),
        wide_loads=len(re.findall(r"\bLDG\.[\w.]*128\b", sass)),
        wide_stores=len(re.findall(r"\bSTG\.[\w.]*128\b", sass)),
    )


_LOCAL = r"\b(?:LDL|STL)\b"


def local_accesses_in_loops(sass: str) -> int:
    """How many instructions of a listing of nvdisasm load or store local memory between a label and a branch back to it."""
    lines = sass.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_\w+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*(\.L_\w+)", line)
        if branch and labels.get(branch[1], i) < i:
            inside.update(range(labels[branch[1]], i))
    return sum(bool(re.search(_LOCAL, lines[i])) for i in inside)


def _output(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compile_only", description="compile Triton kernels for GPUs that are not there"
    )
    parser.add_argument("operations", nargs="+", help="operations, such as qformer_attention")
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90])
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile_only: expected a process without TRITON_INTERPRET, got 1; unset it", file=sys.stderr)
        return 2
    found = []
    for operation in options.operations:
        module = importlib.import_module(f".{operation}_triton", __package__)
        for architecture in options.architectures:
            found += [asdict(compile_case(case, architecture)) for case in module.compile_cases(architecture)]
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
