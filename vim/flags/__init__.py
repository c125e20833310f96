"""Every flag of `main.py`: the one table that yields the parser, the help, the documentation and the checks.

`entry` says what a flag is, `groups` lists them all.
"""

from vim.flags.entry import Flag, pairs
from vim.flags.groups import (
    DATA_SETS,
    FACTORY_PREFIXES,
    GROUPS,
    MAX_IMAGE_PIXELS,
    Augmentation,
    Common,
    Data,
    Flags,
    Model,
    Optimisation,
    Run,
    Schedule,
    defaults,
    flag_table,
    group_of,
    parse_interval,
)

__all__ = [
    "DATA_SETS",
    "FACTORY_PREFIXES",
    "GROUPS",
    "MAX_IMAGE_PIXELS",
    "Augmentation",
    "Common",
    "Data",
    "Flag",
    "Flags",
    "Model",
    "Optimisation",
    "Run",
    "Schedule",
    "defaults",
    "flag_table",
    "group_of",
    "pairs",
    "parse_interval",
]
