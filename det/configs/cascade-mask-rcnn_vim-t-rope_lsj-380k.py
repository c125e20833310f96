_base_ = ["./cascade-mask-rcnn_vim-t_lsj-380k.py"]
model = dict(backbone=dict(if_rope=True, if_rope_residual=True))
