"""Mamba's language model against transformers' `MambaForCausalLM`: reading a prompt, and generating token by token.

    python benchmarks/generation.py [--cases 130m-fp32 ...] [--threads 1 2] [--rounds 5] [--out output/benchmarks]

Both models have the same random weights and generate the same number of tokens greedily, in turn in one process. The
time of a prompt is that of one new token; the time of a token is the rest of a longer run, divided. Medians over the
rounds. On a GPU this package's model replays a CUDA graph (cg=True). Prints a table and writes generation.csv, in which
rows of other cases, devices and thread counts are kept.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mamba_ssm_vim import MambaLMHeadModel
from mamba_ssm_vim.models.config_mamba import MambaConfig
from rich.console import Console
from rich.table import Table
from tables import device_name, read_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Name: width, layers, vocabulary, batch, prompt, new tokens. mamba-130m as published, and the model in the docs.
SIZES = {
    "characters": (128, 4, 96, 1, 64, 64),
    "small": (384, 8, 8192, 1, 64, 32),
    "130m": (768, 24, 50277, 1, 64, 16),
    "130m-batch8": (768, 24, 50277, 8, 64, 16),
}
CASES = [f"{size}-{dtype}" for size in SIZES for dtype in DTYPES]
FIELDS = (
    "case", "device", "threads", "prompt_ms", "prompt_ms_transformers", "token_ms", "token_ms_transformers",
    "tokens_per_s", "tokens_per_s_transformers", "decode_ratio",
)  # fmt: skip
KEY = ("case", "device", "threads")


def build(case: str, device: str) -> tuple[MambaLMHeadModel, transformers.MambaForCausalLM]:
    """Both models with the same weights."""
    size, _, dtype = case.rpartition("-")
    width, layers, vocabulary = SIZES[size][:3]
    torch.manual_seed(0)
    factory = {"device": device, "dtype": DTYPES[dtype]}
    ours = MambaLMHeadModel(MambaConfig(d_model=width, n_layer=layers, vocab_size=vocabulary), **factory).eval()
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**ours.config.to_transformers()))
    theirs.load_state_dict({n.replace("embedding.", "embeddings."): t for n, t in ours.state_dict().items()})
    return ours, theirs.to(**factory).eval()


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(case: str, device: str, threads: int, rounds: int) -> dict[str, str | int | float]:
    """A row of the table."""
    torch.set_num_threads(threads)
    batch, prompt, new = SIZES[case.rpartition("-")[0]][3:]
    ours, theirs = build(case, device)
    ids = torch.randint(1, 90, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)

    def run_ours(tokens: int) -> None:
        ours.generate(ids, prompt + tokens, cg=True)

    def run_theirs(tokens: int) -> None:
        theirs.generate(
            ids, attention_mask=mask, max_length=prompt + tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    times: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for name, run in (("ours", run_ours), ("theirs", run_theirs)):
            for tokens in (1, 1 + new):
                taken = seconds(lambda run=run, tokens=tokens: run(tokens))
                if number:  # the first round warms up
                    times.setdefault((name, tokens), []).append(taken)
    first, token = {}, {}
    for name in ("ours", "theirs"):
        first[name] = statistics.median(times[name, 1])
        rest = [long - short for short, long in zip(times[name, 1], times[name, 1 + new], strict=True)]
        token[name] = statistics.median(rest) / new
    values = (
        first["ours"] * 1e3, first["theirs"] * 1e3, token["ours"] * 1e3, token["theirs"] * 1e3,
        batch / token["ours"], batch / token["theirs"], token["theirs"] / token["ours"],
    )  # fmt: skip
    return dict(zip(FIELDS, (case, device_name(device), threads, *(float(f"{v:.3g}") for v in values)), strict=True))


def write(rows: list[dict], path: Path) -> None:
    """Write the rows over those of the same case, device and threads."""
    kept = read_rows(path)
    new = {tuple(str(row[k]) for k in KEY) for row in rows}
    kept = [row for row in kept if tuple(row[k] for k in KEY) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows([*kept, *rows])


def show(rows: list[dict]) -> None:
    """Print the rows."""
    table = Table(title="Generation, against transformers")
    for column in ("case", "threads", "prompt ms", "token ms", "tokens/s", "decode"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(
            row["case"], str(row["threads"]), *(f"{row[k]:g} / {row[k + '_transformers']:g}"
            for k in ("prompt_ms", "token_ms", "tokens_per_s")), f"{row['decode_ratio']:g}x",
        )  # fmt: skip
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"), help="folder for generation.csv")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or min(args.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    transformers.logging.set_verbosity_error()
    rows = []
    for case in args.cases:
        for threads in args.threads:
            rows.append(compare(case, args.device, threads, args.rounds))
            write(rows, args.out / "generation.csv")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
