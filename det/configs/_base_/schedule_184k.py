# 184,375 iterations of 64 pictures: 100 epochs of COCO.
_base_ = ["./coco_lsj_1024.py"]
max_iters = 184375
milestones = [163889, 177546]
optim_wrapper = dict(
    # The published runs' float16; --amp bfloat16 has more range and is what current GPUs should use.
    type="AmpOptimWrapper",
    dtype="float16",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="VimLayerDecayConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.837),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=milestones, gamma=0.1),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5000, save_last=True, max_keep_ckpts=3),
)
auto_scale_lr = dict(enable=False, base_batch_size=64)
