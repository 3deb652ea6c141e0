"""The classifier zoo: the students and teachers that the distillation papers compare.

One convention: `forward(images)` takes float32 images (B, 3, H, W) and returns `(logits (B, K),
features (B, C))`, the features being what the last linear layer reads; `num_features` is C. Names
and shapes of the tensors are those of the public RepDistiller / mdistiller code, whose CIFAR-100
teachers load as they are, and torchvision's in the networks for ImageNet.
>>> logits, features = build_model("resnet8x4", num_classes=100)(torch.zeros(2, 3, 32, 32))
>>> logits.shape, features.shape
(torch.Size([2, 100]), torch.Size([2, 256]))

`resnet50` and `resnet18_cifar` are the papers' CIFAR networks (a 3x3 stem, no max-pooling),
`resnet50_imagenet` and `resnet18` torchvision's: a file tells `load_weights` which is meant.
`mobilenetv2` (width 0.5) is CIFAR's, `mobilenet_v2` ImageNet's; `load_weights` needs support/, too.

References: He 2016 (ResNet), Zagoruyko 2016 (WRN), Simonyan 2015 (VGG), Howard 2017 and Sandler
2018 (MobileNet), Zhang and Ma 2018 (ShuffleNet), as in RepDistiller `models/` and mdistiller."""

import copy
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from collections import OrderedDict
from functools import partial
from pathlib import Path

class Head(nn.Linear):
    """The last layer of every network: returns `(logits (B, K), features (B, C))`."""
    def forward(self, features):
        return super().forward(features), features

def head_of(model):
    return next(module for module in model.modules() if isinstance(module, Head))

def chain(**modules):
    return nn.Sequential(OrderedDict(modules))

def conv(in_channels, out_channels, kernel, stride=1, bias=False, **options):
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias, **options)

def conv_bn(in_channels, out_channels, *args, **kwargs):
    return conv(in_channels, out_channels, *args, **kwargs), nn.BatchNorm2d(out_channels)

def conv_bn_relu(*args, **kwargs):
    return *conv_bn(*args, **kwargs), nn.ReLU(inplace=True)

def global_pool():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, C, H, W) -> (B, C)

def stages(name, block, widths, counts, strides):
    """{name1: stage, ...}: counts[i] blocks, widths[i] channels to widths[i + 1], by strides[i]."""
    modules = {}
    for before, width, count, stride in zip(widths, widths[1:], counts, strides):
        blocks = [block(before, width, stride), *(block(width, width, 1) for _ in range(count - 1))]
        modules[f"{name}{len(modules) + 1}"] = nn.Sequential(*blocks)
    return modules

def trunk(kernel, block, widths, counts, strides):
    """conv1 and bn1 of widths[0] channels, then `stages` layer1, layer2, ...: {name: module}."""
    stem = zip(("conv1", "bn1", "relu1"), conv_bn_relu(3, widths[0], kernel))
    return {**dict(stem), **stages("layer", block, widths, counts, strides)}

def init_convs(model):
    """He's initialisation by the outgoing fan; linear layer and BatchNorm keep PyTorch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model

def init_head(model, std=None):
    """The last layer's bias 0, as in WRN; with `std` normal weights, as in VGG and MobileNetV2."""
    head = head_of(model)
    nn.init.zeros_(head.bias)
    if std is not None:
        nn.init.normal_(head.weight, 0, std)
    return model

def projection(in_channels, out_channels, stride):
    """He's option B: a 1x1 convolution where the shape changes, nothing elsewhere."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))

class BasicBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, 3, stride)
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels, 3)
        self.downsample = projection(in_channels, out_channels, stride)

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(out)) + self.downsample(x))

class Bottleneck(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        mid = out_channels // 4
        self.conv1, self.bn1 = conv_bn(in_channels, mid, 1)
        self.conv2, self.bn2 = conv_bn(mid, mid, 3, stride)
        self.conv3, self.bn3 = conv_bn(mid, out_channels, 1)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        return F.relu_(self.bn3(self.conv3(out)) + self.shortcut(x))

def resnet(block, widths, counts, head, num_classes):
    """Three stages, He et al. section 4.2, or four, kuangliu/pytorch-cifar; no max-pooling."""
    body = trunk(3, block, widths, counts, (1, 2, 2, 2))
    return init_convs(chain(**body, pool=global_pool(), **{head: Head(widths[-1], num_classes)}))

class WideBlock(nn.Module):
    """BatchNorm and ReLU stand before the convolutions, also before a shortcut that widens."""
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1, self.bn2 = conv_bn(in_channels, out_channels, 3, stride)
        self.conv2 = conv(out_channels, out_channels, 3)
        wider = in_channels != out_channels
        self.convShortcut = conv(in_channels, out_channels, 1, stride) if wider else None

    def forward(self, x):
        out = F.relu_(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return shortcut + self.conv2(F.relu_(self.bn2(self.conv1(out))))

def wrn(depth, widen, num_classes):
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    layers = stages("block", WideBlock, widths, [(depth - 4) // 6] * 3, (1, 2, 2))
    blocks = {name: chain(layer=layer) for name, layer in layers.items()}
    return init_head(init_convs(chain(
        conv1=conv(3, 16, 3), **blocks, bn1=nn.BatchNorm2d(widths[3]), relu=nn.ReLU(inplace=True),
        pool=global_pool(), fc=Head(widths[3], num_classes))))

class PoolAt64(nn.Module):
    """The fourth max-pooling, in the public code for images of 64x64 only: here maps of 8x8."""
    def forward(self, x):
        return F.max_pool2d(x, 2) if x.shape[-2] == 8 else x

def vgg(counts, num_classes):
    """`counts` convolutions in each of five blocks; all have a bias although BatchNorm follows."""
    widths, modules = (3, 64, 128, 256, 512, 512), {}
    pools = (nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), PoolAt64(), global_pool())
    for i, (count, before, width, pool) in enumerate(zip(counts, widths, widths[1:], pools)):
        inputs = [before] + [width] * (count - 1)
        block = [layer for n in inputs for layer in conv_bn_relu(n, width, 3, bias=True)]
        modules |= {f"block{i}": nn.Sequential(*block), f"pool{i}": pool}
    return init_head(init_convs(chain(**modules, classifier=Head(512, num_classes))), std=.01)

class InvertedResidual(nn.Module):
    """Widen to six times, filter each channel alone, narrow again without an activation."""
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        mid = in_channels * (6 if out_channels > 8 else 1)  # the first block, to 8, does not widen
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, mid, 1), *conv_bn_relu(mid, mid, 3, stride, groups=mid),
            *conv_bn(mid, out_channels, 1))

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)

def mobilenetv2(num_classes):
    """MobileNetV2 of width 0.5 for CIFAR: stem and third, fourth, sixth group halve the maps."""
    widths = (16, 8, 12, 16, 32, 48, 80, 160)
    groups = stages("", InvertedResidual, widths, (1, 2, 3, 4, 3, 3, 1), (1, 1, 2, 2, 1, 2, 1))
    return init_head(init_convs(chain(
        conv1=nn.Sequential(*conv_bn_relu(3, 16, 3, 2)), blocks=nn.Sequential(*groups.values()),
        conv2=nn.Sequential(*conv_bn_relu(160, 1280, 1)),
        pool=global_pool(), classifier=nn.Sequential(Head(1280, num_classes)))), std=.01)

def mobilenet_v1(num_classes):
    """MobileNetV1 of width 1 for ImageNet, with mdistiller's names."""
    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    pairs = [nn.Sequential(*conv_bn_relu(3, 32, 3, 2))]
    for before, width, stride in zip(widths, widths[1:], (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
        alone = conv_bn_relu(before, before, 3, stride, groups=before)
        pairs.append(nn.Sequential(*alone, *conv_bn_relu(before, width, 1)))
    return chain(model=nn.Sequential(*pairs), pool=global_pool(), fc=Head(1024, num_classes))

def shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, section 3.1)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)  # (B, C, H, W)

class ShuffleV1Block(nn.Module):
    """1x1 in groups, shuffle, 3x3 per channel, 1x1 in groups; stride 2 stacks the pooled input."""
    def __init__(self, in_channels, out_channels, stride, groups=3):
        super().__init__()
        new = out_channels - in_channels if stride == 2 else out_channels
        mid = new // 4
        self.stride = stride
        self.first_groups = 1 if in_channels == 24 else groups  # the stem's 24 are not grouped
        self.conv1, self.bn1 = conv_bn(in_channels, mid, 1, groups=self.first_groups)
        self.conv2, self.bn2 = conv_bn(mid, mid, 3, stride, groups=mid)
        self.conv3, self.bn3 = conv_bn(mid, new, 1, groups=groups)

    def forward(self, x):
        out = shuffle(F.relu_(self.bn1(self.conv1(x))), self.first_groups)
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu_(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu_(out + x)

class ShuffleV2Block(nn.Module):
    """Half of the channels pass through (at stride 2: all of them, through two convolutions), the
    others through three; then both halves are shuffled. ReLU follows the 1x1 convolutions only."""
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        half = out_channels // 2
        self.stride = stride
        if stride == 1:
            self.conv1, self.bn1 = conv_bn(half, half, 1)
            self.conv2, self.bn2 = conv_bn(half, half, 3, groups=half)
            self.conv3, self.bn3 = conv_bn(half, half, 1)
        else:
            self.conv1, self.bn1 = conv_bn(in_channels, in_channels, 3, 2, groups=in_channels)
            self.conv2, self.bn2 = conv_bn(in_channels, half, 1)
            self.conv3, self.bn3 = conv_bn(in_channels, half, 1)
            self.conv4, self.bn4 = conv_bn(half, half, 3, 2, groups=half)
            self.conv5, self.bn5 = conv_bn(half, half, 1)

    def forward(self, x):
        if self.stride == 1:
            left, right = x.chunk(2, 1)
            right = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(right)))))
            right = F.relu_(self.bn3(self.conv3(right)))
        else:
            left = F.relu_(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
            right = self.bn4(self.conv4(F.relu_(self.bn3(self.conv3(x)))))
            right = F.relu_(self.bn5(self.conv5(right)))
        return shuffle(torch.cat([left, right], 1), 2)

def shufflenetv1(num_classes):
    body = trunk(1, ShuffleV1Block, (24, 240, 480, 960), (4, 8, 4), (2, 2, 2))
    return chain(**body, pool=global_pool(), linear=Head(960, num_classes))

def shufflenetv2(num_classes):
    body = trunk(1, ShuffleV2Block, (24, 116, 232, 464), (4, 8, 4), (2, 2, 2))
    body["conv2"], body["bn2"], body["relu2"] = conv_bn_relu(464, 1024, 1)
    return chain(**body, pool=global_pool(), linear=Head(1024, num_classes))

def from_torchvision(name, num_classes):
    """torchvision's network with its one linear layer, the last, turned into a `Head`."""
    model = torchvision.models.get_model(name, num_classes=num_classes)
    [linear] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    linear.__class__ = Head  # the same tensors, as torchvision initialises them
    return model

CIFAR_MODELS = {  # name: function of num_classes, for 32x32 images
    **{f"resnet{6 * n + 2}": partial(resnet, BasicBlock, (16, 16, 32, 64), (n, n, n), "fc")
       for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"resnet{6 * n + 2}x4": partial(resnet, BasicBlock, (32, 64, 128, 256), (n, n, n), "fc")
       for n in (1, 5)},
    **{f"wrn_{depth}_{k}": partial(wrn, depth, k) for depth in (16, 40) for k in (1, 2)},
    "vgg8": partial(vgg, (1, 1, 1, 1, 1)), "vgg11": partial(vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, (2, 2, 2, 2, 2)), "vgg16": partial(vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, (2, 2, 4, 4, 4)),
    "mobilenetv2": mobilenetv2, "shufflenetv1": shufflenetv1, "shufflenetv2": shufflenetv2,
    "resnet18_cifar": partial(resnet, BasicBlock, (64, 64, 128, 256, 512), (2, 2, 2, 2), "linear"),
    "resnet50": partial(resnet, Bottleneck, (64, 256, 512, 1024, 2048), (3, 4, 6, 3), "linear")}
IMAGENET_MODELS = {  # the same, for 224x224 images
    **{name: partial(from_torchvision, name) for name in ("resnet18", "resnet34", "mobilenet_v2")},
    "resnet50_imagenet": partial(from_torchvision, "resnet50"), "mobilenet_v1": mobilenet_v1}
ZOO = {**CIFAR_MODELS, **IMAGENET_MODELS}

def build_model(name: str, num_classes: int) -> nn.Module:
    """The network `name` with `num_classes` outputs, freshly initialised as its public code does,
    on the CPU. Raises ValueError for a name not in `ZOO` or fewer classes than one."""
    if name not in ZOO:
        raise ValueError(f"unknown model '{name}'; the zoo has {', '.join(ZOO)}")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of at least 1, not {num_classes!r}")
    model = ZOO[name](num_classes)
    model.num_features = head_of(model).in_features
    return model

def imagenet_file(name: str) -> tuple[str, Path, str]:
    """(address, path in torch.hub's folder, "sha256:" and the first digits) of torchvision's first
    ImageNet weights, which the papers' teachers are. Raises ValueError where there are none."""
    public = name.removesuffix("_imagenet")
    if public not in ("resnet18", "resnet34", "resnet50", "mobilenet_v2"):
        raise ValueError(f"there are no public ImageNet weights for {name}: name a file")
    url = torchvision.models.get_model_weights(public).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    return url, path, "sha256:" + path.stem.split("-")[1]  # resnet34-b627a593.pth

def use_option_a(model):
    """Turns a CIFAR ResNet's projections into He's option A: subsample, zeros as new channels."""
    for block in model.modules():
        if isinstance(getattr(block, "downsample", None), nn.Sequential):  # of a BasicBlock
            old = block.downsample[0]  # which doubles the channels
            pad = (0, 0, 0, 0, old.in_channels // 2, old.in_channels // 2)  # of W, H and C
            block.downsample = nn.Sequential(nn.AvgPool2d(1, old.stride), nn.ZeroPad3d(pad))

def load_weights(model_name: str, path: str | Path, num_classes: int | None = None) -> nn.Module:
    """The network `model_name` with the weights of a file, in eval mode, float32, on the CPU.
    path: a checkpoint of RepDistiller, mdistiller, kuangliu/pytorch-cifar, torchvision, akamaster/
    pytorch_resnet_cifar10 or this project; or "imagenet", which downloads torchvision's.
    num_classes: None reads it from the file. CIFAR ResNets without tensors for their shortcuts pad
    with zeros. OSError: no file is there, or to be had; ValueError: its tensors do not fit."""
    from support import checkpoints, files  # here, since all else in this file stands alone
    if str(path) == "imagenet":
        url, path, digest = imagenet_file(model_name)
        files.fetch([url], path, digest, "name it with --teacher-weights PATH")
    state = checkpoints.read_state_dict(path)
    classes = num_classes or next((len(w) for w in state.values() if w.dim() == 2), 1)  # the head's
    stem = state.get("conv1.weight", torch.empty(0)).shape[2:]
    by_stem = {("resnet50", (7, 7)): "resnet50_imagenet", ("resnet18", (3, 3)): "resnet18_cifar"}
    model_name = by_stem.get((model_name, tuple(stem)), model_name)  # the networks for CIFAR: 3x3
    with torch.device("meta"):  # without memory
        model = build_model(model_name, classes)
    if not any("downsample" in name or "shortcut" in name for name in state):
        use_option_a(model)
    matched = checkpoints.match(model.state_dict(), state, f"{path} does not fit {model_name}")
    if model_name in ("resnet18_cifar", "resnet50") and "fc.weight" in state:
        files.note(f"{path}: a 3x3 stem: read as {model_name}, without a max-pooling behind it")
    model.to_empty(device="cpu").load_state_dict(matched)
    return model.eval()

def freeze(model: nn.Module) -> nn.Module:
    """A teacher: a copy of `model` in eval mode and without gradients. In this zoo's networks each
    BatchNorm right behind a convolution is folded into it (the same outputs up to rounding)."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(frozen.modules()):
        # In these classes one registered right behind a convolution is what reads it, and alone.
        known = (type(parent).__module__ in (__name__, "torchvision.models.resnet")
                 or type(parent).forward is nn.Sequential.forward)
        children = list(parent._modules.items()) if known else []
        for (name, layer), (bn_name, bn) in zip(children, children[1:]):
            kinds = type(layer), type(bn)  # none of their subclasses, as of a parametrised one
            if kinds == (nn.Conv2d, nn.BatchNorm2d) and bn.track_running_stats:
                setattr(parent, name, nn.utils.fuse_conv_bn_eval(layer, bn))
                setattr(parent, bn_name, nn.Identity())
    return frozen.to(memory_format=torch.channels_last)  # in which convolutions run faster
