# The paper's text: 380,000 iterations; the steps keep their places in the run.
_base_ = ["./cascade-mask-rcnn_vim-t_lsj-184k.py"]
max_iters = 380000
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[337778, 365926], gamma=0.1),
]
train_cfg = dict(max_iters=max_iters)
