# The paper's text: 160,000 iterations of 8 × 2 images, rate 6e-5, weight decay 0.01; it mentions no layer decay.
_base_ = ["./schedule_60k.py"]
max_iters = 160000
optim_wrapper = dict(optimizer=dict(lr=6e-5, weight_decay=0.01), paramwise_cfg=dict(layer_decay_rate=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=max_iters),
]
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=max_iters, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
auto_scale_lr = dict(base_batch_size=16)
