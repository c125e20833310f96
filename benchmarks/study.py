"""The ablations of arXiv 2401.09417 with a small model on the embedded images, and Vim against DeiT.

    python benchmarks/study.py [--seeds 0 1 2] [--epochs 5] [--device cuda] [--only direction ...] [--out output/study]

Arms of "direction" are the paper's strategies of direction, those of "class-token" its designs of the class token, and
"deit" is a ViT with as many parameters, all trained with the quick start's recipe. Rows are appended to study.csv after
each run, so that a second call continues; study.png shows mean and deviation over the seeds, and accuracy against
epochs and time for Vim and DeiT. At equal time, DeiT and Vim are compared where the faster of them ends.

What it can show: 10,000 images of 28 x 28 pixels, 50 tokens and a quarter of a million parameters. 2,000 test images
leave a deviation of 0.8 points at 85 %, so smaller differences mean nothing, and nothing here says what ImageNet would.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import yaml
from tables import append_rows, read_rows

from vim.analysis.plots import read_log
from vim.engine import run
from vim.errors import UserError, exit_status

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE = Path(__file__).parents[1] / "vim" / "recipes" / "quickstart.yaml"
VIM = "vim_nano_patch4_32"
_NO_DIVISION = {"bimamba_type": "none", "if_divide_out": False}
_POOLED = {"if_cls_token": False, "use_middle_cls_token": False}
# Study: arm: model and its arguments.
STUDIES: dict[str, dict[str, tuple[str, dict]]] = {
    "direction": {
        "one direction": (VIM, {**_NO_DIVISION}),
        "bidirectional layers": (VIM, {**_NO_DIVISION, "if_bidirectional": True, **_POOLED, "final_pool_type": "mean"}),
        "bidirectional SSM": (VIM, {"bimamba_type": "v1", "if_divide_out": False}),
        "bidirectional SSM and convolution": (VIM, {}),
    },
    "class-token": {
        "mean of patches": (VIM, {**_POOLED, "final_pool_type": "mean"}),
        "maximum of logits": (VIM, {**_POOLED, "final_pool_type": "max"}),
        "head": (VIM, {"use_middle_cls_token": False}),
        "both ends": (VIM, {"use_double_cls_token": True}),
        "middle": (VIM, {}),
    },
    "deit": {
        "Vim": (VIM, {}),
        "DeiT": ("deit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 64, "depth": 5, "num_heads": 2}),
    },
}
COLUMNS = ("study", "arm", "seed", "epochs", "epoch", "top1", "train_s")


def train(model: str, options: dict, seed: int, args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """One run; its epochs with top-1 in percent and the seconds of training so far."""
    flags = ["--config", str(RECIPE), "--model", model, "--seed", str(seed), "--epochs", str(args.epochs)]
    flags += ["--device", args.device, "--output-dir", str(folder), *args.flags]
    if options:
        flags += ["--model-kwargs", *(f"{key}={yaml.safe_dump(value).split()[0]}" for key, value in options.items())]
    run.run(flags)
    seconds, epochs = 0.0, []
    for record in read_log(folder / "log.txt"):
        seconds += record["train_s"]
        epochs.append({"epoch": record["epoch"] + 1, "top1": record["test_acc1"], "train_s": seconds})
    return epochs


def model_of(study: str, arm: str) -> str:
    """Model and arguments of an arm as text."""
    model, options = STUDIES[study][arm]
    return f"{model} {sorted(options.items())}"


def runs_by_model(rows: list[dict[str, str]]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Epochs by model and seed: the published model is an arm of each study, and need be trained only once."""
    runs: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        epoch = {"epoch": int(row["epoch"]), "top1": float(row["top1"]), "train_s": float(row["train_s"])}
        runs.setdefault((model_of(row["study"], row["arm"]), row["seed"]), {})[int(row["epoch"])] = epoch
    return {key: list(epochs.values()) for key, epochs in runs.items()}


def last_epochs(rows: list[dict[str, str]], study: str) -> dict[str, list[float]]:
    """Top-1 after the last epoch of each seed, by arm."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["study"] == study and row["epoch"] == row["epochs"]:
            found.setdefault(row["arm"], []).append(float(row["top1"]))
    return found


def at_equal_time(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """Top-1 of Vim and DeiT, for each seed the last one reached in the time that the faster of them took."""
    found: dict[str, list[float]] = {}
    for seed in sorted({row["seed"] for row in rows if row["study"] == "deit"}):
        arms = {
            arm: [row for row in rows if (row["study"], row["arm"], row["seed"]) == ("deit", arm, seed)]
            for arm in STUDIES["deit"]
        }
        if not all(arms.values()):
            continue
        limit = min(max(float(row["train_s"]) for row in epochs) for epochs in arms.values())
        for arm, epochs in arms.items():
            reached = [float(row["top1"]) for row in epochs if float(row["train_s"]) <= limit]
            found.setdefault(arm, []).append(reached[-1] if reached else 0.0)
    return found


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """A panel for each study, and Vim against DeiT by epochs and by time."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, study in zip(axes[0], ("direction", "class-token"), strict=True):
        for place, (arm, values) in enumerate(last_epochs(rows, study).items()):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.barh(place, statistics.mean(values), xerr=deviation, color=f"C{place}", alpha=0.7)
            axis.text(1, place, f"{arm}: {statistics.mean(values):.1f} ± {deviation:.1f} ({len(values)})", va="center")
        axis.set(title=study, xlabel="top-1 (%)", yticks=[], xlim=(0, 100))
    for axis, column, label in zip(axes[1], ("epoch", "train_s"), ("epoch", "training time (s)"), strict=True):
        for k, arm in enumerate(STUDIES["deit"]):
            chosen = [row for row in rows if row["study"] == "deit" and row["arm"] == arm]
            for n, seed in enumerate(sorted({row["seed"] for row in chosen})):
                points = [(float(r[column]), float(r["top1"])) for r in chosen if r["seed"] == seed]
                axis.plot(*zip(*points, strict=True), f"C{k}.-", label=None if n else arm, alpha=0.7)
        axis.set(xlabel=label, ylabel="top-1 (%)", title="Vim and a DeiT of its size")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def say(rows: list[dict[str, str]], studies: list[str]) -> None:
    """Mean and deviation of each arm."""
    tables = {study: last_epochs(rows, study) for study in studies}
    if "deit" in studies:
        tables["deit, at equal time"] = at_equal_time(rows)
    for study, arms in tables.items():
        for arm, values in arms.items():
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(f"{study}: {arm}: {statistics.mean(values):.2f}{deviation} % ({len(values)} seeds)")


def study(args: argparse.Namespace) -> None:
    if args.epochs < 1:
        raise UserError(f"--epochs is {args.epochs}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "study.csv"
    if any(row["epochs"] != str(args.epochs) for row in read_rows(path)):
        raise UserError(f"{path} holds runs of another number of epochs: choose another --out")
    done = {(row["study"], row["arm"], row["seed"]) for row in read_rows(path)}
    known = runs_by_model(read_rows(path))
    for seed in args.seeds:
        for name in args.only:
            for arm, (model, options) in STUDIES[name].items():
                if (name, arm, str(seed)) in done or (args.arms and arm not in args.arms):
                    continue
                print(f"== {name}, {arm}, seed {seed}", flush=True)
                key = (model_of(name, arm), str(seed))
                if key not in known:
                    folder = args.out / f"{name}-{arm.replace(' ', '-')}-{seed}"
                    known[key] = train(model, options, seed, args, folder)
                epochs = known[key]
                row = {"study": name, "arm": arm, "seed": seed, "epochs": args.epochs}
                append_rows(path, COLUMNS, [row | epoch for epoch in epochs])
                draw(read_rows(path), path.with_suffix(".png"))
    say(read_rows(path), args.only)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="studies")
    parser.add_argument("--arms", nargs="+", help="arms, by name; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, default=Path("output/study"), help="folder of CSV, PNG and runs")
    args, args.flags = parser.parse_known_args(argv)  # what else is there are flags of main.py
    return exit_status(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
