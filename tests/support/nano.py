"""Flags of a small model on Fashion-MNIST, and its training state."""

import torch

from vim.engine.arguments import parse_args
from vim.engine.build import build_model, build_training
from vim.engine.distributed import DistributedContext

CONTEXT = DistributedContext(torch.device("cpu"))
NANO = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--data-set", "FMNIST", "--device", "cpu", "--batch-size",
    "64", "--num_workers", "0",
)  # fmt: skip


def parsed(*argv):
    return parse_args([*NANO, *map(str, argv)])


def training(*argv):
    args = parsed(*argv)
    return build_training(build_model(args, 10), args, CONTEXT)
