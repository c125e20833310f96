"""Selective scan of Mamba-1."""

from mamba_ssm_vim.ops.selective_scan.op import backends, selective_scan
from mamba_ssm_vim.ops.selective_scan.reference import selective_scan_ref

__all__ = ["backends", "selective_scan", "selective_scan_ref"]
