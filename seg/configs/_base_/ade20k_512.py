# ADE20K: crops of 512, tested in windows of 512 every 341 pixels; tta_pipeline: six scales, mirror images.
_base_ = ["mmseg::_base_/datasets/ade20k.py", "mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["vim.dense.register"], allow_failed_imports=False)
