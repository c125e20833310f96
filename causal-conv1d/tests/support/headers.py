"""The C structs of the sources, to be compared with what Python passes."""

import re
from pathlib import Path

from causal_conv1d_vim.runtime.cpu_library import Arguments

ROOT = Path(__file__).parents[3]


def _fields(header: str, struct: str, tokens: tuple[str, ...]) -> list[tuple[str, bool]]:
    """(name, whether a double) of each eight-byte field of a C struct, in order, nested structs flattened."""
    source = re.sub(r"//.*", "", (ROOT / header).read_text())
    body = re.search(rf"struct {struct} {{(.*?)}};", source, flags=re.DOTALL)[1]
    fields = []
    for kind, names in re.findall(r"(?:const )?(\w+) ([^;]+);", body):
        for name in (n.strip(" *") for n in names.split(",")):
            if kind == "Tokens":
                fields += [(f"{name}.{part}", False) for part in tokens]
            elif kind.endswith("Args"):
                fields += _fields(header, kind, tokens)
            else:
                fields.append((name, kind == "double" and "*" not in names))
    return fields


def check_arguments(arguments: Arguments, header: str, struct: str) -> None:
    """Fail unless the fields of `arguments` have names, order and kinds of a struct in a header below the root."""
    tokens = tuple(name for name, _ in _fields("causal-conv1d/csrc/common/tokens.h", "Tokens", ()))
    assert tokens == Arguments.TOKENS
    fields = _fields(header, struct, tokens)
    assert [name for name, _ in fields] == list(arguments.fields)
    assert {name for name, double in fields if double} == {n for n in arguments.fields if n in ("scale", "eps")}
