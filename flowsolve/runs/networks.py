"""What a run asks of a flow's network: where it is, and the shape of its samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowsolve._arguments import check_flow
from flowsolve.flow import Flow

__all__ = ["event_shape", "placed"]


def placed(flow: Any, device: torch.device | None) -> Flow:
    """The flow, with its networks on a device."""
    check_flow(flow, None)
    assert isinstance(flow, Flow)
    for net in flow.nets if device is not None else ():
        if isinstance(net, nn.Module):
            net.to(device)
    return flow


def event_shape(flow: Flow) -> tuple[int, ...] | None:
    """The shape (C, H, W) that a network's configuration names, if there is one."""
    if not isinstance(flow.net, nn.Module):
        return None
    for module in flow.net.modules():
        config = getattr(module, "config", None)
        channels, size = (_entry(config, name) for name in ("in_channels", "sample_size"))
        if isinstance(channels, int) and size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            return channels, int(height), int(width)
    return None


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if hasattr(config, "get") else getattr(config, name, None)
