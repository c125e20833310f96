"""torch.hub finds every registered model in a checkout that is not installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import timm
import torch

import vim  # noqa: F401  registers the models

ROOT = Path(__file__).parents[2]


def test_every_registered_model_is_an_entry_point() -> None:
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    ours = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("vim.")}
    assert "vim_tiny_patch16_224" in ours
    for name in ours:
        assert "takes pretrained" in getattr(hubconf, name).__doc__


def test_an_entry_point_is_the_registered_model() -> None:
    torch.manual_seed(0)
    hub = torch.hub.load(str(ROOT), "vim_nano_patch4_32", source="local", num_classes=3, depth=2).eval()
    torch.manual_seed(0)
    own = timm.create_model("vim_nano_patch4_32", num_classes=3, depth=2).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(hub(x), own(x))


def test_without_installing(tmp_path) -> None:
    """From another folder, with neither the project's folders nor an installed copy on the path."""
    code = (
        "import sys, torch\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(type(f)).lower()]\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'vim_nano_patch4_32', source='local', depth=1)\n"
        "print(type(model).__module__, tuple(model(torch.zeros(1, 3, 32, 32)).shape))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "vim.models.vision_mamba (1, 10)"
