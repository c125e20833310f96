"""Dense prediction with Vim: what det/ (mmdet 3) and seg/ (mmseg 1) share.

Nothing else in `vim` imports it, because the OpenMMLab packages are optional (`scripts/install_openmmlab.sh`). Configs
name `vim.dense.register` in `custom_imports`.
"""
