"""Packages of AOTInductor: compiled code that torch runs from Python, or from C++ without Python.

Needs torch 2.10 or newer, and a C++ compiler.
"""

from pathlib import Path

import torch
from mamba_ssm_vim.ops.mixer.op import kept_whole

from vim.models.checks import ready_for_export
from vim.models.vision_mamba import VisionMamba


def export_aoti(model: VisionMamba, file: str | Path) -> None:
    """Compile a float32 model for images (batch, C, H, W), `batch` free, to logits.

    It calls the mixer and the norm as operators: those that this project's packages register, or in a program without
    Python those of mamba-1p1p1/csrc/torch. Mixers that pool call others, which only Python has.

    Args:
        model: exported in evaluation mode, for images of its own size (`set_input_size` sets another one first).
        file: where to write, with the suffix `.pt2`.

    Raises:
        ValueError: the file has another suffix, or the model is not float32 throughout.
    """
    if Path(file).suffix != ".pt2":
        raise ValueError(f"{file} must end in .pt2, which torch asks of a package")
    # Without these settings a graph is for batches of two and more.
    with ready_for_export(model), kept_whole(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        example, free = torch.zeros(2, *model.input_shape), {0: torch.export.Dim("batch")}
        program = torch.export.export(model, (example,), dynamic_shapes=(free,))
        settings = {"aot_inductor.check_lowerbound": False}
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)
