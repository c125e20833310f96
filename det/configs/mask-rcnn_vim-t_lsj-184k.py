_base_ = ["./_base_/vim_mask_rcnn.py", "./_base_/schedule_184k.py"]
