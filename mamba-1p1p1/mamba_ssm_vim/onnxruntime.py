"""Where the mixer for ONNX Runtime is: the native CPU kernels as an operator of the domain `vision_mamba`."""

from pathlib import Path

from causal_conv1d_vim.runtime.cpu_library import MISSING, find

import mamba_ssm_vim


def library_path() -> Path:
    """The library for `onnxruntime.SessionOptions.register_custom_ops_library`.

    Raises:
        FileNotFoundError: it was not built.
    """
    file = find("vim_onnxruntime", mamba_ssm_vim.__path__)
    if file is None:
        raise FileNotFoundError(f"the operator for ONNX Runtime is missing: {MISSING}")
    return file
