"""Train a small Mamba language model on the characters of Python's own documentation, and show what it learned.

    python scripts/train_language_model.py [--seconds 120] [--assets assets] [--document docs/language-model.md]

The text is `pydoc_data.topics`, which comes with Python: the help on its statements and types, in English. The last
tenth is held out. Writes language-model.png (the loss) and puts the figures and a drawn text into the document, between
the lines `<!-- training -->` and `<!-- end of training -->`.
"""

import argparse
import math
import platform
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import torch
import torch.nn.functional as F
from mamba_ssm_vim import MambaLMHeadModel
from mamba_ssm_vim.models.config_mamba import MambaConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- training -->", "<!-- end of training -->"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
BATCH, LENGTH, RATE, WARMUP = 8, 160, 6e-3, 0.05
PROMPT = "The "


def encode(text: str) -> torch.Tensor:
    """Character numbers (L,); those that the vocabulary lacks are left out."""
    return torch.tensor([CHARACTERS.index(c) for c in text if c in CHARACTERS])


def held_out_loss(model: MambaLMHeadModel, text: torch.Tensor, windows: int = 16) -> float:
    """Mean nats per character over windows that are spread over the held-out text."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, windows).long()
    batch = torch.stack([text[s : s + LENGTH + 1] for s in starts])
    with torch.no_grad():
        return F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).item()


def train(seconds: float, seed: int = 0) -> tuple[MambaLMHeadModel, list[tuple[float, float, float]], int]:
    """A trained model, (seconds, loss of the step, held-out loss) at intervals, and the number of steps.

    The learning rate rises over the first twentieth of the time and falls to zero at its end.
    """
    torch.manual_seed(seed)
    text = encode("\n\n".join(topics[name] for name in sorted(topics)))
    training, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = MambaLMHeadModel(MambaConfig(d_model=128, n_layer=4, vocab_size=len(CHARACTERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    curve, recent, steps, used, next_note = [], [], 0, 0.0, 0.0
    while used < seconds:
        started = time.perf_counter()
        part = used / seconds
        factor = min(1.0, (part + 1e-3) / WARMUP, (1.0 + math.cos(math.pi * part)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        starts = torch.randint(len(training) - LENGTH, (BATCH,))
        batch = torch.stack([training[s : s + LENGTH + 1] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        recent.append(loss.item())
        used += time.perf_counter() - started
        if used >= next_note or used >= seconds:  # not counted as training time
            curve.append((used, sum(recent) / len(recent), held_out_loss(model, held_out)))
            print(f"{used:6.1f} s  step {steps:5d}  loss {curve[-1][1]:.3f}  held out {curve[-1][2]:.3f}", flush=True)
            recent, next_note = [], used + seconds / 24
    return model.eval(), curve, steps


def draw_text(model: MambaLMHeadModel, length: int = 400, seed: int = 1) -> str:
    """`PROMPT`, continued by drawing from the model."""
    torch.manual_seed(seed)
    prompt = encode(PROMPT)[None]
    drawn = model.generate(prompt, length, top_k=0, top_p=0.9, temperature=0.8, vocab_size=len(CHARACTERS))
    text = "".join(CHARACTERS[i] for i in drawn[0].tolist())
    return "\n".join(line.rstrip() for line in text.replace("`", "'").splitlines())


def plot(curve: list[tuple[float, float, float]], path: Path) -> None:
    """Both losses against the time of training."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    seconds, losses, held_out = zip(*curve, strict=True)
    axes.plot(seconds, losses, label="training")
    axes.plot(seconds, held_out, label="held out")
    axes.set(xlabel="seconds of training", ylabel="nats per character", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(model: MambaLMHeadModel, curve: list[tuple[float, float, float]], steps: int, picture: str) -> str:
    """The section of the document."""
    parameters = sum(p.numel() for p in model.parameters())
    text = draw_text(model)
    size, threads = model.config, torch.get_num_threads()
    return f"""{BEGIN}
A model of {size.n_layer} blocks of width {size.d_model} ({parameters:,} parameters) saw {steps:,} batches of
{BATCH} × {LENGTH} characters in {curve[-1][0]:.0f} seconds on {threads} thread{"s" * (threads > 1)} of a CPU
({cpu_name()}). Its loss on the held-out text went from {curve[0][2]:.2f} to {curve[-1][2]:.2f} nats per character.

![Loss against the time of training]({picture})

It continues "{PROMPT.strip()}" like this (top-p 0.9, temperature 0.8):

```text
{text}
```
{END}"""


def main() -> int:
    """Train, then write the picture and the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="time of training")
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="folder for the picture")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/language-model.md", help="document to update")
    args = parser.parse_args()
    page = args.document.read_text() if args.document.is_file() else ""
    if BEGIN not in page or END not in page:
        print(f"error: {args.document} has no lines {BEGIN} and {END} to write between", file=sys.stderr)
        return 2
    model, curve, steps = train(args.seconds)
    picture = args.assets / "language-model.png"
    plot(curve, picture)
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    section = describe(model, curve, steps, f"../{args.assets.name}/{picture.name}")
    args.document.write_text(before + section + after)
    print(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
