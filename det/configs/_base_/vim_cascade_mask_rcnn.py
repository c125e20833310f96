# Vim-Ti with Cascade Mask R-CNN in the ViTDet manner: one stride-16 map, a simple pyramid, layer norm in the heads.
_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"]
norm_cfg = dict(type="LN2d")
# The three stages differ in how finely boxes are coded.
box_heads = [
    dict(
        type="Shared4Conv1FCBBoxHead",
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        norm_cfg=norm_cfg,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
        reg_class_agnostic=True,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="VimBackbone",
        arch="vim_tiny_patch16_224",
        img_size=1024,
        out_indices=(23,),
        class_token="remove",
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=192, out_channels=256),
    rpn_head=dict(num_convs=2),
    roi_head=dict(bbox_head=box_heads, mask_head=dict(norm_cfg=norm_cfg)),
)
