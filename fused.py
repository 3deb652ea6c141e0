"""A frozen convolution, its bias, a shortcut and ReLU as one kernel of a GPU. Imports torch alone.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def has_fused(x):
    """Whether cuDNN has convolution, addition and ReLU as one kernel for x: on NVIDIA's GPUs from
    Ampere on; it cannot be told to be deterministic, and autocast does not know it."""
    return (x.is_cuda and torch.version.cuda and torch.cuda.is_available()
            and torch.cuda.get_device_capability(x.device) >= (8, 0)
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and torch.backends.cudnn.enabled and not torch.is_autocast_enabled("cuda")
            and not torch.are_deterministic_algorithms_enabled())


def conv_relu(x, conv, bn, shortcut=None):
    """relu(bn(conv(x)) + shortcut): one kernel, if there is one, where models.freeze has taken bn
    away."""
    if not (isinstance(bn, nn.Identity) and x.dtype == conv.weight.dtype and has_fused(x)):
        out = bn(conv(x))
        return F.relu_(out if shortcut is None else out.add_(shortcut))
    how = conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, conv.weight, *how)
    return torch.cudnn_convolution_add_relu(x, conv.weight, shortcut, 1, *how)
