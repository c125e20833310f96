_base_ = ["./_base_/vim_upernet.py", "./_base_/schedule_60k.py"]
