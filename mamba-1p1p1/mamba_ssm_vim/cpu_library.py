"""The native CPU library of this package, loaded once for all of its operators."""

from causal_conv1d_vim.runtime.cpu_library import Library

import mamba_ssm_vim

library = Library("vim_mamba", mamba_ssm_vim.__path__)
