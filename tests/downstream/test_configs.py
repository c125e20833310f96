"""The published configs: schedules as the paper and the published runs have them, and real steps at full size."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(str(p.relative_to(ROOT)) for task in ("seg", "det") for p in (ROOT / task / "configs").glob("*.py"))


def read(path: str):
    from vim.dense.cli import read_config

    return read_config(path.split("/")[0], str(ROOT / path))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_names_registered_parts(path):
    """Read, its widths agreeing with the backbone's, and all its transforms, data sets and hooks known by name."""
    import timm
    from mmengine.registry import DATASETS, HOOKS, METRICS, PARAM_SCHEDULERS, TRANSFORMS

    cfg = read(path)
    backbone = cfg.model.backbone
    with torch.device("meta"):
        width = timm.create_model(backbone.arch).embed_dim
    neck = cfg.model.get("neck") or {}
    assert neck.get("embed_dim", neck.get("in_channels", width)) == width
    if "decode_head" in cfg.model:
        channels = cfg.model.decode_head.in_channels
        assert channels in (width, [width] * 4)

    def known(registry, part) -> bool:
        with registry.switch_scope_and_registry(cfg.default_scope) as own:
            return own.get(part.type) is not None

    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert known(DATASETS, loader.dataset)
        assert all(known(TRANSFORMS, transform) for transform in loader.dataset.pipeline)
    for scheduler in cfg.param_scheduler:
        assert known(PARAM_SCHEDULERS, scheduler)
        assert scheduler.end <= cfg.train_cfg.max_iters
    assert all(known(HOOKS, hook) for hook in cfg.default_hooks.values())
    assert known(METRICS, cfg.val_evaluator)


def test_segmentation_schedules():
    cfg = read("seg/configs/upernet_vim-s_ade20k-512_60k.py")
    assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size) == (60000, 8)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (2e-4, 0.1)
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.92
    assert [(s.type, s.begin, s.end) for s in cfg.param_scheduler] == [("LinearLR", 0, 1500), ("PolyLR", 1500, 60000)]
    assert cfg.param_scheduler[1].power == 1
    assert cfg.model.backbone.out_indices == (5, 11, 17, 23)
    assert (cfg.model.auxiliary_head.in_index, cfg.model.auxiliary_head.loss_decode.loss_weight) == (2, 0.4)
    assert (cfg.model.test_cfg.crop_size, cfg.model.test_cfg.stride) == ((512, 512), (341, 341))
    paper = read("seg/configs/upernet_vim-t_ade20k-512_160k.py")
    assert (paper.train_cfg.max_iters, paper.param_scheduler[1].end) == (160000, 160000)
    assert (paper.optim_wrapper.optimizer.lr, paper.optim_wrapper.optimizer.weight_decay) == (6e-5, 0.01)


def test_detection_schedules():
    cfg = read("det/configs/cascade-mask-rcnn_vim-t-rope_lsj-184k.py")
    assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size) == (184375, 8)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.1)
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.837
    assert cfg.optim_wrapper.dtype == "float16"
    assert cfg.param_scheduler[0].end == 250
    assert cfg.param_scheduler[1].milestones == [163889, 177546]
    assert cfg.model.backbone.if_rope
    assert cfg.model.backbone.if_rope_residual
    assert cfg.model.backbone.drop_path_rate == 0.1
    jitter = next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomResize")
    assert (jitter.scale, jitter.ratio_range) == ((1024, 1024), (0.1, 2.0))
    paper = read("det/configs/cascade-mask-rcnn_vim-b-rope_lsj-380k.py")
    assert paper.train_cfg.max_iters == paper.param_scheduler[1].end == 380000
    # The steps stand at the same share of the run.
    for step, other in zip(paper.param_scheduler[1].milestones, cfg.param_scheduler[1].milestones, strict=True):
        assert step / 380000 == pytest.approx(other / 184375, abs=1e-5)


# One of each head, with and without rotary embedding and recomputed blocks; other sizes differ in width alone.
FULL_SIZE = {
    "seg/configs/upernet_vim-t_ade20k-512_60k.py": {},
    "det/configs/cascade-mask-rcnn_vim-t-rope_lsj-184k.py": {},
    "det/configs/mask-rcnn_vim-s_lsj-184k.py": {"grad_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("path", FULL_SIZE)
def test_a_step_at_full_resolution(path, published):
    """From a published checkpoint: a loss and its gradients at the training resolution, finite, down to the stem."""
    from mmengine.registry import MODELS

    task = path.split("/")[0]
    cfg = read(path)
    # With one picture, stochastic depth may leave out the very block whose gradient is looked at.
    cfg.model.backbone.update({**FULL_SIZE[path], "drop_path_rate": 0.0})
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(published(cfg.model.backbone.arch))}
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    state = torch.load(cfg.model.backbone.init_cfg.checkpoint, weights_only=False)["model"]
    name = "layers.23.mixer.x_proj_b.weight"
    assert torch.equal(model.backbone.vim.state_dict()[name], state[name])
    side = cfg.model.backbone.img_size
    assert side == (512 if task == "seg" else 1024)
    losses = model.train().loss(*(seg_batch if task == "seg" else det_batch)(side))
    total = sum(v if torch.is_tensor(v) else sum(v) for k, v in losses.items() if re.search("loss", k))
    total.backward()
    assert torch.isfinite(total)
    for part in ("patch_embed.proj.weight", "pos_embed", "layers.0.mixer.A_log", "layers.23.mixer.A_b_log"):
        gradient = dict(model.backbone.vim.named_parameters())[part].grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0, part


def seg_batch(side: int):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    # Batch norm over the pooled 1 × 1 map of UperNet needs two pictures.
    samples = []
    for _ in range(2):
        labels = torch.randint(0, 150, (1, side, side))
        shape = {"img_shape": (side, side), "ori_shape": (side, side), "pad_shape": (side, side)}
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=shape))
    return torch.randn(2, 3, side, side), samples


def det_batch(side: int):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    masks[0, 100:400, 200:300] = masks[1, 50:90, 600:680] = 1
    truth = InstanceData(
        bboxes=torch.tensor([[200.0, 100.0, 300.0, 400.0], [600.0, 50.0, 680.0, 90.0]]),
        labels=torch.tensor([3, 71]),
        masks=BitmapMasks(masks.numpy(), side, side),
    )
    meta = {
        "img_shape": (side, side), "ori_shape": (side, side), "pad_shape": (side, side),
        "batch_input_shape": (side, side), "scale_factor": (1.0, 1.0), "img_id": 0,
    }  # fmt: skip
    sample = DetDataSample(gt_instances=truth, metainfo=meta)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return torch.randn(1, 3, side, side), [sample]
