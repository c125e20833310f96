"""Checks of a config before anything is built: its data sets, annotations and classes exist and fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from vim.errors import UserError

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def dataset_configs(cfg: Config, loaders: tuple[str, ...] = _LOADERS) -> Iterator[dict[str, Any]]:
    """The innermost data set configs of the loaders, wrappers such as RepeatDataset taken off."""
    for loader in loaders:
        dataset = (cfg.get(loader) or {}).get("dataset")
        while isinstance(dataset, dict) and isinstance(dataset.get("dataset"), dict):
            dataset = dataset["dataset"]
        if isinstance(dataset, dict):
            yield dataset


def set_data_root(cfg: Config, root: str) -> None:
    """Point every data set and evaluator of a config at another root."""
    for dataset in dataset_configs(cfg):
        old, dataset["data_root"] = dataset.get("data_root"), root
        for evaluator in (cfg.get("val_evaluator"), cfg.get("test_evaluator")):
            file = isinstance(evaluator, dict) and evaluator.get("ann_file")
            if file and old and file.startswith(old):
                evaluator["ann_file"] = str(Path(root) / file[len(old) :].lstrip("/"))


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Every folder and annotation file of the loaders is there, and the annotations name the classes of the heads.

    Raises:
        UserError: something is missing, with the flag that points elsewhere.
    """
    for dataset in dataset_configs(cfg, loaders):
        root = Path(dataset.get("data_root") or "")
        if not root.is_dir():
            raise UserError(f"there is no data set at {root}: pass --data-root /path/to/it (see docs/downstream.md)")
        for name, prefix in (dataset.get("data_prefix") or {}).items():
            if not (root / prefix).is_dir():
                raise UserError(f"{root} has no folder {prefix} ({name} of {dataset['type']}): see docs/downstream.md")
        annotations = dataset.get("ann_file")
        if annotations and not (root / annotations).is_file():
            raise UserError(f"{root} has no annotation file {annotations}: see docs/downstream.md for the layout")
        classes = _classes(dataset)
        if annotations and annotations.endswith(".json") and classes:
            _check_coco_classes(root / annotations, classes)
        if classes:
            _check_heads(cfg.model, len(classes), dataset["type"])


def _classes(dataset: dict[str, Any]) -> tuple[str, ...] | None:
    if dataset.get("metainfo") and dataset["metainfo"].get("classes"):
        return tuple(dataset["metainfo"]["classes"])
    scope = DefaultScope.get_current_instance()
    with DATASETS.switch_scope_and_registry(scope.scope_name if scope else None) as registry:
        kind = registry.get(dataset["type"])
    return tuple(getattr(kind, "METAINFO", {}).get("classes") or ()) or None


def _check_coco_classes(file: Path, classes: tuple[str, ...]) -> None:
    try:
        categories = {c["name"] for c in json.loads(file.read_text())["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a COCO annotation file: no list of categories with names in it") from error
    missing = [c for c in classes if c not in categories]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{file} has no category {', '.join(missing[:3])}{more}: set metainfo.classes of the data sets in the "
            "config to its categories, and num_classes of the heads to their number"
        )


def _check_heads(model: dict[str, Any], num_classes: int, dataset: str) -> None:
    for name, value in _walk(model):
        if name.rsplit(".", 1)[-1] == "num_classes" and value != num_classes and "rpn_head" not in name:
            raise UserError(
                f"model.{name} is {value}, but {dataset} has {num_classes} classes: set it to {num_classes} in the "
                "config"
            )


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from _walk(value, here)


def replace_types(node: Any, old: str, new: str) -> None:
    """Change every `type` entry `old` of a config to `new`, in place."""
    if isinstance(node, dict):
        if node.get("type") == old:
            node["type"] = new
        for value in node.values():
            replace_types(value, old, new)
    elif isinstance(node, list | tuple):
        for value in node:
            replace_types(value, old, new)
