# Three classes of overlapping shapes of scripts/make_shapes.py, learnt on a CPU in minutes: what the tests train, and
# what the demo draws with unless another checkpoint is given.
_base_ = ["./mask-rcnn_vim-t_lsj-184k.py"]
image_size = (96, 96)
max_iters = 400
channels = 64
norm_cfg = dict(type="LN2d")
strides = [4, 8, 16]
model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(arch="vim_nano_patch4_32", img_size=96, patch_size=8, stride=8, out_indices=(5,), drop_path_rate=0.0),
    # The map has stride 8.
    neck=dict(in_channels=64, out_channels=channels, scales=(2, 1, 0.5), num_outs=3),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels, num_convs=1, anchor_generator=dict(scales=[5], strides=strides)
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=strides, finest_scale=28),
        bbox_head=dict(
            type="ConvFCBBoxHead",
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=channels,
            fc_out_channels=128,
            num_classes=3,
            norm_cfg=norm_cfg,
        ),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=strides, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=3, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32), mask_size=28),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)
metainfo = dict(classes=("disc", "square", "triangle"), palette=[(230, 80, 80), (80, 200, 80), (90, 110, 240)])
data_root = "output/shapes/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(s, s), keep_ratio=True) for s in (96, 80, 112)],
            [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        "img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction",
                    ),
                )
            ],
        ],
    ),
]  # fmt: skip
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_validation.json")
test_evaluator = val_evaluator
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    constructor="VimLayerDecayConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=30, end=max_iters, T_max=max_iters - 30, eta_min=1e-5),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters // 2))
log_processor = dict(window_size=10)
