"""Reference versions of two kernels that only the host's CPU build has; Wan needs them on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _norm(x, weight, bias, norm_type, eps):
    if norm_type == "rms":
        out = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return out if weight is None else out * weight.float()
    return F.layer_norm(
        x.float(), x.shape[-1:], None if weight is None else weight.float(),
        None if bias is None else bias.float(), eps,
    )


def fused_norm_scale_shift(x, weight, bias, scale, shift, norm_type, eps):
    """norm(x) * (1 + scale) + shift; x is (batch, tokens, dim)."""
    return (_norm(x, weight, bias, norm_type, eps) * (1 + scale.float()) + shift.float()).to(x.dtype)


def fused_scale_residual_norm_scale_shift(residual, x, gate, weight, bias, scale, shift, norm_type, eps):
    """residual + x * gate, and its modulated norm."""
    out = residual.float() + (x.float() if gate is None else x.float() * gate.float())
    out = out.to(x.dtype)
    return fused_norm_scale_shift(out, weight, bias, scale, shift, norm_type, eps), out


def register() -> None:
    """Define the operators once in this process."""
    if hasattr(torch.ops.sgl_kernel, "fused_norm_scale_shift_cpu"):
        return
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(
        "fused_norm_scale_shift_cpu(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, "
        "str norm_type, float eps) -> Tensor"
    )
    library.define(
        "fused_scale_residual_norm_scale_shift_cpu(Tensor residual, Tensor x, Tensor? gate, Tensor? weight, "
        "Tensor? bias, Tensor scale, Tensor shift, str norm_type, float eps) -> (Tensor, Tensor)"
    )
    library.impl("fused_norm_scale_shift_cpu", fused_norm_scale_shift, "CPU")
    library.impl("fused_scale_residual_norm_scale_shift_cpu", fused_scale_residual_norm_scale_shift, "CPU")
    register.library = library
