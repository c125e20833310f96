"""Dense prediction with Vim: what det/ (mmdet 3) and seg/ (mmseg 1) share.

It stands in `vim` so that both reach it; nothing else in `vim` imports it, since the OpenMMLab packages are an extra
(`scripts/install_openmmlab.sh`). Configs name `vim.dense.register` in `custom_imports`.
"""
