_base_ = ["./_base_/vim_upernet.py", "./_base_/schedule_160k.py"]
