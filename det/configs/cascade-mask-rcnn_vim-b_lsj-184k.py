_base_ = ["./cascade-mask-rcnn_vim-t_lsj-184k.py"]
model = dict(backbone=dict(arch="vim_base_patch16_224"), neck=dict(in_channels=768))
