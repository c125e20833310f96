_base_ = ["./upernet_vim-t_ade20k-512_160k.py"]
model = dict(
    backbone=dict(arch="vim_small_patch16_224"),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
