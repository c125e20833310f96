_base_ = ["./_base_/vim_cascade_mask_rcnn.py", "./_base_/schedule_184k.py"]
