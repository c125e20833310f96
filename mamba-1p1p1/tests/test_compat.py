"""Code written for `mamba_ssm` and `causal_conv1d`, in a process of its own because it changes what imports mean."""

import subprocess
import sys

import pytest

PUBLISHED = {
    "mamba_ssm": "Mamba MambaLMHeadModel selective_scan_fn mamba_inner_fn bimamba_inner_fn",
    "mamba_ssm.models.config_mamba": "MambaConfig",
    "mamba_ssm.models.mixer_seq_simple": "MambaLMHeadModel MixerModel create_block Block MambaConfig",
    "mamba_ssm.modules.block": "Block",
    "mamba_ssm.modules.mamba_simple": "Mamba Block",
    "mamba_ssm.ops.selective_scan_interface": (
        "selective_scan_fn selective_scan_ref mamba_inner_fn mamba_inner_ref mamba_inner_fn_no_out_proj "
        "bimamba_inner_fn bimamba_inner_ref SelectiveScanFn MambaInnerFn"
    ),
    "mamba_ssm.ops.triton.layernorm": (
        "RMSNorm layer_norm_fn rms_norm_fn layer_norm_ref rms_norm_ref LayerNormFn LayerNormLinearFn "
        "layer_norm_linear_fn"
    ),
    "mamba_ssm.ops.triton.layer_norm": (
        "RMSNorm layer_norm_fn rms_norm_fn layer_norm_ref rms_norm_ref LayerNormFn LayerNormLinearFn "
        "layer_norm_linear_fn"
    ),
    "mamba_ssm.ops.triton.selective_state_update": "selective_state_update selective_state_update_ref",
    "mamba_ssm.utils.generation": (
        "InferenceParams DecodingCGCache GenerationMixin decode sample update_graph_cache capture_graph "
        "modify_logits_for_min_p_filtering modify_logits_for_top_k_filtering modify_logits_for_top_p_filtering "
        "modify_logit_for_repetition_penalty"
    ),
    "mamba_ssm.utils.hf": "load_config_hf load_state_dict_hf",
    "causal_conv1d": "causal_conv1d_fn causal_conv1d_update",
    "causal_conv1d.causal_conv1d_interface": (
        "causal_conv1d_fn causal_conv1d_ref causal_conv1d_update causal_conv1d_update_ref"
    ),
    "causal_conv1d.causal_conv1d_varlen": "causal_conv1d_varlen_states causal_conv1d_varlen_states_ref",
}


def run(code: str, *path: str) -> subprocess.CompletedProcess:
    program = f"import sys; sys.path[:0] = {list(path)!r}\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_published_names_are_ours():
    lines = ["import importlib, mamba_ssm_vim.compat"]
    for module, names in PUBLISHED.items():
        ours = module.replace("mamba_ssm", "mamba_ssm_vim").replace("causal_conv1d", "causal_conv1d_vim", 1)
        lines += [
            f"theirs = importlib.import_module({module!r})",
            f"ours = importlib.import_module({ours!r})",
            "assert theirs is ours, (theirs, ours)",
            f"assert ours.__name__ == ours.__spec__.name == {ours!r}, ours.__spec__",
            *(f"from {module} import {name}" for name in names.split()),
        ]
    lines.append(
        "import mamba_ssm.ops.selective_scan_interface as a; import mamba_ssm; assert mamba_ssm.ops is not None"
    )
    result = run("\n".join(lines))
    assert result.returncode == 0, result.stderr


def test_what_is_not_there_is_not_found():
    result = run("import mamba_ssm_vim.compat\nimport mamba_ssm.modules.mamba2")
    assert "No module named 'mamba_ssm.modules.mamba2'" in result.stderr


def test_the_originals_may_be_installed_as_well(tmp_path):
    for package in ("mamba_ssm", "causal_conv1d"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("ORIGINAL = True\n")
    plain = run("import mamba_ssm; assert mamba_ssm.ORIGINAL", str(tmp_path))
    assert plain.returncode == 0, plain.stderr
    result = run("import mamba_ssm_vim.compat, mamba_ssm; assert not hasattr(mamba_ssm, 'ORIGINAL')", str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["mamba_ssm", "causal_conv1d"])
def test_refuses_when_the_original_is_already_imported(package, tmp_path):
    (tmp_path / f"{package}.py").write_text("")
    result = run(f"import {package}\nimport mamba_ssm_vim.compat", str(tmp_path))
    assert result.returncode == 1
    assert f"ImportError: {package} is already imported from {tmp_path}" in result.stderr
