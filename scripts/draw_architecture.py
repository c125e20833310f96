"""Draw the pictures of README.md and docs/architecture.md: python scripts/draw_architecture.py [FOLDER]

Writes architecture-{model,packages,image,gradient}.svg and .png to FOLDER, by default assets/.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

mpl.use("Agg")
# The same file from the same script: no date, no random ids.
mpl.rcParams.update({"svg.hashsalt": "vision-mamba", "svg.fonttype": "none", "font.family": "DejaVu Sans"})

PLAIN, KERNEL, TORCH, KEPT = "#f3f4f6", "#dbeafe", "#fef3c7", "#dcfce7"


def canvas(width: float, height: float) -> Axes:
    """An empty page of so many inches, with coordinates in inches and y pointing down."""
    axes = plt.figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def box(
    axes: Axes, x: float, y: float, text: str, colour: str = PLAIN, width: float = 2.4, height: float = 0.5
) -> None:
    """A box around text, centred at (x, y)."""
    corner = (x - width / 2 + 0.06, y - height / 2 + 0.06)
    shape = FancyBboxPatch(
        corner, width - 0.12, height - 0.12, boxstyle="round,pad=0.06", facecolor=colour, edgecolor="#6b7280"
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", side: float = 0.08) -> None:
    """An arrow, with text beside its middle."""
    style = {"arrowstyle": "-|>", "color": "#374151", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x + side, y, text, ha="left" if side > 0 else "right", va="center", fontsize=7.5, color="#374151")


def note(axes: Axes, x: float, y: float, text: str, align: str = "left") -> None:
    axes.text(x, y, text, ha=align, va="center", fontsize=7.5, color="#374151")


def chain(
    axes: Axes, x: float, top: float, steps: list[tuple[str, str, str]], gap: float = 0.82, **size: float
) -> float:
    """Boxes below each other with arrows between them; each step is (text, colour, what its arrow carries)."""
    y = top
    for k, (text, colour, carried) in enumerate(steps):
        box(axes, x, y, text, colour, **size)
        if k + 1 < len(steps):
            arrow(axes, (x, y + 0.25), (x, y + gap - 0.25), carried)
            y += gap
    return y


def legend(axes: Axes, x: float, y: float, entries: list[tuple[str, str]]) -> None:
    for k, (colour, text) in enumerate(entries):
        box(axes, x, y + 0.3 * k, "", colour, width=0.3, height=0.2)
        note(axes, x + 0.25, y + 0.3 * k, text)


def tokens(axes: Axes, y: float, colours: list[str], labels: list[str]) -> list[float]:
    """A row of square tokens on the page's left part; gives their places."""
    places = [0.75 + 0.38 * k for k in range(len(colours))]
    for x, colour, label in zip(places, colours, labels, strict=True):
        axes.add_patch(Rectangle((x - 0.17, y - 0.17), 0.34, 0.34, facecolor=colour, edgecolor="#6b7280"))
        axes.text(x, y, label, ha="center", va="center", fontsize=8)
    return places


def model() -> Axes:
    """The model as papers draw it: patches, the class token in their middle, a block with both directions."""
    axes = canvas(10.0, 5.6)
    shades = [plt.get_cmap("viridis")(0.15 + 0.09 * k, alpha=0.55) for k in range(9)]
    note(axes, 1.1, 0.3, "image in patches", "center")
    for k, shade in enumerate(shades):
        corner = (0.5 + 0.42 * (k % 3), 0.5 + 0.42 * (k // 3))
        axes.add_patch(Rectangle(corner, 0.38, 0.38, facecolor=shade, edgecolor="white"))
        axes.text(corner[0] + 0.19, corner[1] + 0.19, str(k + 1), ha="center", va="center", fontsize=8)
    box(axes, 3.6, 1.1, "patch embedding:\nlinear projection", TORCH, width=1.9, height=0.6)
    arrow(axes, (1.85, 1.1), (2.68, 1.1))
    colours = [*shades[:4], "#fca5a5", *shades[4:]]
    labels = ["1", "2", "3", "4", "cls", "5", "6", "7", "8", "9"]
    arrow(axes, (3.6, 1.4), (3.6, 2.0))
    note(axes, 0.56, 1.98, "class token in the middle, + position embedding")
    places = tokens(axes, 2.4, colours, labels)
    middle = places[4]
    box(axes, middle, 3.3, "Vim block, L times", KERNEL, width=3.6)
    arrow(axes, (middle, 2.6), (middle, 3.05))
    arrow(axes, (middle, 3.55), (middle, 3.95))
    tokens(axes, 4.2, colours, labels)
    box(axes, middle, 5.1, "norm, linear head: class scores", TORCH, width=3.0)
    arrow(axes, (middle, 4.4), (middle, 4.85), "class token only")
    axes.plot([middle + 1.78, 5.75], [3.1, 0.45], color="#9ca3af", linestyle=":")
    axes.plot([middle + 1.78, 5.75], [3.5, 5.4], color="#9ca3af", linestyle=":")
    block(axes)
    return axes


def block(axes: Axes) -> None:
    """The right half of the picture of the model."""
    frame = {"boxstyle": "round,pad=0.05", "facecolor": "none", "edgecolor": "#9ca3af", "linestyle": ":"}
    axes.add_patch(FancyBboxPatch((5.75, 0.45), 4.0, 4.95, **frame))
    note(axes, 7.75, 0.25, "Vim block", "center")
    arrow(axes, (7.6, 0.5), (7.6, 0.75))
    box(axes, 7.6, 0.95, "norm", KERNEL, width=1.2, height=0.4)
    for x, name in ((6.9, "linear: x"), (8.6, "linear: z")):
        box(axes, x, 1.6, name, TORCH, width=1.2, height=0.4)
        arrow(axes, (7.6, 1.15), (x, 1.4))
    for x, conv, scan in ((6.4, "conv 1d →", "SSM →"), (7.7, "← conv 1d", "← SSM")):
        arrow(axes, (6.9, 1.8), (x, 2.1))
        box(axes, x, 2.3, conv, KERNEL, width=1.15, height=0.4)
        arrow(axes, (x, 2.5), (x, 2.8))
        box(axes, x, 3.0, scan, KERNEL, width=1.15, height=0.4)
        arrow(axes, (x, 3.2), (x, 3.55))
        axes.text(x, 3.68, "×", ha="center", va="center", fontsize=13)
        arrow(axes, (x, 3.8), (7.05 + 0.12 * (1 if x > 7 else -1), 4.12))
    box(axes, 8.8, 2.3, "SiLU", TORCH, width=1.0, height=0.4)
    arrow(axes, (8.8, 1.8), (8.8, 2.1))
    axes.plot([8.8, 8.8], [2.5, 3.68], color="#374151", lw=1)
    arrow(axes, (8.8, 3.68), (7.85, 3.68))
    arrow(axes, (7.55, 3.68), (6.55, 3.68))
    axes.text(7.05, 4.22, "+", ha="center", va="center", fontsize=13)
    arrow(axes, (7.05, 4.32), (7.05, 4.55))
    box(axes, 7.05, 4.75, "linear", TORCH, width=1.2, height=0.4)
    arrow(axes, (7.65, 4.75), (9.25, 4.75))
    axes.text(9.4, 4.75, "+", ha="center", va="center", fontsize=13)
    axes.plot([7.6, 9.4, 9.4], [0.55, 0.55, 4.5], color="#374151", lw=1)
    arrow(axes, (9.4, 4.4), (9.4, 4.62))
    arrow(axes, (9.4, 4.88), (9.4, 5.25))
    note(axes, 9.3, 2.9, "residual", "right")


def packages() -> Axes:
    """Who depends on whom."""
    axes = canvas(8.2, 4.9)
    box(axes, 2.6, 0.45, "det/\nmmdetection", width=1.9, height=0.6)
    box(axes, 5.6, 0.45, "seg/\nmmsegmentation", width=1.9, height=0.6)
    rows = [
        (1.6, "vim", "models · data · engine (training) · analysis · dense (for det and seg)", PLAIN),
        (2.6, "mamba_ssm_vim", "selective_scan · norm · mixer · state_update · the Mamba module", KERNEL),
        (3.6, "causal_conv1d_vim", "conv · runtime: choice of backend, registration, libraries, checks", KERNEL),
    ]
    for y, name, content, colour in rows:
        box(axes, 4.1, y, f"{name}\n{content}", colour, width=6.6, height=0.62)
    box(axes, 4.1, 4.5, "torch", TORCH, width=6.6, height=0.4)
    for x, end in ((2.6, 1.29), (5.6, 1.29)):
        arrow(axes, (x, 0.75), (x, end))
    for start, end in ((1.91, 2.29), (2.91, 3.29), (3.91, 4.3)):
        arrow(axes, (4.1, start), (4.1, end))
    note(axes, 4.25, 1.02, "imports")
    return axes


def image() -> Axes:
    """From an image to class scores, and the inside of a block."""
    axes = canvas(9.6, 7.6)
    note(axes, 2.0, 0.25, "B images, M patches, L tokens, D model width", "center")
    end = chain(
        axes,
        2.0,
        0.75,
        [
            ("image", PLAIN, "(B, 3, H, W)"),
            ("patch embedding: convolution", TORCH, "(B, M, D)"),
            ("class token inserted at M // 2", PLAIN, "(B, L, D)"),
            ("+ position embedding", PLAIN, "(B, L, D)"),
            ("24 blocks", KERNEL, "2 × (B, L, D)"),
            ("add + RMS norm", KERNEL, "(B, L, D)"),
            ("token at M // 2", PLAIN, "(B, D)"),
            ("head: linear", TORCH, "(B, classes)"),
        ],
    )
    note(axes, 2.0, end + 0.5, "class scores", "center")
    arrow(axes, (2.0, end + 0.25), (2.0, end + 0.42))
    axes.plot([3.2, 4.25], [4.03 - 0.25, 0.5], color="#9ca3af", linestyle=":")
    axes.plot([3.2, 4.25], [4.03 + 0.25, 7.35], color="#9ca3af", linestyle=":")
    note(axes, 6.85, 0.25, "one block: E = 2D channels, N states, R rank of the step", "center")
    chain(
        axes, 6.85, 0.75,
        [("add + RMS norm\n(residual stays float32)", KERNEL, "(B, L, D)"), ("in_proj: linear", TORCH, "")],
    )  # fmt: skip
    note(axes, 7.75, 1.95, "xz (B, L, 2E)")
    for x, direction in ((5.65, "first → last token"), (8.05, "last → first token")):
        arrow(axes, (6.85, 1.82), (x, 2.27))
        chain(
            axes, x, 2.52,
            [
                ("convolution, SiLU", KERNEL, "u (B, L, E)"),
                ("x_proj: linear", TORCH, "dt | B | C   (R + 2N)"),
                ("dt_proj, softplus", KERNEL, "step (B, L, E)"),
                ("scan, + D u,\ngate SiLU(z)", KERNEL, ""),
            ],
            gap=0.86, width=2.0,
        )  # fmt: skip
        note(axes, x, 5.5, direction, "center")
        arrow(axes, (x, 5.6), (6.85, 6.02))
    box(axes, 6.85, 6.27, "sum, halved", KERNEL)
    arrow(axes, (6.85, 6.52), (6.85, 6.8), "(B, L, E)")
    box(axes, 6.85, 7.05, "out_proj: linear", TORCH)
    legend(axes, 0.4, 7.05, [(KERNEL, "own kernels"), (TORCH, "torch")])
    return axes


def gradient() -> Axes:
    """The backward pass of one mixer, with what is kept and what is recomputed."""
    axes = canvas(10.2, 6.4)
    note(axes, 2.0, 0.25, "kept by the forward pass", "center")
    for y, text in (
        (0.75, "xz, the parameters"),
        (1.6, "dt | B | C of both directions\n(R + 2N per token)"),
        (2.45, "scan states before every\n32nd token"),
    ):
        box(axes, 2.0, y, text, KEPT, width=2.8, height=0.56)
    note(axes, 2.0, 3.3, "recomputed from them", "center")
    for y, text in (
        (3.8, "u: convolution and SiLU\n(for the scan and for x_proj's weight)"),
        (4.65, "step: dt_proj and softplus\n(inside the scan)"),
        (5.5, "states and decays of one chunk\n(inside the scan)"),
    ):
        box(axes, 2.0, y, text, KERNEL, width=2.8, height=0.56)
    note(axes, 6.4, 0.25, "for each direction, the second adds to what the first wrote", "center")
    chain(
        axes, 6.4, 0.75,
        [
            ("out_proj", TORCH, "dout (B, L, E)"),
            ("scan backward, chunks from the last to the first", KERNEL, "du, d(dt), dB, dC"),
            ("dt_proj and x_proj, transposed", TORCH, "added to du"),
            ("convolution backward", KERNEL, "dx, beside dz of the scan: dxz (B, L, 2E)"),
            ("in_proj", TORCH, "(B, L, D)"),
            ("add + RMS norm backward", KERNEL, "gradient of the residual, float32"),
            ("the block before", PLAIN, ""),
        ],
        gap=0.88, width=3.9,
    )  # fmt: skip
    for y, text in (
        (0.75, "weight"), (1.63, "A, D, step's bias"), (2.51, "weights"), (3.39, "weight, bias"), (4.27, "weight"),
        (5.15, "weight"),
    ):  # fmt: skip
        note(axes, 8.45, y, text)
    note(axes, 8.45, 0.45, "their gradients too:")
    return axes


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (model, packages, image, gradient):
        figure = draw().figure
        figure.savefig(folder / f"architecture-{draw.__name__}.svg", metadata={"Date": None})
        figure.savefig(folder / f"architecture-{draw.__name__}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets")
