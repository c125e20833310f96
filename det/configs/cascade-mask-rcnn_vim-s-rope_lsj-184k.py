# The published variant: two-dimensional rotary embedding of hidden states and residual stream before every block.
_base_ = ["./cascade-mask-rcnn_vim-s_lsj-184k.py"]
model = dict(backbone=dict(if_rope=True, if_rope_residual=True))
