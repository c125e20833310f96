# Four classes (background and three coloured shapes) of scripts/make_shapes.py, learnt on a CPU in minutes: what the
# tests train, and what the demo draws with unless another checkpoint is given.
_base_ = ["./_base_/vim_upernet.py", "./_base_/schedule_60k.py"]
crop_size = (64, 64)
max_iters = 300
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size, test_cfg=dict(size_divisor=8)),
    backbone=dict(arch="vim_nano_patch4_32", img_size=64, patch_size=8, stride=8, out_indices=(1, 2, 3, 5)),
    neck=dict(embed_dim=64, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[64] * 4, channels=32, num_classes=4, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=4, norm_cfg=norm_cfg),
    test_cfg=dict(crop_size=crop_size, stride=(43, 43)),
)
classes = dict(
    classes=("background", "disc", "square", "triangle"),
    palette=[[40, 40, 40], [230, 80, 80], [80, 200, 80], [90, 110, 240]],
)
data_root = "output/shapes"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        metainfo=classes,
        pipeline=train_pipeline,
        reduce_zero_label=True,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        metainfo=classes,
        pipeline=test_pipeline,
        reduce_zero_label=True,
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(layer_decay_rate=0.95)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=max_iters // 2, save_best=None, max_keep_ckpts=3)
)
log_processor = dict(window_size=10)
