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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.kernels import (
    triton_augment,
    triton_crop_resize,
    triton_depthwise,
    triton_depthwise_gradients,
    triton_gelu,
    triton_layer_norm,
    triton_norm_act,
    triton_norm_act_pool,
    triton_ofa_loss,
    triton_stem_conv,
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
    tensor_cores: bool = False
    """Whether it multiplies matrices on tensor cores."""
    exact: bool = False
    """Whether its results equal its twin's bit by bit: no fused multiply-add, and fp64 where the twin uses it."""


def cases() -> list[Case]:
    return [
        *loss_cases(),
        *crop_cases(),
        *depthwise_cases(),
        *norm_cases(),
        *pool_cases(),
        *gelu_cases(),
        *layer_norm_cases(),
        *augment_cases(),
        *stem_conv_cases(),
    ]


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
    """Crops of a resident dataset, by sample id and whole-pixel box, to 224 px. Pixels are gathered byte by byte."""
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


def augment_cases() -> list[Case]:
    """224 px, channels-last. Only the two kernels that read bytes in memory order read 128 bits at a time."""
    found = []
    for name, kernel, block in (
        ("tables", triton_augment._tables_kernel, triton_augment.TABLE_BLOCK),
        ("points", triton_augment._point_kernel, triton_augment.POINT_BLOCK),
        ("warp", triton_augment._warp_kernel, triton_augment.WARP_BLOCK),
        ("mix and erase", triton_augment._mix_erase_kernel, triton_augment.POINT_BLOCK),
    ):
        pointers = dict.fromkeys(("images", "result", "tables", "noise"), "*u8") | {"plan": "*i32", "maps": "*fp64"}
        found.append(
            Case(
                f"augment {name}",
                kernel,
                pointers={n: t for n, t in pointers.items() if n in kernel.arg_names},
                scalars={n: "i32" for n in ("red", "green", "blue") if n in kernel.arg_names},
                constants={"S": 224, "LAST": True, "BLOCK": block},
                num_warps=triton_augment.OPTIONS["num_warps"],
                max_registers=128,
                wide_loads=name in ("points", "mix and erase"),
                exact=True,
            )
        )
    return found


def gelu_cases() -> list[Case]:
    """bf16, the MLPs of a DeiT-T at batch 1,024."""
    found = []
    for name, kernel, tile in (
        ("forward", triton_gelu._forward_kernel, triton_gelu.FORWARD),
        ("gradient", triton_gelu._backward_kernel, triton_gelu.BACKWARD),
    ):
        tiles = triton_norm_act.tiling(1024 * 197, 768, tile)
        pointers = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16") | dict.fromkeys(("bias", "sums"), "*fp32")
        found += [
            Case(
                f"gelu {name}{', tanh' * tanh} C=768",
                kernel,
                pointers={n: t for n, t in pointers.items() if n in kernel.arg_names},
                scalars={"rows": "i32", "parts": "i32"},
                constants={"C": 768, "TANH": tanh, "BLOCK_M": tiles.block_m, "BLOCK_C": tiles.block_c},
                max_registers=96,
            )
            for tanh in (False, True)
        ]
    return found


def layer_norm_cases() -> list[Case]:
    """An fp32 stream and bf16 branches, as under autocast: widths of DeiT-T, DeiT-S and Mixer-B."""
    pointers = dict.fromkeys(("x", "stream", "dstream", "dx", "weight", "bias", "means", "inverses", "sums"), "*fp32")
    pointers |= dict.fromkeys(("residual", "y", "dy", "dresidual"), "*bf16")
    found = []
    for channels in (192, 384, 768):
        block_m, block_c, num_warps = triton_layer_norm.tiling(channels)
        for name, kernel, constants in (
            ("forward", triton_layer_norm._forward_kernel, {"WITH_RESIDUAL": True}),
            ("gradient", triton_layer_norm._backward_kernel, {"WITH_RESIDUAL": True, "WITH_STREAM": True}),
        ):
            scalars = {"rows": "i32", "parts": "i32", "eps": "fp32"}
            found.append(
                Case(
                    f"layer_norm {name} C={channels}",
                    kernel,
                    pointers={n: t for n, t in pointers.items() if n in kernel.arg_names},
                    scalars={n: t for n, t in scalars.items() if n in kernel.arg_names},
                    constants={"C": channels, "BLOCK_M": block_m, "BLOCK_C": block_c, **constants},
                    num_warps=num_warps,
                    max_registers=144,
                )
            )
    return found


def stem_conv_cases() -> list[Case]:
    """bf16, batch 1,024, 224 px: the stems of ResNets, MobileNetV2 and ConvNeXt. Pixels are gathered byte by byte."""
    found = []
    for kernel_size, stride, padding, channels in ((7, 2, 3, 64), (3, 2, 1, 32), (4, 4, 0, 96)):
        tiles = triton_stem_conv.tiling((1024, 3, 224, 224), (channels, 3, kernel_size, kernel_size), stride, padding)
        for name, kernel, block_k, registers in (
            ("forward", triton_stem_conv._forward_kernel, triton_stem_conv.FORWARD_K, 184),
            ("weight gradient", triton_stem_conv._weight_gradient_kernel, triton_stem_conv.GRADIENT_K, 255),
        ):
            pointers = {"x": "*u8", "y": "*bf16", "dy": "*bf16"}
            pointers |= dict.fromkeys(("weight", "bias", "means", "stds", "sums"), "*fp32")
            constants = {
                "WITH_BIAS": kernel_size == 4, "WITH_SUMS": kernel_size != 4, "OPERAND": tl.bfloat16, "PRECISION": None,
                "BLOCK_K": block_k, **tiles.constants,
            }  # fmt: skip
            found.append(
                Case(
                    f"stem {name} {kernel_size}x{kernel_size}/{stride} to {channels}",
                    kernel,
                    pointers={n: t for n, t in pointers.items() if n in kernel.arg_names},
                    scalars={"tiles": "i32", "parts": "i32", "height": "i32"},
                    constants={n: v for n, v in constants.items() if n in kernel.arg_names},
                    max_registers=registers,
                    wide_loads=name != "forward",
                    tensor_cores=True,
                )
            )
    return found


def compile_case(case: Case, architecture: int) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory; numbers of 128-bit loads and stores, fp64 and fused instructions.

    A fused instruction is a multiply-add that rounds once.
    """
    names = case.kernel.arg_names
    signature = {n: case.pointers.get(n) or case.scalars.get(n) or "constexpr" for n in names}
    missing = [n for n in names if signature[n] == "constexpr" and n not in case.constants]
    if missing:
        raise ValueError(f"{case.name}: expected a type or a value for every argument, none for {missing}")
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in case.pointers or n in case.divisible}
    source = ASTSource(case.kernel, signature, {(names.index(n),): v for n, v in case.constants.items()}, attrs)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": case.num_warps, "maxnreg": case.register_limit, "enable_fp_fusion": not case.exact}
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": case.name,
        "architecture": f"sm_{architecture}",
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wide_loads": len(
            re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg.*\], 0x10", ptx)
        ),
        "wide_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64", ptx)),
        "doubles": len(re.findall(r"\.f64", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "exact": case.exact,
        "matrix_products": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
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
        {
            **compile_case(case, architecture),
            "max_registers": case.max_registers,
            "promised_wide": case.wide_loads,
            "promised_tensor_cores": case.tensor_cores,
        }
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
