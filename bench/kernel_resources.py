"""Compile the Triton kernels without a GPU and report registers, spills, shared memory, wide loads and doubles.

    python -m bench.kernel_resources                 writes bench/results/kernel_resources.json

Every kernel is compiled ahead of time, in the form that training uses most, for sm_80 (A100) and sm_90 (H100, H200).
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.kernels import (
    triton_crop_resize,
    triton_depthwise,
    triton_depthwise_gradients,
    triton_norm_act,
    triton_norm_act_pool,
    triton_ofa_loss,
)

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, with its limits."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    """Type of each pointer argument, "*bf16" and so on; all are assumed to be 16-byte aligned."""
    constants: dict[str, Any]
    scalars: dict[str, str] = field(default_factory=dict)
    """Type of each other runtime argument, "i32" or "fp32"."""
    divisible: tuple[str, ...] = ()
    """Scalars that are multiples of 16."""
    num_warps: int = 4
    register_limit: int | None = None
    """The limit that the launcher passes to the compiler."""
    max_registers: int = 128
    wide_loads: bool = True
    """Whether it reads its tensors 128 bits at a time."""


def cases() -> list[Case]:
    return [*loss_cases(), *crop_cases(), *depthwise_cases(), *norm_cases(), *pool_cases()]


def loss_cases() -> list[Case]:
    """The whole objective, bf16, five heads, the top 16 classes; rows of a multiple of 16 bytes, and others."""
    found = []
    for num_classes, temperature, gradient in (
        (1000, 1.0, False),
        (1000, 1.0, True),
        (1000, 4.0, True),
        (100, 1.0, True),
        (21841, 1.0, False),
        (21841, 1.0, True),
    ):
        block, block_k, num_warps = triton_ofa_loss.block_sizes(num_classes, 16)
        found.append(
            Case(
                f"ofa_loss {'gradient ' * gradient}C={num_classes}"
                + (f" T={temperature:.0f}" if temperature != 1 else ""),
                triton_ofa_loss._loss_kernel,
                pointers={
                    "logits": "*bf16", "labels": "*i64", "partners": "*i64", "mixes": "*fp32", "classes": "*i32",
                    "log_probs": "*fp16", "eps": "*fp32", "incoming": "*fp32", "row_losses": "*fp32",
                    "gradient": "*bf16",
                },
                scalars={
                    "batch": "i32", "gt_weight": "fp32", "kd_weight": "fp32", "ofa_weight": "fp32", "smoothing": "fp32",
                    "inverse_temperature": "fp32",
                },
                constants={
                    "H": 5, "C": num_classes, "K": 16, "BLOCK": block, "BLOCK_K": block_k, "VECTOR": 8, "PAPER": False,
                    "TEMPERED": temperature != 1, "WITH_LABELS": True, "MIXED": True, "GRADIENT": gradient,
                },
                num_warps=num_warps,
                max_registers=64,
            )
        )  # fmt: skip
    return found


def crop_cases() -> list[Case]:
    """Crops of a resident data set, by sample id and whole-pixel box, to 224 px. Pixels are gathered byte by byte."""
    return [
        Case(
            f"crop_resize {name}",
            triton_crop_resize._crop_resize_kernel,
            pointers={"images": "*u8", "ids": "*i64", "boxes": "*i64", "flips": "*i1", "result": f"*{name}"},
            scalars={
                "count": "i32", "height": "i32", "width": "i32",
                **{f"{what}_{channel}": "fp32" for what in ("scale", "shift") for channel in "rgb"},
            },
            constants={
                "S": 224, "BLOCK": triton_crop_resize.BLOCK, "WITH_IDS": True, "ROUND": name == "u8",
            },
            max_registers=64,
            wide_loads=False,
        )
        for name in ("u8", "bf16")
    ]  # fmt: skip


def depthwise_cases() -> list[Case]:
    """bf16, with a batch norm and an activation folded in; sizes of two stages' exits and of MobileNetV2's first."""
    found = []
    for channels, side, activation in ((64, 56, "relu"), (512, 7, "relu"), (96, 112, "relu6")):
        for stride in (1, 2):
            for name, kernel, elements, limit in (
                ("forward", triton_depthwise._forward_kernel, None, None),
                ("input gradient", triton_depthwise._input_gradient_kernel, None, None),
                ("weight gradient", triton_depthwise._weight_gradient_kernel, None, None),
                (
                    "all gradients",
                    triton_depthwise_gradients._gradients_kernel,
                    triton_depthwise_gradients.ELEMENTS,
                    triton_depthwise_gradients.REGISTERS,
                ),
            ):
                tiles = triton_depthwise.tiling(256, side, side, channels, stride, elements)
                limit = limit or triton_depthwise.register_limit(kernel, stride)
                pointers = {
                    "x": "*bf16", "weight": "*fp32", "scales": "*fp32", "shifts": "*fp32", "y": "*bf16", "dy": "*bf16",
                    "dx": "*bf16", "sums": "*fp32",
                }  # fmt: skip
                found.append(
                    Case(
                        f"depthwise {name} C={channels} S={side} stride={stride}",
                        kernel,
                        pointers={n: t for n, t in pointers.items() if n in kernel.arg_names},
                        scalars=dict.fromkeys(("batch", "images", "height", "width", "rows"), "i32"),
                        constants={
                            "C": channels, "STRIDE": stride, "FOLDED": True, "ACTIVATION": activation,
                            "BLOCK_W": tiles.block_w, "BLOCK_C": tiles.block_c,
                        },
                        register_limit=limit,
                        max_registers=limit or 255,
                        wide_loads=elements is None,
                    )
                )  # fmt: skip
    return found


def norm_cases() -> list[Case]:
    """bf16, batch 1,024: a ResNet-18's first stage, and MobileNetV2's 144 channels in blocks of sixteen."""
    of_channels = dict.fromkeys(("means", "variances", "weight", "bias", "dweight", "dbias", "sums"), "*fp32")
    found = []
    for channels, rows in ((64, 1024 * 56 * 56), (144, 1024 * 56 * 56)):
        for name, kernel, tile, constants in (
            ("statistics", triton_norm_act._statistics_kernel, triton_norm_act.STATISTICS, {}),
            ("apply", triton_norm_act._apply_kernel, triton_norm_act.APPLY, {"ACTIVATION": "relu"}),
            ("apply, residual", triton_norm_act._apply_kernel, triton_norm_act.APPLY, {"ACTIVATION": "relu"}),
            ("sums", triton_norm_act._sums_kernel, triton_norm_act.SUMS, {"ACTIVATION": "relu"}),
            ("sums, residual", triton_norm_act._sums_kernel, triton_norm_act.SUMS, {"ACTIVATION": "relu"}),
            ("gradient", triton_norm_act._gradient_kernel, triton_norm_act.GRADIENT, {"ACTIVATION": "relu"}),
            ("gradient, residual", triton_norm_act._gradient_kernel, triton_norm_act.GRADIENT, {"ACTIVATION": None}),
        ):
            if channels == 144 and "residual" in name:
                continue
            tiles = triton_norm_act.tiling(rows, channels, tile)
            constants = {"C": channels, "BLOCK_M": tiles.block_m, "BLOCK_C": tiles.block_c, **constants}
            if "WITH_RESIDUAL" in kernel.arg_names:
                constants["WITH_RESIDUAL"] = "residual" in name
            maps = dict.fromkeys(("x", "residual", "dy", "y", "masked", "dx"), "*bf16")
            found.append(
                Case(
                    f"norm {name} C={channels}",
                    kernel,
                    pointers={n: t for n, t in (maps | of_channels).items() if n in kernel.arg_names},
                    scalars={
                        n: t for n, t in {"rows": "i32", "parts": "i32", "eps": "fp32"}.items() if n in kernel.arg_names
                    },
                    constants=constants,
                    max_registers=96,
                )
            )
    return found


def pool_cases() -> list[Case]:
    """bf16, a ResNet's stem."""
    tiles = triton_depthwise.tiling(1024, 112, 112, 64, 2)
    maps = dict.fromkeys(("x", "y", "greatest", "dy", "dx"), "*bf16") | {"places": "*u8"}
    maps |= dict.fromkeys(("means", "variances", "weight", "bias", "dweight", "dbias"), "*fp32")
    found = []
    for name, kernel in (
        ("forward", triton_norm_act_pool._forward_kernel),
        ("gradient", triton_norm_act_pool._gradient_kernel),
    ):
        scalars = dict.fromkeys(("batch", "images", "height", "width", "rows"), "i32") | {"eps": "fp32"}
        found.append(
            Case(
                f"norm and maximum {name} C=64",
                kernel,
                pointers={n: t for n, t in maps.items() if n in kernel.arg_names},
                scalars={n: t for n, t in scalars.items() if n in kernel.arg_names},
                constants={"C": 64, "BLOCK_W": tiles.block_w, "BLOCK_C": tiles.block_c},
                max_registers=128,
            )
        )
    return found


def compile_case(case: Case, architecture: int) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory, numbers of 128-bit loads and stores and of fp64 instructions."""
    names = case.kernel.arg_names
    signature = {n: case.pointers.get(n) or case.scalars.get(n) or "constexpr" for n in names}
    missing = [n for n in names if signature[n] == "constexpr" and n not in case.constants]
    if missing:
        raise ValueError(f"{case.name}: expected a type or a value for every argument, none for {missing}")
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in case.pointers or n in case.divisible}
    source = ASTSource(case.kernel, signature, {(names.index(n),): v for n, v in case.constants.items()}, attrs)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": case.num_warps, "maxnreg": case.register_limit}
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": case.name,
        "architecture": f"sm_{architecture}",
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64", ptx)),
        "wide_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64", ptx)),
        "doubles": len(re.findall(r"\.f64", ptx)),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """REG and STACK (where spilled registers go) as reported by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", printed.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def measure(only: Callable[[Case], bool] = lambda case: True) -> list[dict[str, Any]]:
    return [
        {**compile_case(case, architecture), "max_registers": case.max_registers, "promised_wide": case.wide_loads}
        for case in cases()
        if only(case)
        for architecture in ARCHITECTURES
    ]


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--only", default="", help="kernels whose name contains this; no record")
    args = parser.parse_args(argv)
    found = measure(lambda case: args.only in case.name)
    if not args.only:
        write_record("kernel_resources", {"triton": triton.__version__, "rows": found}, args.out)
    columns = ["kernel", "architecture", "registers", "stack", "shared", "wide_loads", "wide_stores", "doubles"]
    print(markdown_table(columns, [[str(row[c]) for c in columns] for row in found], left=2))


if __name__ == "__main__":
    main()
