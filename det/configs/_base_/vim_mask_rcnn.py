# Vim-Ti with Mask R-CNN in the ViTDet manner: one stride-16 map, a simple feature pyramid, layer norm in the heads.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]
norm_cfg = dict(type="LN2d")
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
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
