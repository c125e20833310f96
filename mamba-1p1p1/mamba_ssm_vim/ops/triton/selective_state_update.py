"""One step of the selective scan under the published import path."""

from mamba_ssm_vim.ops.state_update import selective_state_update, selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]
