"""The arguments of this package's CPU kernels, as Python packs them and as C++ reads them."""

import pytest
from headers import check_arguments
from mamba_ssm_vim.ops.norm import cpu as norm
from mamba_ssm_vim.ops.selective_scan import cpu as scan


@pytest.mark.parametrize(("header", "struct", "arguments"), [
    ("scan.h", "ScanArgs", scan.ARGUMENTS), ("scan.h", "ScanGradArgs", scan.GRAD_ARGUMENTS),
    ("norm.h", "NormArgs", norm.ARGUMENTS),
])  # fmt: skip
def test_arguments_have_the_names_of_the_header(header, struct, arguments):
    check_arguments(arguments, f"mamba-1p1p1/csrc/cpu/{header}", struct)
