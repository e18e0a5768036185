"""Convolutions that take in the batch norm behind them: a pass over memory less for each, for inference only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rdsnet.model.rdsnet import RDSNet

# Exactly these: what derives from them may compute its weights or its statistics anew at every call
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)

Link = tuple[nn.Module | None, nn.Module | None]
"""The output of the first is read by the second; None is anything that is not a module."""


def fuse_norms(model: RDSNet) -> RDSNet:
    """Fold every batch norm into the convolution before it, where nothing else reads that convolution.

    The outputs stay the same to rounding. Parameters do not keep their names: such a model predicts, and is neither
    trained nor saved. Norms that cannot be folded stay.

    Args:
        model: in evaluation mode; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: it is in training mode, where norms follow the batch.
    """
    if model.training:
        raise ValueError("expected a model in evaluation mode: norms that still learn cannot be folded")
    links = [*_traced_links(model.backbone.trunk), *_sequential_links(model.object_stream)]
    if model.pixel_stream is not None:
        links += _sequential_links(model.pixel_stream)
    left: dict[nn.Module, nn.Module] = {}  # what stays of a norm
    for conv, norm in _pairs(links):
        _fold(conv, norm)
        left[norm] = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in left:
                setattr(parent, name, left[child])
    return model


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None  # see _pairs
    with torch.no_grad():
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )


def _pairs(links: Iterable[Link]) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions that one norm alone reads, and that norm, where it reads nothing else.

    A pair that serves several levels has as many links, all of them the same.
    """
    readers: dict[Any, set[Any]] = defaultdict(set)
    sources: dict[Any, set[Any]] = defaultdict(set)
    for source, reader in links:
        readers[source].add(reader)
        sources[reader].add(source)
    for conv, (norm, *others) in readers.items():
        if type(conv) not in CONVOLUTIONS or type(norm) not in NORMS or others or len(sources[norm]) > 1:
            continue
        if not norm.training and norm.running_mean is not None:  # otherwise it follows the batch
            yield conv, norm


def _sequential_links(root: nn.Module) -> list[Link]:
    """Neighbours in the `nn.Sequential`s of a module that runs these from end to end."""
    sequences = [module for module in root.modules() if isinstance(module, nn.Sequential)]
    return [link for sequence in sequences for link in pairwise([None, *sequence, None])]


def _traced_links(root: nn.Module) -> list[Link]:
    """All that a module's forward says of its convolutions and norms; none where it cannot be traced."""
    try:
        graph = _Tracer().trace(root)
    except Exception:  # tracing runs the module's own code on placeholders, which may fail in any way
        return []
    modules = {node: root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    return [(modules.get(node), modules.get(reader)) for node in graph.nodes for reader in node.users]


class _Tracer(fx.Tracer):
    """Does not look into convolutions and norms of other libraries either."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(module, name)
