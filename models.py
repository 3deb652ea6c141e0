"""The classifier zoo: every student and teacher that the distillation papers compare on CIFAR-100 and ImageNet.

One convention: `forward(images)` takes float32 images (B, 3, H, W) and returns `(logits (B, K), features (B, C))`, the
features being what the last linear layer reads; the attribute `num_features` is C. A network is a chain of named
modules, and the names and shapes are those of the public RepDistiller / mdistiller code, so that its published
CIFAR-100 teachers load as they are; the ImageNet networks have torchvision's names.

    python models.py        prints the whole zoo: parameters, multiply-adds, measured speed

    parameters, 100 classes, 32x32                             parameters, 1000 classes, 224x224
    resnet8            83,892    wrn_16_1       180,916        resnet18           11,689,512
    resnet14          181,108    wrn_16_2       703,284        resnet34           21,797,672
    resnet20          278,324    wrn_40_1       569,780        resnet50_imagenet  25,557,032
    resnet32          472,756    wrn_40_2     2,255,156        mobilenet_v1        4,231,976
    resnet44          667,188    vgg8         3,965,028        mobilenet_v2        3,504,872
    resnet56          861,620    vgg11        9,277,284
    resnet110       1,736,564    vgg13        9,462,180
    resnet8x4       1,233,540    vgg16       14,774,436
    resnet32x4      7,433,860    vgg19       20,086,692
    mobilenetv2       812,836    shufflenetv1   949,258
    resnet50       23,705,252    shufflenetv2 1,355,528

`resnet50` is the CIFAR network that the papers call ResNet50 (a 3x3 stem, no max-pooling), `resnet50_imagenet` is
torchvision's; `load_weights("resnet50", ...)` finds out from the file which of the two is meant. `mobilenetv2` (width
0.5) is for CIFAR, `mobilenet_v2` for ImageNet.

References: He et al. 2016 (ResNet), Zagoruyko & Komodakis 2016 (WRN), Simonyan & Zisserman 2015 (VGG), Howard et al.
2017 and Sandler et al. 2018 (MobileNet), Zhang et al. 2018 and Ma et al. 2018 (ShuffleNet); as laid out in
HobbitLong/RepDistiller `models/` and megvii-research/mdistiller `mdistiller/models/`.
"""

import copy
import difflib
import os
import re
import warnings
from collections import OrderedDict
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode


# Parts that several networks share ------------------------------------------------------------------------------------
class Head(nn.Linear):
    """The last layer of every network: returns `(logits (B, K), features (B, C))`, so that the chain it ends does."""

    def forward(self, features):
        return super().forward(features), features


def chain(**modules):
    return nn.Sequential(OrderedDict(modules))


def conv(in_channels, out_channels, kernel, stride=1, groups=1, bias=False):
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)


def shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, section 3.1)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)  # (B, C, H, W)


def conv_bn_relu(*args, **kwargs):
    layer = conv(*args, **kwargs)
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True)]


def stage(block, count, in_channels, out_channels, stride):
    """`count` blocks in a row; the first one changes width and resolution."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def global_pool():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, C, H, W) -> (B, C)


def staged(block, kernel, widths, counts, strides, head, num_classes, last=None):
    """A ResNet or ShuffleNet: conv1 and bn1 (`kernel`, `widths[0]`), layer1, layer2, ..., pooling, the head.

    Stage i has `counts[i]` blocks of `widths[i + 1]` channels; `last`: the width of a closing 1x1 conv2, if any."""
    modules = dict(zip(("conv1", "bn1", "relu1"), conv_bn_relu(3, widths[0], kernel)))
    for i, (count, stride) in enumerate(zip(counts, strides)):
        modules[f"layer{i + 1}"] = stage(block, count, widths[i], widths[i + 1], stride)
    if last:
        modules |= dict(zip(("conv2", "bn2", "relu2"), conv_bn_relu(widths[-1], last, 1)))
    return chain(**modules, pool=global_pool(), **{head: Head(last or widths[-1], num_classes)})


def head_of(model):
    return next(module for module in model.modules() if isinstance(module, Head))


def init_convs(model):
    """He's initialisation by the outgoing fan; the linear layer and BatchNorm keep PyTorch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def init_head(model, std=None):
    """The last layer's bias 0, as in WRN; with `std` also normal weights, as in VGG and MobileNetV2."""
    head = head_of(model)
    nn.init.zeros_(head.bias)
    if std is not None:
        nn.init.normal_(head.weight, 0, std)
    return model


# ResNet ---------------------------------------------------------------------------------------------------------------
class ZeroPadShortcut(nn.Module):
    """He's option A: subsample, and fill the new channels with zeros, half of them on either side; no parameters."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.stride, self.new = stride, out_channels - in_channels

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


def projection(in_channels, out_channels, stride):
    """He's option B: a 1x1 convolution where the shape changes, nothing elsewhere."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, out_channels, 3, stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = conv(out_channels, out_channels, 3), nn.BatchNorm2d(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(out)).add_(self.downsample(x)))


class Bottleneck(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        mid = out_channels // 4
        self.conv1, self.bn1 = conv(in_channels, mid, 1), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        return F.relu_(self.bn3(self.conv3(out)).add_(self.shortcut(x)))


def resnet(depth, widths, num_classes):
    counts = [(depth - 2) // 6] * 3
    return init_convs(staged(BasicBlock, 3, widths, counts, (1, 2, 2), "fc", num_classes))


def resnet50(num_classes):
    widths, counts = (64, 256, 512, 1024, 2048), (3, 4, 6, 3)
    return init_convs(staged(Bottleneck, 3, widths, counts, (1, 2, 2, 2), "linear", num_classes))


# WideResNet -----------------------------------------------------------------------------------------------------------
class WideBlock(nn.Module):
    """BatchNorm and ReLU stand before the convolutions; where the width changes they also feed the shortcut."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv(in_channels, out_channels, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_channels), conv(out_channels, out_channels, 3)
        self.convShortcut = conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None

    def forward(self, x):
        out = F.relu_(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return shortcut + self.conv2(F.relu_(self.bn2(self.conv1(out))))


def wrn(depth, widen, num_classes):
    n, w1, w2, w3 = (depth - 4) // 6, 16 * widen, 32 * widen, 64 * widen
    return init_head(init_convs(chain(
        conv1=conv(3, 16, 3), block1=chain(layer=stage(WideBlock, n, 16, w1, 1)),
        block2=chain(layer=stage(WideBlock, n, w1, w2, 2)), block3=chain(layer=stage(WideBlock, n, w2, w3, 2)),
        bn1=nn.BatchNorm2d(w3), relu=nn.ReLU(inplace=True), pool=global_pool(), fc=Head(w3, num_classes))))


# VGG ------------------------------------------------------------------------------------------------------------------
class PoolAt64(nn.Module):
    """The fourth max-pooling, which the public code applies to 64x64 images only, here maps of 8x8."""

    def forward(self, x):
        return F.max_pool2d(x, 2) if x.shape[-2] == 8 else x


def vgg(counts, num_classes):
    """`counts` convolutions in each of five blocks; all have a bias although BatchNorm follows."""
    widths = (64, 128, 256, 512, 512)
    pools = (nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), PoolAt64(), global_pool())
    modules, in_channels = {}, 3
    for i, (count, width, pool) in enumerate(zip(counts, widths, pools)):
        layers = []
        for _ in range(count):
            layers += conv_bn_relu(in_channels, width, 3, bias=True)
            in_channels = width
        modules |= {f"block{i}": nn.Sequential(*layers), f"pool{i}": pool}
    return init_head(init_convs(chain(**modules, classifier=Head(512, num_classes))), std=.01)


# MobileNet ------------------------------------------------------------------------------------------------------------
class InvertedResidual(nn.Module):
    """Widen by `expansion`, filter each channel alone, and narrow again without an activation."""

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        mid = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, mid, 1), *conv_bn_relu(mid, mid, 3, stride, groups=mid),
            conv(mid, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenetv2(num_classes):
    """MobileNetV2 of width 0.5 for CIFAR: the second and the fifth group keep their resolution, but not the stem."""
    # expansion, channels, blocks, stride of each group
    plan = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
    groups, in_channels = [], 16
    for expansion, out_channels, count, stride in plan:
        groups.append(stage(partial(InvertedResidual, expansion=expansion), count, in_channels, out_channels, stride))
        in_channels = out_channels
    return init_head(init_convs(chain(
        conv1=nn.Sequential(*conv_bn_relu(3, 16, 3, 2)), blocks=nn.Sequential(*groups),
        conv2=nn.Sequential(*conv_bn_relu(160, 1280, 1)), pool=global_pool(),
        classifier=nn.Sequential(Head(1280, num_classes)))), std=.01)


def mobilenet_v1(num_classes):
    """MobileNetV1 of width 1 for ImageNet, with mdistiller's names."""
    # channels and stride of each pair of convolutions
    plan = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
    layers, width = [nn.Sequential(*conv_bn_relu(3, 32, 3, 2))], 32
    for out_channels, stride in plan:
        depthwise = conv_bn_relu(width, width, 3, stride, groups=width)
        layers.append(nn.Sequential(*depthwise, *conv_bn_relu(width, out_channels, 1)))
        width = out_channels
    return chain(model=nn.Sequential(*layers), pool=global_pool(), fc=Head(width, num_classes))


# ShuffleNet -----------------------------------------------------------------------------------------------------------
class ShuffleV1Block(nn.Module):
    """1x1 in groups, shuffle, 3x3 per channel, 1x1 in groups; at stride 2 the pooled input is stacked, not added."""

    def __init__(self, in_channels, out_channels, stride, groups=3):
        super().__init__()
        new = out_channels - in_channels if stride == 2 else out_channels
        mid, first_groups = new // 4, 1 if in_channels == 24 else groups  # the stem's 24 channels are not grouped
        self.conv1, self.bn1 = conv(in_channels, mid, 1, groups=first_groups), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, new, 1, groups=groups), nn.BatchNorm2d(new)
        self.stride, self.first_groups = stride, first_groups

    def forward(self, x):
        out = shuffle(F.relu_(self.bn1(self.conv1(x))), self.first_groups)
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu_(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x)


class ShuffleV2Block(nn.Module):
    """Half of the channels pass through (at stride 2: all of them through two convolutions), the others go through
    three; then both halves are shuffled. ReLU follows the 1x1 convolutions only."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        half = out_channels // 2
        self.left = 2 if stride == 2 else 0  # convolutions on the left path; the others are the right path
        left = [(in_channels, in_channels, 3, 2, in_channels), (in_channels, half, 1)][:self.left]
        right = [(in_channels if self.left else half, half, 1), (half, half, 3, stride, half), (half, half, 1)]
        for i, shape in enumerate(left + right, 1):
            layer = conv(*shape)
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", nn.BatchNorm2d(layer.out_channels))

    def path(self, x, first, last):
        for i in range(first, last + 1):
            layer, bn = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            x = F.relu_(bn(layer(x))) if layer.groups == 1 else bn(layer(x))
        return x

    def forward(self, x):
        left, right = (x, x) if self.left else x.chunk(2, 1)
        return shuffle(torch.cat([self.path(left, 1, self.left), self.path(right, self.left + 1, self.left + 3)], 1), 2)


# The zoo --------------------------------------------------------------------------------------------------------------
def from_torchvision(name, head, num_classes):
    """torchvision's network with its last layer, which is called `head`, turned into a `Head`."""
    model = torchvision.models.get_model(name, num_classes=num_classes)
    linear = model.get_submodule(head)
    pair = Head(linear.in_features, num_classes)
    pair.load_state_dict(linear.state_dict())  # keeps torchvision's initialisation
    model.set_submodule(head, pair)
    return model


CIFAR_MODELS = {  # name: function of num_classes, for 32x32 images
    **{f"resnet{depth}": partial(resnet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    **{f"wrn_{depth}_{widen}": partial(wrn, depth, widen) for depth in (16, 40) for widen in (1, 2)},
    "vgg8": partial(vgg, (1, 1, 1, 1, 1)), "vgg11": partial(vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, (2, 2, 2, 2, 2)), "vgg16": partial(vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, (2, 2, 4, 4, 4)),
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": partial(staged, ShuffleV1Block, 1, (24, 240, 480, 960), (4, 8, 4), (2, 2, 2), "linear"),
    "shufflenetv2": partial(staged, ShuffleV2Block, 1, (24, 116, 232, 464), (4, 8, 4), (2, 2, 2), "linear", last=1024),
    "resnet50": resnet50,
}
IMAGENET_MODELS = {  # the same, for 224x224 images
    "resnet18": partial(from_torchvision, "resnet18", "fc"),
    "resnet34": partial(from_torchvision, "resnet34", "fc"),
    "resnet50_imagenet": partial(from_torchvision, "resnet50", "fc"),
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": partial(from_torchvision, "mobilenet_v2", "classifier.1"),
}
ZOO = {**CIFAR_MODELS, **IMAGENET_MODELS}


def check_name(name):
    if name not in ZOO:
        near = " or ".join(difflib.get_close_matches(str(name).lower(), ZOO))
        hint = f", did you mean {near}?" if near else ";"
        raise ValueError(f"unknown model '{name}'{hint} the zoo has {', '.join(ZOO)}")


def build_model(name, num_classes):
    """The network `name` with `num_classes` outputs, freshly initialised as its public code does, on the CPU.

    Its forward takes float images (B, 3, H, W) and returns (logits (B, K), features (B, C)); its `num_features` is C.
    Raises ValueError for a name that is not in `ZOO` or fewer classes than one.
    """
    check_name(name)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of at least 1, not {num_classes!r}")
    model = ZOO[name](num_classes)
    model.num_features = head_of(model).in_features
    return model


# Weights --------------------------------------------------------------------------------------------------------------
# Public training scripts store their accuracy as a NumPy number, under NumPy 1's module name or NumPy 2's.
NUMPY_NUMBERS = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMPY_NUMBERS += [np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OSUVMm"}]


def read_state(path):
    """The tensors of a checkpoint file, {name: tensor}: a bare state dict, or one under "model", "state_dict" or "net",
    with or without the `module.` of DataParallel. Executes nothing; raises as `load_weights`."""
    with (open(path, "rb") as file, torch.serialization.safe_globals(NUMPY_NUMBERS),
          warnings.catch_warnings(action="ignore")):  # torch's thoughts on pickle protocols
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail anywhere in the reader, with any exception
            foreign = re.search(r"GLOBAL (\S+)|<class '(\S+)'>", str(error))
            reason = f"it carries {foreign[1] or foreign[2]}" if foreign else "it cannot be read"
            raise ValueError(f"{path}: not a checkpoint of tensors and plain values ({reason}); nothing in it was "
                             "executed; write one with torch.save(model.state_dict(), path)") from None
    for key in ("model", "state_dict", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = content.items() if isinstance(content, dict) else ()
    state = {str(key).removeprefix("module."): value for key, value in state if isinstance(value, torch.Tensor)}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{path}: tensor '{name}' holds no plain numbers")
    if not any(tensor.dim() == 2 for tensor in state.values()):
        raise ValueError(f"{path}: no classifier in it: expected a state dict, bare or under 'model', 'state_dict' or "
                         "'net', with a last linear layer")
    return state


def imagenet_file(name):
    """The path of torchvision's ImageNet weights (its first version, which the papers' teachers are), downloaded into
    torch.hub's folder and checked against their SHA-256 where they are not there yet."""
    public = name.removesuffix("_imagenet")
    known = [other for other, build in IMAGENET_MODELS.items() if build is not mobilenet_v1]
    if name not in known:
        raise ValueError(f"no public ImageNet weights for {name}; there are some for {', '.join(known)}")
    url = torchvision.models.get_model_weights(public).IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, torch.hub.HASH_REGEX.search(url)[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{os.path.basename(url)} could not be downloaded ({error}); fetch {url} elsewhere "
                                    f"and put it at {path}, or name it with --teacher-weights PATH") from None
    return path


def fit(name, state):
    """An empty `name` (on the meta device) for the tensors `state`, those under its own names, and what does not fit,
    in words, or None."""
    num_classes = next(len(tensor) for tensor in state.values() if tensor.dim() == 2)  # the one matrix: the last layer
    with torch.device("meta"):  # names and shapes alone: no time, no memory, no random numbers
        model = build_model(name, num_classes)
    if not any("downsample" in key or "shortcut" in key for key in state):  # option A leaves no tensors in the file
        for block in model.modules():
            if isinstance(block, BasicBlock) and not isinstance(block.downsample, nn.Identity):
                layer = block.downsample[0]
                block.downsample = ZeroPadShortcut(layer.in_channels, layer.out_channels, layer.stride[0])
    wanted = model.state_dict()
    renamed = {}
    for key, tensor in state.items():  # akamaster/pytorch_resnet_cifar10 has other words for the same layers
        public = key.replace("compressible_", "").replace("linear", "fc").replace("shortcut", "downsample")
        renamed[public if key not in wanted and public in wanted else key] = tensor
    for key in wanted:
        if key.endswith("num_batches_tracked"):  # files older than PyTorch 0.4.1 have no counters
            renamed.setdefault(key, torch.tensor(0))
    for key in (*wanted, *renamed):
        expected, found = (list(tensors[key].shape) if key in tensors else None for tensors in (wanted, renamed))
        if expected != found:
            return model, renamed, f"tensor '{key}': expected {expected or 'none'}, found {found or 'none'}"
    return model, renamed, None


def load_weights(model_name, path, num_classes=None):
    """The network `model_name` with the weights of a file, in eval mode, float32, on the CPU.

    path: a checkpoint of the public RepDistiller / mdistiller / akamaster/pytorch_resnet_cifar10 / torchvision code or
    this project's student.pt; or the word "imagenet", which downloads torchvision's weights. num_classes: None reads it
    from the file. CIFAR ResNets may have either shortcut: a file with no tensors for them means zero-padding.
    Raises FileNotFoundError where there is no such file and it cannot be had; ValueError for an unknown name, a file
    that holds anything but tensors and plain values, a tensor that does not fit (with the name of the model that would,
    if there is one), and a class count that differs from the file's.
    """
    check_name(model_name)
    torchvision_name = "resnet50_imagenet" if model_name == "resnet50" else model_name
    if str(path) == "imagenet":
        path = imagenet_file(torchvision_name)
    state = read_state(path)
    if "fc.weight" in state:  # the CIFAR ResNet-50 calls it `linear`
        model_name = torchvision_name
    model, renamed, problem = fit(model_name, state)
    if problem:
        fitting = [name for name in ZOO if not fit(name, state)[2]]
        hint = f"; the file fits {fitting[0]}" if fitting else ""
        raise ValueError(f"{path} does not fit {model_name}: {problem}{hint}")
    found = head_of(model).out_features
    if num_classes not in (None, found):
        raise ValueError(f"{path} has {found} classes, expected {num_classes}")
    model.to_empty(device="cpu").load_state_dict(renamed)
    return model.eval()


def freeze(model):
    """A teacher: a copy of `model`, a network of this zoo, in eval mode and without gradients, each BatchNorm that
    directly follows a convolution folded into it (the same outputs up to rounding). `model` is left as it is."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(frozen.modules()):
        children = list(parent.named_children())
        # Throughout the zoo a BatchNorm registered right behind a convolution is also what reads it, and alone.
        for (name, layer), (bn_name, bn) in zip(children, children[1:]):
            if isinstance(layer, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, bn))
                setattr(parent, bn_name, nn.Identity())
    return frozen.to(memory_format=torch.channels_last)  # the layout in which convolutions run faster


# The zoo at a glance --------------------------------------------------------------------------------------------------
def multiply_adds(name, num_classes, size):
    """Of one forward pass of one image of size x size: convolutions and linear layers, counted without running them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_model(name, num_classes)(torch.empty(1, 3, size, size))
    return counter.get_total_flops() // 2


def images_per_second(step, batch_size):
    from torch.utils.benchmark import Timer  # here, because importing it is slow and may print
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())  # synchronises the GPU
    return batch_size / timer.blocked_autorange(min_run_time=.5).median


def print_zoo():
    device, scale = ("cuda", 16) if torch.cuda.is_available() else ("cpu", 1)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {hardware}, float32, batches of {32 * scale} (32x32) and {8 * scale} (224x224)\n"
          f"{'':58}{'images/s':>28}\n{'model':18}{'input':>8}{'classes':>8}{'features':>9}{'parameters':>11}"
          f"{'multiply-adds':>15}{'forward':>9}{'frozen':>9}{'+backward':>10}")
    for name in ZOO:
        size, num_classes, batch_size = (32, 100, 32 * scale) if name in CIFAR_MODELS else (224, 1000, 8 * scale)
        model = build_model(name, num_classes).to(device)
        images = torch.randn(batch_size, 3, size, size, device=device)
        with torch.no_grad():
            forward, frozen = (images_per_second(partial(net, images), batch_size) for net in (model, freeze(model)))
        both = images_per_second(lambda: model(images)[0].sum().backward(), batch_size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:18}{f'{size}x{size}':>8}{num_classes:>8}{model.num_features:>9}{parameters:>11,}"
              f"{multiply_adds(name, num_classes, size):>15,}{forward:>9.0f}{frozen:>9.0f}{both:>10.0f}", flush=True)


if __name__ == "__main__":
    print_zoo()
