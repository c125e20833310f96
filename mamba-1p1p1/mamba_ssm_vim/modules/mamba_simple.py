"""The Mamba mixer as a module, unidirectional or bidirectional, under the published parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm_vim.ops.mixer import Direction, mixer

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
        bimamba_type: "none" (forward only), "v1" (shared parameters but A), "v2" (own parameters per direction).
        if_divide_out: halve the sum of the two directions of "v2".
        init_layer_scale: initial value of a per-channel factor `gamma` of the output, or None for no factor.

    Raises:
        ValueError: unknown `bimamba_type` or `dt_init`.
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
    ) -> None:
        super().__init__()
        bimamba_type = bimamba_type or "none"
        if bimamba_type not in BIMAMBA_TYPES:
            raise ValueError(f"bimamba_type is {bimamba_type!r}, expected one of {', '.join(BIMAMBA_TYPES)}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is {dt_init!r}, expected 'random' or 'constant'")
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
        a_name, d_name = ("A_log", "D") if suffix == "" else ("A_b_log", "D_b")
        # A and the step's bias stay float32: exp of a rounded log(n) would move the poles.
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
        self.register_parameter(d_name, nn.Parameter(torch.ones(E, device=factory["device"])))

    @torch.no_grad()
    def _init_dt_proj(self, dt_proj: nn.Linear) -> None:
        dt_init, dt_scale, dt_min, dt_max, floor = self._dt_init
        std = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(dt_proj.weight, std)
        else:
            nn.init.uniform_(dt_proj.weight, -std, std)
        log_step = torch.rand(self.d_inner, device=dt_proj.bias.device) * (math.log(dt_max) - math.log(dt_min))
        step = torch.exp(log_step + math.log(dt_min)).clamp(min=floor)
        # The inverse of softplus: softplus(step + log(1 - exp(-step))) = step.
        dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        dt_proj.bias._no_reinit = True

    def _direction(self, suffix: str) -> Direction:
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        return Direction(
            conv_weight=conv.weight.squeeze(1),
            conv_bias=conv.bias,
            x_proj_weight=getattr(self, f"x_proj{suffix}").weight,
            dt_proj_weight=dt_proj.weight,
            dt_bias=dt_proj.bias.float(),
            A=-torch.exp((self.A_b_log if suffix else self.A_log).float()),
            D=(self.D_b if suffix else self.D).float(),
            reverse=bool(suffix),
        )

    def directions(self) -> list[Direction]:
        """The passes over the tokens that `mixer` runs."""
        forward = self._direction("")
        if self.bimamba_type == "v2":
            return [forward, self._direction("_b")]
        if self.bimamba_type == "v1":
            forward.A_back = -torch.exp(self.A_b_log.float())
        return [forward]

    @torch.jit.unused  # TorchScript takes the registered operators instead (vim.models.layers.Block)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        scale = 0.5 if self.bimamba_type == "v2" and self.if_divide_out else 1.0
        out = F.linear(
            mixer(self.in_proj(hidden_states), self.directions(), scale=scale),
            self.out_proj.weight,
            self.out_proj.bias,
        )
        return out if self.init_layer_scale is None else out * self.gamma
