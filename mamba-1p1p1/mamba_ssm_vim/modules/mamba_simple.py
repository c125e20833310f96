"""The Mamba mixer as a module, unidirectional or bidirectional, under the published parameter names."""

import math
from collections.abc import Callable

import torch
from causal_conv1d_vim import causal_conv1d_update
from torch import nn

from mamba_ssm_vim.modules import block
from mamba_ssm_vim.modules.plain import is_plain
from mamba_ssm_vim.ops.mixer import Direction, mixer
from mamba_ssm_vim.ops.mixer.reference import convolve, mix_direction, projections_in_own_dtype, select, transition
from mamba_ssm_vim.ops.selective_scan import selective_scan
from mamba_ssm_vim.utils.generation import InferenceParams

BIMAMBA_TYPES = ("none", "v1", "v2")


class Mamba(nn.Module):
    """Selective state-space mixer (arXiv 2312.00752, figure 3), with the bidirectional forms of arXiv 2401.09417.

    Args:
        d_model: width D of the tokens.
        d_state: states N per channel.
        d_conv: width W of the convolution.
        expand: inner width E = expand * D.
        dt_rank: rank R of the step's projection; "auto" is ceil(D / 16).
        dt_min, dt_max: range of the initial step, log-uniform.
        dt_init: "random" (uniform) or "constant" initialisation of dt_proj.weight.
        dt_scale: factor of dt_proj.weight's initial scale R^-0.5.
        dt_init_floor: smallest initial step.
        conv_bias, bias: biases of the convolution, and of in_proj and out_proj.
        use_fast_path: accepted for the published signature; backends are chosen per call (see `use_backend`).
        layer_idx: index under which an inference cache keeps this layer's state.
        bimamba_type: "none" (forward only), "v1" (all parameters but A shared), "v2" (parameters for each direction).
        if_divide_out: halve the sum of the two directions of "v2".
        init_layer_scale: initial value of a per-channel factor `gamma` of the output, or None for no factor.
        if_devide_out: `if_divide_out` as some published code spells it.

    Raises:
        ValueError: unknown `bimamba_type` or `dt_init`, or a size less than 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        if_devide_out: bool | None = None,
    ) -> None:
        super().__init__()
        if if_devide_out is not None:
            if_divide_out = if_devide_out
        bimamba_type = bimamba_type or "none"
        if bimamba_type not in BIMAMBA_TYPES:
            raise ValueError(f"bimamba_type is {bimamba_type!r}, expected one of {', '.join(BIMAMBA_TYPES)}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is {dt_init!r}, expected 'random' or 'constant'")
        sizes = {
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "d_inner = expand * d_model": expand * d_model,
        }
        if dt_rank != "auto":
            sizes["dt_rank"] = dt_rank
        for name, size in sizes.items():
            if int(size) < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_divide_out, self.init_layer_scale = bimamba_type, if_divide_out, init_layer_scale
        self._dt_init = (dt_init, dt_scale, dt_min, dt_max, dt_init_floor)

        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **factory))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self._add_direction("", conv_bias, own_parameters=True, **factory)
        if bimamba_type != "none":
            self._add_direction("_b", conv_bias, own_parameters=bimamba_type == "v2", **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _add_direction(self, suffix: str, conv_bias: bool, *, own_parameters: bool, **factory) -> None:
        """Parameters of the forward pass (suffix "") or of the backward one ("_b"; A_b_log and D_b as published)."""
        E, N, R = self.d_inner, self.d_state, self.dt_rank
        a_name, d_name = f"A{suffix}_log", f"D{suffix}"
        # A and the step's bias stay float32: exp of a rounded log(n) would change the decay rates.
        states = torch.arange(1, N + 1, dtype=torch.float32, device=factory["device"])
        self.register_parameter(a_name, nn.Parameter(torch.log(states).repeat(E, 1)))
        if not own_parameters:
            return
        conv = nn.Conv1d(E, E, self.d_conv, groups=E, padding=self.d_conv - 1, bias=conv_bias, **factory)
        dt_proj = nn.Linear(R, E, bias=True, **factory)
        self._init_dt_proj(dt_proj)
        self.register_module(f"conv1d{suffix}", conv)
        self.register_module(f"x_proj{suffix}", nn.Linear(E, R + 2 * N, bias=False, **factory))
        self.register_module(f"dt_proj{suffix}", dt_proj)
        self.register_parameter(d_name, nn.Parameter(torch.ones(E, dtype=torch.float32, device=factory["device"])))

    @torch.no_grad()
    def _init_dt_proj(self, dt_proj: nn.Linear) -> None:
        dt_init, dt_scale, dt_min, dt_max, floor = self._dt_init
        std = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(dt_proj.weight, std)
        else:
            nn.init.uniform_(dt_proj.weight, -std, std)
        uniform = torch.rand(self.d_inner, dtype=torch.float32, device=dt_proj.bias.device)
        step = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=floor)
        # The inverse of softplus: softplus(step + log(1 - exp(-step))) = step.
        dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        dt_proj.bias._no_reinit = True

    def _direction(self, suffix: str) -> Direction:
        conv, x_proj, dt_proj = (getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        own_conv, own_step = is_plain(conv), is_plain(dt_proj) and dt_proj.bias is not None
        return Direction(
            conv_weight=conv.weight.squeeze(1) if own_conv else conv,
            conv_bias=conv.bias if own_conv else None,
            x_proj_weight=x_proj.weight if is_plain(x_proj) and x_proj.bias is None else x_proj,
            dt_proj_weight=dt_proj.weight if own_step else dt_proj,
            dt_bias=dt_proj.bias.float() if own_step else None,
            A=transition(getattr(self, f"A{suffix}_log")),
            D=getattr(self, f"D{suffix}").float(),
            reverse=suffix.endswith("_b"),
        )

    def directions(self) -> list[Direction]:
        """The passes over the tokens that `mixer` runs."""
        forward = self._direction("")
        if self.bimamba_type == "v2":
            return [forward, self._direction("_b")]
        if self.bimamba_type == "v1":
            forward.A_back = transition(self.A_b_log)
        return [forward]

    @torch.jit.unused  # TorchScript takes `forward_of_weights`
    def forward(self, hidden_states: torch.Tensor, inference_params: InferenceParams | None = None) -> torch.Tensor:
        """(B, L, D) → (B, L, D).

        With `inference_params` the tokens continue those that this layer has seen in earlier calls (`seqlen_offset` of
        0 starts over), and the states of this layer in it are updated.

        Raises:
            ValueError: inference parameters for a bidirectional mixer, one without `layer_idx`, or another batch size.
        """
        if inference_params is not None:
            states = self._get_states_from_cache(
                inference_params, hidden_states.shape[0], initialize_states=inference_params.seqlen_offset == 0
            )
            return self.step(hidden_states, *states)[0]
        scale = 0.5 if self.bimamba_type == "v2" and self.if_divide_out else 1.0
        return self._project_out(mixer(self.in_proj(hidden_states), self.directions(), scale=scale))

    def _project_out(self, mixed: torch.Tensor) -> torch.Tensor:
        out = self.out_proj(mixed)
        return out * self.gamma if hasattr(self, "gamma") else out

    def forward_of_weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`forward` for TorchScript, which knows no modules as values: always from the submodules' weights."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        A_back: torch.Tensor | None = None
        if hasattr(self, "A_b_log") and not hasattr(self, "conv1d_b"):  # "v1"
            A_back = transition(self.A_b_log)
        out = mix_direction(
            x, z, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
            self.dt_proj.bias, transition(self.A_log), self.D, False, A_back,
        )  # fmt: skip
        if hasattr(self, "conv1d_b"):  # "v2"
            out = out + mix_direction(
                x, z, self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias, self.x_proj_b.weight, self.dt_proj_b.weight,
                self.dt_proj_b.bias, transition(self.A_b_log), self.D_b, True,
            )  # fmt: skip
            if self.if_divide_out:
                out = out * 0.5
        return self._project_out(out)

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, L, D), usually one, after those that the states stand for; the states are updated in place.

        Args:
            hidden_states: (B, L, D).
            conv_state: (B, E, W), the last inputs of the convolution, oldest first; not differentiated.
            ssm_state: (B, E, N), the state of the scan; not differentiated.

        Returns:
            out (B, L, D), conv_state, ssm_state.

        Raises:
            ValueError: the mixer is bidirectional.
        """
        self._require_one_direction()
        p = self._direction("")
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        with projections_in_own_dtype(x, [p]):
            x = self._convolve_step(x, conv_state, p)
            delta, B, C = select(x, p.x_proj_weight, p.dt_proj_weight, p.A)
            y, last_state = selective_scan(
                x, delta, p.A, B, C, p.D, z, p.dt_bias, delta_softplus=True,
                initial_state=ssm_state.detach().clone(), return_last_state=True,
            )  # fmt: skip
            with torch.no_grad():
                ssm_state.copy_(last_state)
        return self._project_out(y), conv_state, ssm_state

    def _convolve_step(self, x: torch.Tensor, conv_state: torch.Tensor, p: Direction) -> torch.Tensor:
        """`convolve` for tokens (B, L, E) after those in `conv_state`, which moves on."""
        if isinstance(p.conv_weight, nn.Module):
            window = torch.cat([conv_state.to(x.dtype).transpose(1, 2), x], dim=1)
            with torch.no_grad():
                conv_state.copy_(window[:, -self.d_conv :].transpose(1, 2))
            return convolve(window, p.conv_weight, None, False)[:, -x.shape[1] :]
        x = x.transpose(1, 2)
        return causal_conv1d_update(x, conv_state, p.conv_weight, p.conv_bias, "silu").transpose(1, 2)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Zero states for `step`: conv_state (B, E, W) and ssm_state (B, E, N).

        Their size does not depend on `max_seqlen`, which, like further keywords, is taken for the published signature.
        Without `dtype` the convolution's state has its weight's and the scan's is float32.
        """
        self._require_one_direction()
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or torch.float32)

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's states in the cache, made there if it has none; zeroed if `initialize_states`."""
        if self.layer_idx is None:
            raise ValueError("inference_params needs a layer_idx, which this Mamba was built without")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        conv_state, ssm_state = cache[self.layer_idx]
        if conv_state.shape[0] != batch_size:
            raise ValueError(
                f"the cache of layer {self.layer_idx} was made for a batch of {conv_state.shape[0]}, got {batch_size}: "
                "start with new inference_params"
            )
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state

    def _require_one_direction(self) -> None:
        if self.bimamba_type != "none":
            raise ValueError(
                f"a bidirectional mixer (bimamba_type {self.bimamba_type!r}) sees the whole sequence at once and "
                "cannot go token by token: call it without inference_params, or build it with bimamba_type='none'"
            )


class Block(block.Block):
    """`mamba_ssm_vim.modules.block.Block` with the arguments of release 1, which has no MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(
            dim, mixer_cls, norm_cls=norm_cls, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32
        )
