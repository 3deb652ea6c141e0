"""Test sets from elsewhere: CIFAR-C, CIFAR-10.1, STL-10, ImageNet-C, any class folders.

    images, labels, columns = load_shift(directory, "imagenet", ids, names)  # paths; 200 of 1000"""

import numpy as np
import torch
from pathlib import Path
from support import files, folders

def read_arrays(images_path, labels_path):
    """Images uint8 (N,3,32,32) and labels int64 (N,) of two .npy files with (N,32,32,3) and (N,);
    of the images, only what is used is read. Raises OSError; ValueError for other content."""
    with files.undamaged(f"{images_path} or {labels_path.name}", "unpack it again"):
        images, labels = (torch.from_numpy(np.lib.format.open_memmap(path, "c"))
                          for path in (images_path, labels_path))
    found = images.dtype, [*images.shape], labels.is_floating_point()
    if found != (torch.uint8, [*labels.shape, 32, 32, 3], False):
        raise ValueError(f"{images_path} is {images.dtype} {[*images.shape]}, its labels "
                         f"{labels.dtype} {[*labels.shape]}; expected uint8 [N, 32, 32, 3] and [N]")
    return images.permute(0, 3, 1, 2), labels.long()

def read_cifar_c(directory, name, severity):
    """One severity, 1 to 5, of CIFAR-10-C or -100-C: images uint8 (N,3,32,32), labels int64 (N,);
    from <name>.npy (5 N,32,32,3), severity-major, and labels.npy. Raises as `read_arrays`."""
    images, labels = read_arrays(Path(directory, f"{name}.npy"), Path(directory, "labels.npy"))
    n = len(labels) // 5
    if severity not in range(1, 6) or not labels.equal(labels[:n].repeat(5)):
        raise ValueError(f"{directory}: severity {severity} of 1 to 5, or labels.npy not 5 x one")
    part = slice((severity - 1) * n, severity * n)
    return images[part].contiguous(), labels[part]

def read_cifar10_1(folder):
    """The latest version of CIFAR-10.1 (Recht et al. 2018) in the folder, as `read_arrays`."""
    path = max(folder.glob("cifar10.1_v*_data.npy"), default=folder / "cifar10.1_v6_data.npy")
    images, labels = read_arrays(path, path.with_name(path.name.replace("data", "labels")))
    if set(labels.tolist()) - set(range(10)):
        raise ValueError(f"{path}: its labels are not all from 0 to 9")
    return images.contiguous(), labels

def read_stl10(folder):
    """STL-10's test images of the nine classes that CIFAR-10 has: uint8 (N,3,96,96), labels int64
    (N,) of CIFAR-10's classes (no frog). The folder has stl10_binary/. Raises as `read_arrays`."""
    folder = folder / "stl10_binary"
    with files.undamaged(folder, "unpack it again"):
        images, labels = (torch.from_numpy(np.fromfile(folder / name, np.uint8))
                          for name in ("test_X.bin", "test_y.bin"))
        # 1 airplane, bird, car, cat, deer, dog, horse, monkey (not in CIFAR-10), ship, 10 truck
        labels = torch.tensor([-1, 0, 2, 1, 3, 4, 5, 7, -1, 8, 9])[labels.long()]
        images = images.view(-1, 3, 96, 96).transpose(2, 3)  # their files are column-major
        return images[labels >= 0].contiguous(), labels[labels >= 0]

def imagenet_c_folder(directory, name, severity):
    """The folder of one corruption's classes in ImageNet-C or Tiny-ImageNet-C: <name>/<severity>,
    or below another one, as the archives unpack (blur/defocus_blur/1). FileNotFoundError: none."""
    root = Path(directory)
    for folder in (*root.glob(f"{name}/{severity}"), *root.glob(f"*/{name}/{severity}")):
        return folder
    raise FileNotFoundError(f"{directory} has no {name}/{severity}; expected ImageNet-C, unpacked")

def list_classes(root, class_ids, class_names):
    """The images of a folder a class -> paths, labels int64 (N,), columns int64 (k,): the classes
    that occur, ascending; labels count within them, so that logits[:, columns] choose among the
    set's own (200 for ImageNet-A and -R). Raises as `folders.match_classes` and `by_class`."""
    listing = folders.by_class(root)
    paths, classes = folders.labelled(listing, class_ids, class_names, root, partial=True)
    columns, labels = torch.tensor(classes).unique(return_inverse=True)
    return paths, labels, columns

def load_shift(directory, dataset, class_ids, class_names):
    """A shift set of the data set named `dataset` -> images, a uint8 tensor (N,3,H,W) or paths,
    labels and columns as of `list_classes`. The folder has CIFAR-10.1's or STL-10's files, or a
    folder of images a class, named by its id (WordNet's), name or number (ImageNet-V2)."""
    root = Path(directory)
    for part in {"val", "test"} - {*class_ids, *class_names}:
        if (root / part).is_dir():
            raise ValueError(f"--shift {root}: expected a folder a class, as in {root / part}")
    for pattern, read in (("cifar10.1_v*_data.npy", read_cifar10_1), ("stl10_binary", read_stl10)):
        if any(root.glob(pattern)):
            if dataset != "cifar10":
                raise ValueError(f"{root} holds a shift set of cifar10, not of {dataset}")
            images, classes = read(root)
            return images, *classes.unique(return_inverse=True)[::-1]
    return list_classes(root, class_ids, class_names)
