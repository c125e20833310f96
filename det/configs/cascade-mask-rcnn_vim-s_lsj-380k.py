_base_ = ["./cascade-mask-rcnn_vim-t_lsj-380k.py"]
model = dict(backbone=dict(arch="vim_small_patch16_224"), neck=dict(in_channels=384))
