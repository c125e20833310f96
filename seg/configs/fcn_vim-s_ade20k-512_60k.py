_base_ = ["./fcn_vim-t_ade20k-512_60k.py"]
model = dict(backbone=dict(arch="vim_small_patch16_224"), decode_head=dict(in_channels=384))
