# A plain head: two convolutions on the last map, no other scales and no auxiliary loss.
_base_ = ["./upernet_vim-s_ade20k-512_60k.py"]
model = dict(
    backbone=dict(out_indices=(23,)),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=384,
        in_index=0,
        channels=256,
        num_convs=2,
        concat_input=True,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
