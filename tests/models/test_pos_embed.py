"""Position embeddings on another grid, by value: class rows untouched where they are, patches antialiased bicubic."""

import pytest
import timm
import torch

import vim
from vim.models import load_into
from vim.models.layout import special_positions, split_tokens, token_layout
from vim.models.pos_embed import resample_pos_embed

CLASS_TOKENS = {
    "none": {"if_cls_token": False, "final_pool_type": "mean"},
    "head": {"if_cls_token": True},
    "middle": {"if_cls_token": True, "use_middle_cls_token": True},
    "double": {"if_cls_token": True, "use_double_cls_token": True},
}
# Name: image size and stride of the fine-tuned model, and its grid; the source has 224 × 224 and stride 16: 14 × 14.
TARGETS = {
    "stride 8": ((224, 224), 8, (27, 27)),
    "384": ((384, 384), 16, (24, 24)),
    "224x448": ((224, 448), 16, (14, 28)),
    "448x224": ((448, 224), 16, (28, 14)),
    "unchanged": ((224, 224), 16, (14, 14)),
    "unchanged grid": ((231, 239), 16, (14, 14)),
}


def plane(grid: tuple[int, int]) -> torch.Tensor:
    """(1, rows * columns, 3): the places of the patches' centres, down and right in [0, 1], and a quadratic of them.

    Antialiased bicubic interpolation reproduces quadratics exactly, except where its kernel reaches over the border.
    """
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    down, right = (t.flatten() for t in torch.meshgrid(rows, columns, indexing="ij"))
    return torch.stack([down, right, down * right - right**2], dim=-1)[None]


def inner(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What no kernel over the border has touched: two source patches in from each side."""
    margins = [-(-2 * n // 14) + 1 for n in grid]
    return tokens.unflatten(1, grid)[:, margins[0] : -margins[0], margins[1] : -margins[1]]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("class_token", CLASS_TOKENS)
def test_fine_tuning_keeps_class_rows_and_places(class_token: str, target: str) -> None:
    """What `--finetune` does: a checkpoint of 224 at stride 16 into a model of another grid."""
    img_size, stride, grid = TARGETS[target]
    kind = {"depth": 1, "embed_dim": 3, "bimamba_type": "v2", "if_abs_pos_embed": True, **CLASS_TOKENS[class_token]}
    source = vim.VisionMamba(img_size=224, stride=16, **kind)
    positions = special_positions(class_token, 0, 196)
    with torch.no_grad():
        mask = torch.ones(source.pos_embed.shape[1], dtype=torch.bool)
        mask[positions] = False
        source.pos_embed[:, mask] = plane((14, 14))
        for k, position in enumerate(positions):
            source.pos_embed[:, position] = 100.0 + k
    model = vim.VisionMamba(img_size=img_size, stride=stride, **kind)
    load_into(model, source.state_dict())
    assert model.pos_embed.shape == (1, grid[0] * grid[1] + len(positions), 3)
    class_rows, patches = split_tokens(model.pos_embed, token_layout(class_token, 0, grid, 1))
    assert class_rows.flatten().tolist() == [100.0 + k for k in range(len(positions)) for _ in range(3)]
    if grid == (14, 14):
        assert torch.equal(model.pos_embed, source.pos_embed)
    # Float32 sums of at most 36 products of values up to 1.
    torch.testing.assert_close(inner(patches, grid), inner(plane(grid), grid), rtol=0, atol=1e-5)
    assert patches.abs().max() < 2, "a class row leaked into the patches"


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
def test_set_input_size_and_dynamic_size_are_the_same_resampling(class_token: str) -> None:
    torch.manual_seed(0)
    kind = {
        "img_size": 32, "patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 16, "bimamba_type": "v2",
        "if_abs_pos_embed": True, **CLASS_TOKENS[class_token],
    }  # fmt: skip
    model = vim.VisionMamba(**kind, dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 20, 44)
    expected = model(images)
    expected_pos_embed = resample_pos_embed(model.pos_embed.detach(), (5, 11), class_token=class_token)
    model.set_input_size((20, 44))
    assert torch.equal(model.pos_embed, expected_pos_embed)
    torch.testing.assert_close(model(images), expected)
    # From a rectangle to another, which needs the old grid: its number of rows is no square.
    model.set_input_size((44, 20))
    assert model.pos_embed.shape[1] == 55 + model.num_prefix_tokens


def test_down_sampling_is_antialiased() -> None:
    """Without antialiasing a checkerboard would come out as one of its colours; with it, as their mean."""
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().reshape(1, 256, 1)
    small = resample_pos_embed(board, (4, 4), class_token="none")
    torch.testing.assert_close(small, torch.full((1, 16, 1), 0.5), rtol=0, atol=0.02)


def test_class_rows_can_be_dropped_but_not_invented() -> None:
    pos_embed = torch.randn(1, 197, 4)
    dropped = resample_pos_embed(pos_embed, (14, 14), class_token="middle", new_class_token="none")
    assert torch.equal(dropped, torch.cat([pos_embed[:, :98], pos_embed[:, 99:]], dim=1))
    moved = resample_pos_embed(pos_embed, (14, 14), class_token="middle", new_class_token="head")
    assert torch.equal(moved, torch.cat([pos_embed[:, 98:99], dropped], dim=1))
    with pytest.raises(ValueError, match="double needs 2"):
        resample_pos_embed(pos_embed, (14, 14), class_token="middle", new_class_token="double")
    with pytest.raises(ValueError, match="do not form a square"):
        resample_pos_embed(pos_embed, (14, 14), class_token="none")
    with pytest.raises(ValueError, match="do not fit a grid"):
        resample_pos_embed(pos_embed, (14, 14), class_token="middle", old_grid=(12, 14))


@pytest.mark.parametrize("name", [n for n in timm.list_models("vim_*") if "stride8" in n])
def test_published_fine_tuning(name: str) -> None:
    """The published pair of models: the class row moves from 98 to 364."""
    source = timm.create_model(name.replace("_stride8", ""), depth=1)
    model = timm.create_model(name, depth=1)
    load_into(model, source.state_dict())
    assert model.patch_embed.grid_size == (27, 27)
    assert torch.equal(model.pos_embed[:, 364], source.pos_embed[:, 98])


def test_rotary_tables_of_any_grid() -> None:
    """Two-dimensional rotary: a table's first half depends on the row alone, the rest on the column, and any grid spans
    the side of training."""
    kind = {"patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 32, "if_rope": True, "if_rope_residual": True}
    model = vim.VisionMamba(img_size=32, final_pool_type="mean", num_classes=3, dynamic_img_size=True, **kind).eval()
    images = torch.randn(1, 3, 16, 40)
    expected = model(images)
    model.set_input_size((16, 40))
    torch.testing.assert_close(model(images), expected)
    cos = model.rope.freqs_cos.unflatten(0, (4, 10))
    assert torch.equal(cos[:, :1, :16].expand(-1, 10, -1), cos[:, :, :16])
    assert torch.equal(cos[:1, :, 16:].expand(4, -1, -1), cos[:, :, 16:])
    # Row 2 of 4 lies where row 7 of the 14 of training does; the first frequency is 1.
    torch.testing.assert_close(cos[2, 0, 0], torch.tensor(7.0).cos())
    assert not torch.equal(model(images), model(images.flip(3)))
