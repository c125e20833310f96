"""One step of the selective scan, for token-by-token inference."""

from mamba_ssm_vim.ops.state_update.op import selective_state_update
from mamba_ssm_vim.ops.state_update.reference import selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]
