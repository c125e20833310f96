"""Detection by torchvision and segmentation by transformers, without OpenMMLab: what det/torchvision_train.py and
seg/transformers_train.py run. Needs the extra `dense`."""
