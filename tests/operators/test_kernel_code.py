"""What the Triton kernels compile to, which takes no GPU: 16-byte accesses on the main path, no stack, no spills."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from esam_kernels.ops import triton_kernels  # noqa: E402

BLOCK, NORM_BLOCK, WARPS = triton_kernels._BLOCK, triton_kernels._NORM_BLOCK, triton_kernels._WARPS
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
TABLE = {"table": "*i64", "rows": "i32"}


# The newer architecture shows it for each size of a weight; the older one for one of them, where a weight is moved.
DTYPES = {80: ("bfloat16",), 90: ("float32", "bfloat16", "float64")}


def accesses(elements, bytes_each):
    """How many 16-byte accesses each thread makes to one array of a block."""
    return elements * bytes_each // 16 // (32 * WARPS)


def specimens(architecture):
    """Kernel, argument types, constants, warps, and how many 16-byte loads and stores its code must have at least."""
    for dtype in DTYPES[architecture]:
        size = BYTES[dtype]
        dtypes, wide = {"PARAM": dtype, "GRAD": dtype}, accesses(BLOCK, size)
        for adaptive, masked, rounded in [(False, False, False), (True, True, False), (True, True, True)]:
            if size == 2 or not rounded:
                for saved in (True, *(() if masked else (False,))):
                    switches = {"ADAPTIVE": adaptive, "MASKED": masked, "ROUNDED": rounded, "SAVED": saved}
                    constants, stores = dtypes | switches | {"BLOCK": BLOCK}, (1 + saved) * wide
                    yield "_perturb_kernel", TABLE | {"norm": "*fp32"}, constants, WARPS, 2 * wide, stores
        for adaptive, masked in [(False, False), (True, True)]:
            types = TABLE | {"partials": "*fp64", "partials_before": "i32", "out": "*fp32"}
            switches = {"ADAPTIVE": adaptive, "MASKED": masked, "BLOCK": NORM_BLOCK}
            loads = accesses(NORM_BLOCK, size) * (2 if adaptive else 1)
            yield "_squared_norm_kernel", types, dtypes | switches, WARPS, loads, 0
    if architecture < max(DTYPES):
        return
    for size in (2, 4, 8):
        wide = accesses(BLOCK, size)
        yield "_restore_kernel", TABLE, {"BITS": f"int{8 * size}", "BLOCK": BLOCK}, WARPS, wide, wide
    for key, loss in {"uint32": "*fp32", "uint64": "*fp64"}.items():
        for b in (32, 4096):
            types = {"before": loss, "after": loss, "out": "*i64", "b": "i32", "k": "i32"}
            yield "_select_top_kernel", types, {"KEY": key, "BLOCK": b}, triton_kernels._select_warps(b), 0, 0


def compile_all(architecture):
    """The faults of all specimens. Runs in a process of its own, whose Triton compiles."""
    faults, compiled = [], 0
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for name, types, constants, warps, loads, stores in specimens(architecture):
        values = {k: getattr(triton.language, v) if isinstance(v, str) else v for k, v in constants.items()}
        source = triton.compiler.ASTSource(
            getattr(triton_kernels, name), types | dict.fromkeys(values, "constexpr"), constexprs=values
        )
        options = {"num_warps": warps, "enable_fp_fusion": False}
        code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(code["cubin"])
            usage = subprocess.check_output([cuobjdump, "--dump-resource-usage", file.name], text=True)
        found = {"stack": int(re.search(r"STACK:(\d+)", usage)[1]), "local": int(re.search(r"LOCAL:(\d+)", usage)[1])}
        for access in ("ld", "st"):
            found[access] = len(re.findall(rf"{access}\.global\S*\.(?:v4\.b32|v2\.b64)", code["ptx"]))
        if found["stack"] or found["local"] or found["ld"] < loads or found["st"] < stores:
            faults.append(f"{name} {constants}: {found}, of {loads} 16-byte loads and {stores} stores")
        compiled += 1
    return {"compiled": compiled, "faults": faults}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("cache"))
    environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("architecture", DTYPES)
def test_kernels_access_16_bytes_and_use_no_stack(architecture, reports):
    report = reports[str(architecture)]
    assert report["faults"] == []
    assert report["compiled"] == len(list(specimens(architecture)))


if __name__ == "__main__":
    print(json.dumps({architecture: compile_all(architecture) for architecture in DTYPES}))
